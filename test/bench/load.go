package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// warmUp is load before anything counts, at the latency test's own rate.
const warmUp = 500 * time.Millisecond

// latency sends requests at fixed instants over kept connections, whatever the
// answers do (open loop): a latency counts from when the request should have
// been sent, so a stall is felt by every request that it held up.
func latency(l *load) (*result, error) {
	fds := make([]int, l.conns)
	for i := range fds {
		fd, err := dial(l.to)
		if err != nil {
			return nil, err
		}
		defer func() { _ = unix.Close(fd) }()
		// The tunnel behind it is opened now, and not by the first sample.
		if err := ping(fd, make([]byte, l.size)); err != nil {
			return nil, err
		}
		fds[i] = fd
	}
	interval := int64(time.Second) / int64(l.rps)
	start := now() + int64(10*time.Millisecond)
	begin, end := start+int64(warmUp), start+int64(warmUp+l.duration)
	samples := make([][]int64, l.conns)
	failures := make([]int64, l.conns)
	var all sync.WaitGroup
	for i, fd := range fds {
		all.Go(func() {
			sharpTimers()
			mine := make([]int64, 0, int(l.duration.Seconds()*float64(l.rps))/l.conns+10)
			buf := make([]byte, l.size)
			step := interval * int64(l.conns)
			for at := start + int64(i)*interval; at < end; at += step {
				sleepUntil(at) // not at all, when late
				if err := ping(fd, buf); err != nil {
					failures[i]++ // a kept connection broke: the rest is lost
					break
				}
				if at >= begin {
					mine = append(mine, now()-at)
				}
			}
			samples[i] = mine
		})
	}
	sleepUntil(begin)
	fmt.Println(lineBegin)
	all.Wait()
	fmt.Println(lineEnd)
	every := slices.Concat(samples...)
	r := &result{Count: int64(len(every)), Seconds: l.duration.Seconds()}
	for _, n := range failures {
		r.Failures += n
	}
	if len(every) == 0 {
		return nil, errors.New("no request was answered")
	}
	slices.Sort(every)
	at := func(q float64) float64 { return float64(every[int(q*float64(len(every)-1))]) / 1e9 }
	r.P50, r.P99, r.Max = at(0.5), at(0.99), at(1)
	return r, nil
}

func ping(fd int, buf []byte) error {
	if err := writeAll(fd, buf); err != nil {
		return err
	}
	return readFull(fd, buf)
}

// rate opens connections, sends a byte each way and closes, as fast as so many
// at a time can.
func rate(l *load) (*result, error) {
	var done, failures, taken atomic.Int64
	fmt.Println(lineBegin)
	start := now()
	end := start + int64(l.duration)
	var all sync.WaitGroup
	for range l.conns {
		all.Go(func() {
			buf := make([]byte, 1)
			for now() < end && taken.Add(1) <= l.limit {
				fd, err := dial(l.to)
				if err != nil {
					failures.Add(1)
					continue
				}
				if err := ping(fd, buf); err != nil {
					failures.Add(1)
				} else {
					done.Add(1)
				}
				_ = unix.Close(fd)
			}
		})
	}
	all.Wait()
	took := now() - start
	fmt.Println(lineEnd)
	return &result{Count: done.Load(), Seconds: float64(took) / 1e9, Failures: failures.Load()}, nil
}

// chunk is how much one write or read of a bulk stream moves.
const chunk = 128 << 10

// upload sends one stream and asks the server how much arrived.
func upload(l *load) (*result, error) {
	fd, err := dial(l.to)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	buf := make([]byte, chunk)
	fmt.Println(lineBegin)
	start := now()
	for end := start + int64(l.duration); now() < end; {
		if err := writeAll(fd, buf); err != nil {
			return nil, err
		}
	}
	if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
		return nil, err
	}
	var count [8]byte
	if err := readFull(fd, count[:]); err != nil {
		return nil, err
	}
	took := now() - start
	fmt.Println(lineEnd)
	return &result{Count: int64(binary.BigEndian.Uint64(count[:])), Seconds: float64(took) / 1e9}, nil
}

// download asks the server for a stream of that length in time.
func download(l *load) (*result, error) {
	fd, err := dial(l.to)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(fd) }()
	buf := make([]byte, chunk)
	fmt.Println(lineBegin)
	start := now()
	if err := writeAll(fd, binary.BigEndian.AppendUint64(nil, uint64(l.duration))); err != nil {
		return nil, err
	}
	r := &result{}
	for {
		n, err := read(fd, buf)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		r.Count += int64(n)
	}
	r.Seconds = float64(now()-start) / 1e9
	fmt.Println(lineEnd)
	return r, nil
}

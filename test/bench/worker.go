package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"
)

// workerArg is the first argument of a process that makes or answers load.
const workerArg = "worker"

// Lines that a client worker prints around what it measures, so that CPU time
// can be read off for just that; a line of JSON with a result follows.
const (
	lineReady = "ready"
	lineBegin = "begin"
	lineEnd   = "end"
)

// result is what a client worker measured.
type result struct {
	// P50, P99 and Max are latencies in seconds.
	P50, P99, Max float64
	// Count is how many requests, connections or bytes there were, in
	// Seconds.
	Count   int64
	Seconds float64
	// Failures are requests or connections without an answer.
	Failures int64
}

// Per second.
func (r *result) rate() float64 { return float64(r.Count) / r.Seconds }

// load is the work of a client worker.
type load struct {
	to       netip.AddrPort
	conns    int
	rps      int
	size     int
	duration time.Duration
	limit    int64
}

// worker is the program inside a pod: "serve", or a kind of load.
func worker(args []string) error {
	if len(args) == 0 {
		return errors.New("no kind of work is named")
	}
	var l load
	var to string
	f := flag.NewFlagSet(args[0], flag.ContinueOnError)
	f.StringVar(&to, "to", "", "address to dial")
	f.IntVar(&l.conns, "conns", 1, "connections at a time")
	f.IntVar(&l.rps, "rps", 0, "requests per second, over all connections")
	f.IntVar(&l.size, "size", 0, "bytes of a request, and of its answer")
	f.DurationVar(&l.duration, "duration", time.Second, "length")
	f.Int64Var(&l.limit, "limit", 0, "most connections")
	if err := f.Parse(args[1:]); err != nil {
		return err
	}
	if args[0] == "serve" {
		return serve()
	}
	var err error
	if l.to, err = netip.ParseAddrPort(to); err != nil {
		return fmt.Errorf("-to: %w", err)
	}
	// Nothing of Go's own shall be in the latencies: no collection, and a
	// processor for each thread, so that none waits to come back from a
	// system call.
	debug.SetGCPercent(-1)
	runtime.GOMAXPROCS(l.conns + 2)
	kinds := map[string]func(*load) (*result, error){"latency": latency, "rate": rate, "upload": upload, "download": download}
	kind := kinds[args[0]]
	if kind == nil {
		return fmt.Errorf("%q is no kind of work", args[0])
	}
	r, err := kind(&l)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// The loads use blocking sockets on threads of their own. Go's poller sleeps in
// whole milliseconds, which is ten times what is measured here.

// patience bounds every wait for an answer.
const patience = 5 * time.Second

// dial opens a blocking connection without Nagle's delay.
func dial(to netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	wait := unix.NsecToTimeval(int64(patience))
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait))
	if err == nil {
		err = again(func() error {
			return unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
		})
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// again repeats a system call that a signal interrupted.
func again(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func writeAll(fd int, p []byte) error {
	for len(p) > 0 {
		n := 0
		err := again(func() (err error) { n, err = unix.Write(fd, p); return err })
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

func readFull(fd int, p []byte) error {
	for len(p) > 0 {
		n, err := read(fd, p)
		if err != nil {
			return err
		}
		if n == 0 {
			return errors.New("closed early")
		}
		p = p[n:]
	}
	return nil
}

func read(fd int, p []byte) (n int, err error) {
	err = again(func() (err error) { n, err = unix.Read(fd, p); return err })
	return n, err
}

// now is the monotonic clock, in nanoseconds.
func now() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail for this clock
	return ts.Nano()
}

// sleepUntil sleeps until an instant of the monotonic clock.
func sleepUntil(at int64) {
	ts := unix.NsecToTimespec(at)
	_ = again(func() error {
		return unix.ClockNanosleep(unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME, &ts, nil)
	})
}

// sharpTimers makes the calling thread, which stays with its goroutine, wake
// up when it asked to and not up to 50 µs later.
func sharpTimers() {
	runtime.LockOSThread()
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0) // without it: less sharp
}

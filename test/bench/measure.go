package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"time"
)

// plan says how long each kind of load lasts.
type plan struct {
	latency, rate, bulk, idle time.Duration
}

var (
	fullPlan  = plan{latency: 5 * time.Second, rate: 2 * time.Second, bulk: 1500 * time.Millisecond, idle: 10 * time.Second}
	shortPlan = plan{latency: 2 * time.Second, rate: time.Second, bulk: 500 * time.Millisecond, idle: 2 * time.Second}
)

// The loads.
const (
	latencyConns = 16
	latencyRPS   = 1000
	requestSize  = 1 << 10
	rateConns    = 16
	// rateLimit bounds the connections of one turn, so that those of the turns
	// before, which the kernel remembers for a minute, do not fill the ports.
	rateLimit = 8000
)

// sample is what one subject did in one round.
type sample struct {
	latency, rate, upload, download measured
}

// measured is a result and the CPU time that it took meanwhile, in seconds.
type measured struct {
	result
	proxies float64 // of the subject's own processes
	helpers float64 // of those that are not proxies themselves
	machine float64 // of everything, load generators and kernel included
	// others is the share of all processors that went neither to the subject
	// nor to the load generators.
	others float64
}

// measure runs the rounds.
func (b *bench) measure(ctx context.Context) error {
	if err := b.measureIdle(ctx); err != nil {
		return err
	}
	for round := range b.rounds {
		b.results = append(b.results, map[string]*sample{})
		for i := range b.subjects {
			// Each round begins with another subject, so that none always
			// follows the same neighbour.
			s := b.subjects[(i+round)%len(b.subjects)]
			r, err := b.turn(ctx, s)
			if err != nil {
				return fmt.Errorf("round %d: %s: %w", round+1, s.name, err)
			}
			b.results[round][s.name] = r
			fmt.Fprintf(os.Stderr, "bench: %s round %d of %d: %-14s p50 %3.0f µs, p99 %4.0f µs, %5.0f connections/s, up %.2f, down %.2f Gbit/s, failures %d\n",
				time.Now().Format("15:04:05"), round+1, b.rounds, s.name, r.latency.P50*1e6, r.latency.P99*1e6, r.rate.rate(), r.upload.rate()*8/1e9, r.download.rate()*8/1e9, r.failures())
		}
	}
	return nil
}

// measureIdle reads off what the subjects use without load, and what else goes
// on on the machine.
func (b *bench) measureIdle(ctx context.Context) error {
	read := func() (all time.Duration, each []time.Duration, err error) {
		if all, err = machineCPU(); err != nil {
			return 0, nil, err
		}
		for _, s := range b.subjects {
			d, _, err := treesCPU(s.pids)
			if err != nil {
				return 0, nil, err
			}
			each = append(each, d)
		}
		return all, each, nil
	}
	allBefore, before, err := read()
	if err != nil {
		return err
	}
	select {
	case <-time.After(b.plan.idle):
	case <-ctx.Done():
		return ctx.Err()
	}
	allAfter, after, err := read()
	if err != nil {
		return err
	}
	length := b.plan.idle.Seconds()
	others := (allAfter - allBefore).Seconds()
	b.idle = map[string]float64{}
	for i, s := range b.subjects {
		used := (after[i] - before[i]).Seconds()
		others -= used
		b.idle[s.name] = used / length
	}
	b.noise = max(0, others) / length / float64(runtime.NumCPU())
	return nil
}

func (s *sample) failures() int64 {
	return s.latency.Failures + s.rate.Failures + s.upload.Failures + s.download.Failures
}

// turn puts each kind of load on one subject.
func (b *bench) turn(ctx context.Context, s *subject) (*sample, error) {
	var r sample
	for _, w := range []struct {
		into *measured
		port uint16
		args []string
	}{
		{&r.latency, portEcho, []string{"latency", "-conns", strconv.Itoa(latencyConns), "-rps", strconv.Itoa(latencyRPS), "-size", strconv.Itoa(requestSize), "-duration", b.plan.latency.String()}},
		{&r.rate, portEcho, []string{"rate", "-conns", strconv.Itoa(rateConns), "-limit", strconv.Itoa(rateLimit), "-duration", b.plan.rate.String()}},
		{&r.upload, portSink, []string{"upload", "-duration", b.plan.bulk.String()}},
		{&r.download, portSource, []string{"download", "-duration", b.plan.bulk.String()}},
	} {
		for {
			begun := time.Now()
			if err := b.work(ctx, s, w.into, w.port, w.args); err != nil {
				return nil, fmt.Errorf("%s: %w", w.args[0], err)
			}
			b.loads++
			if w.into.others <= quiet {
				break
			}
			if b.wait <= 0 {
				b.disturbed++
				break
			}
			// Disturbed by somebody else's work: once more, when that is over.
			b.repeated++
			if err := b.untilQuiet(ctx); err != nil {
				return nil, err
			}
			b.wait -= time.Since(begun)
		}
		// The end of the last load's connections is no part of the next.
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return &r, nil
}

// quiet is the share of the processors that others may use while something is
// measured. The idle subjects are among them.
const quiet = 0.1

// untilQuiet waits until the machine has little to do, but not longer than b is
// still ready to wait.
func (b *bench) untilQuiet(ctx context.Context) error {
	const look = 500 * time.Millisecond
	for deadline := time.Now().Add(b.wait); time.Now().Before(deadline); {
		before, err := machineCPU()
		if err != nil {
			return err
		}
		select {
		case <-time.After(look):
		case <-ctx.Done():
			return ctx.Err()
		}
		after, err := machineCPU()
		if err != nil {
			return err
		}
		if float64(after-before)/float64(look)/float64(runtime.NumCPU()) < quiet {
			return nil
		}
	}
	return nil
}

// work runs a client worker in the subject's client pod and reads off the CPU
// time at the begin and end that the worker announces.
func (b *bench) work(ctx context.Context, s *subject, into *measured, port uint16, args []string) error {
	args = append([]string{workerArg, args[0], "-to", netip.AddrPortFrom(s.target, port).String()}, args[1:]...)
	cmd := s.client.Command(ctx, "/proc/self/exe", args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	in := bufio.NewReader(out)
	err = func() error {
		var proxies, envoys, generators, machine [2]time.Duration
		var at [2]time.Time
		for i, want := range []string{lineBegin, lineEnd} {
			line, err := in.ReadString('\n')
			if err != nil || line != want+"\n" {
				return fmt.Errorf("the load generator said %q, %w; want %q", line, err, want)
			}
			if machine[i], err = machineCPU(); err != nil {
				return err
			}
			if proxies[i], envoys[i], err = treesCPU(s.pids); err != nil {
				return err
			}
			if generators[i], _, err = treesCPU([]int{cmd.Process.Pid, s.generator}); err != nil {
				return err
			}
			at[i] = time.Now()
		}
		into.proxies, into.machine = (proxies[1] - proxies[0]).Seconds(), (machine[1] - machine[0]).Seconds()
		all := at[1].Sub(at[0]).Seconds() * float64(runtime.NumCPU())
		into.others = (into.machine - into.proxies - (generators[1] - generators[0]).Seconds()) / all
		into.helpers = into.proxies - (envoys[1] - envoys[0]).Seconds()
		return json.NewDecoder(in).Decode(&into.result)
	}()
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return err
	}
	return cmd.Wait()
}

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// counts are what load prints: of one second, or of the whole run.
type counts struct {
	Summary bool      `json:"summary,omitempty"`
	At      time.Time `json:"at"`
	// Of new connections, each of which asks once who answers. Wrong are
	// answers by somebody else than wanted.
	OK     int `json:"ok"`
	Failed int `json:"failed"`
	Wrong  int `json:"wrong"`
	// Of streams: how many are open now, how many messages came back, how
	// many streams broke, and how many got back what they did not send.
	Streams      int `json:"streams"`
	Echoed       int `json:"echoed"`
	StreamFailed int `json:"streamFailed"`
	StreamWrong  int `json:"streamWrong"`
	// Skipped are calls that were not made because earlier ones hang.
	Skipped int `json:"skipped"`
	// MaxMS is the longest call that succeeded.
	MaxMS float64 `json:"maxMs"`
	// Errors are the first few different ones, with how often each came.
	Errors map[string]int `json:"errors,omitempty"`
}

// maxErrors bounds how many different errors a line tells.
const maxErrors = 8

func (c *counts) note(err error) {
	if c.Errors == nil {
		c.Errors = map[string]int{}
	}
	text := plainError(err)
	if _, ok := c.Errors[text]; !ok && len(c.Errors) >= maxErrors {
		text = "other"
	}
	c.Errors[text]++
}

// plainError is an error without the addresses, which differ each time.
func plainError(err error) string {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Op + ": " + op.Err.Error()
	}
	return err.Error()
}

// add adds a second's counts to a run's.
func (c *counts) add(o counts) {
	c.OK += o.OK
	c.Failed += o.Failed
	c.Wrong += o.Wrong
	c.Echoed += o.Echoed
	c.StreamFailed += o.StreamFailed
	c.StreamWrong += o.StreamWrong
	c.Skipped += o.Skipped
	c.MaxMS = max(c.MaxMS, o.MaxMS)
	for text, n := range o.Errors {
		if c.Errors == nil {
			c.Errors = map[string]int{}
		}
		if _, ok := c.Errors[text]; !ok && len(c.Errors) >= maxErrors {
			text = "other"
		}
		c.Errors[text] += n
	}
}

// loader calls and streams until its context ends.
type loader struct {
	address, echo string
	want          string
	idle          time.Duration
	timeout       time.Duration
	mark          string

	mu  sync.Mutex
	now counts // guarded by mu; of the second that is running
}

func (l *loader) update(f func(*counts)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(&l.now)
}

// take ends a second.
func (l *loader) take() counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	taken := l.now
	taken.At = time.Now().UTC()
	l.now = counts{Streams: taken.Streams}
	return taken
}

func load(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("load", flag.ContinueOnError)
	l := &loader{}
	rate := f.Float64("rate", 10, "new connections a second; 0 is none")
	conns := f.Int("conns", 0, "streams that stay open; one that breaks is opened again")
	f.StringVar(&l.echo, "echo", "", "address of the TCP echo, HOST:PORT (default: that of the calls with the port + 1)")
	f.StringVar(&l.want, "want", "", "what the name of whoever answers starts with; anything else is wrong")
	f.DurationVar(&l.idle, "idle", 100*time.Millisecond, "between two messages of a stream")
	f.StringVar(&l.mark, "mark", "", "text that every call and every message carries, to be found on the wire where it is in plain")
	every := f.Duration("every", time.Second, "how often counts are printed")
	f.DurationVar(&l.timeout, "timeout", 5*time.Second, "of a call, and of a message's way back")
	rest, err := parse(f, args)
	if err != nil {
		return err
	}
	if len(rest) != 1 {
		return errors.New("load: name one address, HOST:PORT")
	}
	if *every <= 0 {
		return errors.New("load: --every must be more than 0")
	}
	if *rate < 0 || *rate > 10000 || *conns < 0 {
		return errors.New("load: --rate must be from 0 to 10000, --conns 0 or more")
	}
	l.address = rest[0]
	if l.echo == "" {
		if l.echo, err = nextPort(l.address); err != nil {
			return err
		}
	}
	printLine(l.run(ctx, *rate, *conns, *every, func(c counts) { printLine(c) }))
	return nil
}

// nextPort returns an address with the port after its own.
func nextPort(address string) (string, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 65535 {
		return "", errors.New("load: " + address + ": give --echo too, this port has no number after it")
	}
	return net.JoinHostPort(host, strconv.FormatUint(n+1, 10)), nil
}

// run gives the counts of each such time to tell, and returns those of the whole run.
// It returns when nothing that it started runs any more.
func (l *loader) run(ctx context.Context, rate float64, streams int, every time.Duration, tell func(counts)) counts {
	var wait sync.WaitGroup
	for range streams {
		wait.Go(func() {
			for ctx.Err() == nil {
				l.stream(ctx)
				sleep(ctx, l.idle)
			}
		})
	}
	if rate > 0 {
		wait.Go(func() { l.calls(ctx, rate) })
	}
	total := counts{Summary: true}
	each := time.NewTicker(every)
	defer each.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-each.C:
			second := l.take()
			total.add(second)
			tell(second)
		}
	}
	wait.Wait()
	last := l.take()
	total.add(last)
	total.At, total.Streams = last.At, last.Streams
	return total
}

// maxHanging bounds the calls that are under way at a time.
const maxHanging = 2000

// calls starts calls at a rate, whether earlier ones have ended or not.
func (l *loader) calls(ctx context.Context, rate float64) {
	var wait sync.WaitGroup
	defer wait.Wait()
	free := make(chan struct{}, maxHanging)
	start := time.Now()
	for n := 0; ; n++ {
		if !sleep(ctx, time.Until(start.Add(time.Duration(float64(n)/rate*float64(time.Second))))) {
			return
		}
		select {
		case free <- struct{}{}:
		default:
			l.update(func(c *counts) { c.Skipped++ })
			continue
		}
		wait.Go(func() {
			l.call(ctx)
			<-free
		})
	}
}

// call makes one call. One that the end of the run cuts short does not count.
func (l *loader) call(ctx context.Context) {
	bound, cancel := context.WithTimeout(ctx, l.timeout)
	defer cancel()
	began := time.Now()
	id, err := call(bound, l.address, l.mark)
	took := float64(time.Since(began).Microseconds()) / 1000
	if err != nil && ctx.Err() != nil {
		return
	}
	l.update(func(c *counts) {
		switch {
		case err != nil:
			c.Failed++
			c.note(err)
		case !strings.HasPrefix(id, l.want):
			c.Wrong++
			c.note(errors.New("answer by " + id))
		default:
			c.OK++
			c.MaxMS = max(c.MaxMS, took)
		}
	})
}

// stream keeps one connection open and compares what comes back.
func (l *loader) stream(ctx context.Context) {
	var d net.Dialer
	bound, cancel := context.WithTimeout(ctx, l.timeout)
	c, err := d.DialContext(bound, "tcp", l.echo)
	cancel()
	if err == nil {
		stop := context.AfterFunc(ctx, func() { _ = c.Close() })
		l.update(func(c *counts) { c.Streams++ })
		err = l.echoes(ctx, c)
		l.update(func(c *counts) { c.Streams-- })
		stop()
		_ = c.Close()
	}
	if err != nil && ctx.Err() == nil {
		l.update(func(c *counts) {
			if errors.Is(err, errOther) {
				c.StreamWrong++
			} else {
				c.StreamFailed++
			}
			c.note(err)
		})
	}
}

var errOther = errors.New("stream: what came back was not what was sent")

func (l *loader) echoes(ctx context.Context, c net.Conn) error {
	sent, got := append(make([]byte, 8), l.mark...), make([]byte, 8+len(l.mark))
	for n := uint64(1); ; n++ {
		binary.BigEndian.PutUint64(sent, n)
		_ = c.SetDeadline(time.Now().Add(l.timeout))
		if _, err := c.Write(sent); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, got); err != nil {
			return err
		}
		if !bytes.Equal(got, sent) {
			return errOther
		}
		l.update(func(c *counts) { c.Echoed++ })
		if !sleep(ctx, l.idle) {
			return nil
		}
	}
}

// sleep reports whether the context is still good afterwards.
func sleep(ctx context.Context, d time.Duration) bool {
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-ctx.Done():
		case <-t.C:
		}
	}
	return ctx.Err() == nil
}

package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/internal/lab"
)

// canary begins everything that a client of the mesh says. It must never be
// seen on the wire.
var canary = []byte("canary-Zq7w1")

// stranger begins what callers outside the mesh say, who have nothing but
// plaintext.
var stranger = []byte("stranger-k3x")

// The classes of attempts: what a client claims to be, so that a server knows
// a connection that must not have reached it.
const (
	classShort  = 'a' // allowed, one exchange
	classStream = 's' // allowed, messages echoed until the client closes
	classWrong  = 'd' // may not be served, ever
	classPlain  = 'p' // likewise, and from outside the mesh
)

// headerSize is the length of what a client says first: canary or stranger, its
// class, three bytes of padding, its number, how many bytes it will send in
// all, and how many it wants back.
const headerSize = 12 + 4 + 8 + 4 + 4

func header(class byte, number uint64, up, down int) []byte {
	first := canary
	if class == classPlain {
		first = stranger
	}
	b := append(bytes.Clone(first), class, 0, 0, 0)
	b = binary.BigEndian.AppendUint64(b, number)
	b = binary.BigEndian.AppendUint32(b, uint32(up))
	return binary.BigEndian.AppendUint32(b, uint32(down))
}

// attempt is one connection as its client saw it.
type attempt struct {
	kind           string
	number         uint64
	pod            string
	own            string // the client's address; empty if it did not connect
	to             string // what it dialled
	begin, end     time.Time
	sent, received uint64
	err            error // nil: all that was asked for came back
}

// served is one connection as a server saw it.
type served struct {
	class          byte // 0: nothing was said
	number         uint64
	via            string // the address it came from
	sent, received uint64 // towards the server, and from it
}

// traffic is what clients and servers of a test wrote down. It is safe for
// concurrent use.
type traffic struct {
	next atomic.Uint64

	mu       sync.Mutex
	attempts []attempt // guarded by mu; those that have ended
	served   []served  // guarded by mu
	stalls   []stall   // guarded by mu
}

// stall is the time that one message of a stream took to come back.
type stall struct {
	at   time.Time
	took time.Duration
}

func (r *traffic) note(a attempt) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.attempts = append(r.attempts, a)
}

// between returns the attempts of a kind that were under way in a span of time.
func (r *traffic) between(kind string, from, to time.Time) []attempt {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []attempt
	for _, a := range r.attempts {
		if a.kind == kind && a.end.After(from) && a.begin.Before(to) {
			out = append(out, a)
		}
	}
	return out
}

// breaches returns the connections that a server should never have seen. A
// connection on which nothing was said may be one of an allowed client whose
// proxy died between the two; it counts unless that is tolerated.
func (r *traffic) breaches(tolerateMute bool) []served {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []served
	for _, s := range r.served {
		if s.class != classShort && s.class != classStream && (s.class != 0 || !tolerateMute) {
			out = append(out, s)
		}
	}
	return out
}

// serve answers connections and writes down each.
func (r *traffic) serve(c net.Conn) {
	s := served{via: c.RemoteAddr().String()}
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.served = append(r.served, s)
	}()
	h := make([]byte, headerSize)
	n, err := io.ReadFull(c, h)
	s.sent = uint64(n)
	if err != nil {
		return
	}
	s.class, s.number = h[12], binary.BigEndian.Uint64(h[16:])
	if s.class == classStream {
		buf := make([]byte, 4096)
		for {
			n, err := c.Read(buf)
			s.sent += uint64(n)
			w, werr := c.Write(buf[:n])
			s.received += uint64(w)
			if err != nil || werr != nil {
				return
			}
		}
	}
	up, down := binary.BigEndian.Uint32(h[24:]), binary.BigEndian.Uint32(h[28:])
	m, err := io.CopyN(io.Discard, c, int64(up)-headerSize)
	s.sent += uint64(m)
	if err != nil {
		return
	}
	w, err := c.Write(bytes.Repeat([]byte{'.'}, int(down)))
	s.received += uint64(w)
	if err != nil {
		return
	}
	extra, _ := io.Copy(io.Discard, c) // until the client closes
	s.sent += uint64(extra)
}

// patience is how long one attempt may take.
const patience = 15 * time.Second

// exchange makes one attempt: it sends up bytes in all and wants down back.
func (r *traffic) exchange(ctx context.Context, pod *lab.Pod, kind string, class byte, addr string, up, down int) attempt {
	a := attempt{kind: kind, number: r.next.Add(1), pod: pod.Name, to: addr, begin: time.Now()}
	a.err = func() error {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		c, err := pod.Dial(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		defer c.Close()
		a.own = c.LocalAddr().String()
		_ = c.SetDeadline(time.Now().Add(patience))
		n, werr := c.Write(append(header(class, a.number, up, down), bytes.Repeat([]byte{'.'}, up-headerSize)...))
		a.sent = uint64(n)
		got, rerr := io.CopyN(io.Discard, c, int64(down))
		a.received = uint64(got)
		return errors.Join(werr, rerr)
	}()
	a.end = time.Now()
	if ctx.Err() == nil || a.err == nil {
		r.note(a)
	}
	return a
}

// every calls f at a rate until ctx ends, at most atOnce at a time: a call for
// which nobody is free is left out. The caller waits for wg.
func every(ctx context.Context, wg *sync.WaitGroup, perSecond, atOnce int, f func()) {
	turns := make(chan struct{})
	for range atOnce {
		wg.Go(func() {
			for range turns {
				f()
			}
		})
	}
	wg.Go(func() {
		defer close(turns)
		tick := time.NewTicker(time.Second / time.Duration(perSecond))
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			select {
			case turns <- struct{}{}:
			default:
			}
		}
	})
}

// stream keeps one connection busy until stop ends, and then closes it; one
// that breaks is noted and opened again.
func (r *traffic) stream(stop context.Context, pod *lab.Pod, addr string) {
	for stop.Err() == nil {
		a := attempt{kind: "stream", number: r.next.Add(1), pod: pod.Name, to: addr, begin: time.Now()}
		a.err = r.streamOnce(stop, pod, &a)
		a.end = time.Now()
		r.note(a)
		if a.err != nil {
			time.Sleep(20 * time.Millisecond)
		}
	}
}

func (r *traffic) streamOnce(stop context.Context, pod *lab.Pod, a *attempt) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(stop), patience)
	defer cancel()
	c, err := pod.Dial(ctx, "tcp", a.to)
	if err != nil {
		return err
	}
	defer c.Close()
	a.own = c.LocalAddr().String()
	n, err := c.Write(header(classStream, a.number, 0, 0))
	a.sent = uint64(n)
	if err != nil {
		return err
	}
	message := append(bytes.Clone(canary), make([]byte, 52)...)
	got := make([]byte, len(message))
	for {
		began := time.Now()
		_ = c.SetDeadline(began.Add(patience))
		n, err := c.Write(message)
		a.sent += uint64(n)
		if err != nil {
			return err
		}
		n, err = io.ReadFull(c, got)
		a.received += uint64(n)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, message) {
			return fmt.Errorf("the echo differs: %q", got)
		}
		if took := time.Since(began); took > 50*time.Millisecond {
			r.mu.Lock()
			r.stalls = append(r.stalls, stall{began, took})
			r.mu.Unlock()
		}
		select {
		case <-stop.Done():
			return nil
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// longestStall is the longest that a message of a stream took in a span.
func (r *traffic) longestStall(from, to time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out time.Duration
	for _, s := range r.stalls {
		if s.at.Add(s.took).After(from) && s.at.Before(to) {
			out = max(out, s.took)
		}
	}
	return out
}

// sniff looks for the canary on the bridge until the test ends, and fails it
// if it was seen, or if the look was not complete.
func sniff(t *testing.T, l *lab.Lab) {
	t.Helper()
	s, err := l.Sniff(context.Background(), canary)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if s.Count(canary) != 0 || s.Lost() != 0 || s.Packets() == 0 {
			t.Errorf("of %d packets, %d lost, %d had the canary in plain", s.Packets(), s.Lost(), s.Count(canary))
		}
	})
}

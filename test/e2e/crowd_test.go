package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

// crowd is many short connections, each of which carries a number. Neither
// the clients nor the server can see identities; the audit is joined to what
// both saw of the sockets: the client knows from which address it sent a
// number, the server to which address of the proxy it answered it.
type crowd struct {
	done     atomic.Int64 // connections that ran to their end
	mu       sync.Mutex
	sent     map[string][]call // guarded by mu; by the client's address, in order
	accepted map[string][]call // guarded by mu; by the proxy's address, in order
}

// call is one connection of a crowd.
type call struct {
	number uint64
	pod    string // who sent it; unknown at the server
	denied bool   // as the client saw it: closed without a byte
}

func newCrowd() *crowd {
	return &crowd{sent: map[string][]call{}, accepted: map[string][]call{}}
}

// answer is the server: it notes the number and sends it back.
func (c *crowd) answer(conn net.Conn) {
	var b [8]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil {
		return
	}
	via := conn.RemoteAddr().String()
	c.mu.Lock()
	c.accepted[via] = append(c.accepted[via], call{number: binary.BigEndian.Uint64(b[:])})
	c.mu.Unlock()
	if _, err := conn.Write(b[:]); err != nil {
		return
	}
	_, _ = conn.Read(b[:]) // until the client closes
}

// one makes one connection and reports how it went. An error is a failure:
// neither answered nor refused.
func (c *crowd) one(ctx context.Context, pod *lab.Pod, addr string, number uint64) (denied bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	conn, err := pod.Dial(ctx, "tcp", addr)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	own := conn.LocalAddr().String()
	var want, got [8]byte
	binary.BigEndian.PutUint64(want[:], number)
	_, writeErr := conn.Write(want[:])
	n, err := io.ReadFull(conn, got[:])
	switch {
	case err == nil && got == want:
	case err == nil:
		return false, fmt.Errorf("connection %d was answered with %x", number, got)
	case n == 0 && !timedOut(err):
		denied = true
	default:
		return false, fmt.Errorf("connection %d: %d bytes, %w", number, n, errors.Join(writeErr, err))
	}
	c.mu.Lock()
	c.sent[own] = append(c.sent[own], call{number: number, pod: pod.Name, denied: denied})
	c.mu.Unlock()
	return denied, nil
}

func timedOut(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

// run makes n connections, atOnce at a time, from the pods in turn, and
// returns how many each pod had answered and refused. Numbers begin at first.
func (c *crowd) run(t *testing.T, addr string, first uint64, n, atOnce int, pods ...*lab.Pod) (answered, refused map[string]int) {
	t.Helper()
	answered, refused = map[string]int{}, map[string]int{}
	var mu sync.Mutex
	var failures []error
	numbers := make(chan uint64)
	var wg sync.WaitGroup
	for range atOnce {
		wg.Go(func() {
			for i := range numbers {
				pod := pods[i%uint64(len(pods))]
				denied, err := c.one(t.Context(), pod, addr, i)
				c.done.Add(1)
				mu.Lock()
				switch {
				case err != nil:
					failures = append(failures, fmt.Errorf("%s: %w", pod.Name, err))
				case denied:
					refused[pod.Name]++
				default:
					answered[pod.Name]++
				}
				mu.Unlock()
			}
		})
	}
	start := time.Now()
	for i := range n {
		numbers <- first + uint64(i)
	}
	close(numbers)
	wg.Wait()
	t.Logf("%d connections, %d at a time: %.0f a second", n, atOnce, float64(n)/time.Since(start).Seconds())
	if len(failures) > 0 {
		t.Errorf("%d of %d connections failed; the first: %v", len(failures), n, failures[0])
	}
	return answered, refused
}

// settled waits until the audit has n ended records, and returns them by side
// and in the order of their connections' starts.
func settled(t *testing.T, m *harness.Mesh, n int) (source, destination []audit.Record) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for {
		source, destination = nil, nil
		for _, r := range m.Records(adminclient.AuditQuery{}) {
			switch {
			case r.End.IsZero():
			case r.Side == audit.Source:
				source = append(source, r)
			default:
				destination = append(destination, r)
			}
		}
		if have := len(source) + len(destination); have >= n {
			return source, destination
		} else if time.Now().After(deadline) {
			t.Fatalf("the audit has %d ended records, want %d", have, n)
		}
		time.Sleep(300 * time.Millisecond)
	}
}

// attribution joins the audit with what clients and server saw, and fails for
// every connection that a side attributes to the wrong workload. ids are the
// pods' SPIFFE IDs.
func (c *crowd) attribution(t *testing.T, source, destination []audit.Record, ids map[string]string) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	sender := map[uint64]string{} // number -> pod
	for _, calls := range c.sent {
		for _, one := range calls {
			sender[one.number] = one.pod
		}
	}
	var wrong []string
	join := func(side string, records []audit.Record, seen map[string][]call, address func(*audit.Record) string) {
		byAddress := map[string][]*audit.Record{}
		for i := range records {
			a := address(&records[i])
			byAddress[a] = append(byAddress[a], &records[i])
		}
		matched := 0
		for a, calls := range seen {
			recs := byAddress[a]
			if len(recs) != len(calls) {
				wrong = append(wrong, fmt.Sprintf("%s: %d records for the %d connections of %s", side, len(recs), len(calls), a))
				continue
			}
			// Connections of one address follow each other.
			for i, one := range calls {
				if want := ids[sender[one.number]]; recs[i].Source.ID != want {
					wrong = append(wrong, fmt.Sprintf("%s: connection %d of %s was attributed to %s", side, one.number, want, recs[i].Source.ID))
				}
				matched++
			}
		}
		t.Logf("%s: %d records joined to connections", side, matched)
	}
	join("source", source, c.sent, func(r *audit.Record) string { return r.Source.Address })
	join("destination", destination, c.accepted, func(r *audit.Record) string { return r.Destination.Via })
	if len(wrong) > 0 {
		t.Errorf("%d wrong attributions; the first:\n%s", len(wrong), strings.Join(wrong[:min(5, len(wrong))], "\n"))
	}
}

// tunnels counts the tunnels that carried connections, by identity.
func tunnels(destination []audit.Record) map[string]int {
	seen, out := map[string]bool{}, map[string]int{}
	for i := range destination {
		r := &destination[i]
		if r.Transport == "mtls" && !seen[r.Source.Address] {
			seen[r.Source.Address] = true
			out[r.Source.ID]++
		}
	}
	return out
}

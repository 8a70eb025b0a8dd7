package e2e

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

const (
	rotationTTL  = 10 * time.Second // renewed every 5 s
	rotationTime = time.Minute
	rotationRate = 200 // short connections a second
)

// rotating starts a mesh of two clients and a server whose certificates live
// for a while; a fourth pod is no part of it.
func rotating(t *testing.T, ttl time.Duration) *harness.Mesh {
	t.Helper()
	m := harness.Start(t, harness.Options{
		Pods: map[string]string{"red": "10.88.0.10", "blue": "10.88.0.11", "server": "10.88.0.12", "stranger": "10.88.0.20"},
		Documents: map[string]string{"mesh.yaml": harness.Config(ttl.String()) + harness.Namespace("shop", "enforce") +
			harness.Workload("shop", "red", "10.88.0.10") + harness.Workload("shop", "blue", "10.88.0.11") +
			harness.Workload("shop", "server", "10.88.0.12") +
			harness.Allow("shop", "allow", "server", []int{8080}, "red", "blue")},
	})
	serve(t, m.Pod("server"), ":8080", echo)
	return m
}

// observeSerials notes each serial number that the agent holds, by identity,
// until ctx ends. It closes ready once it has looked.
func observeSerials(ctx context.Context, m *harness.Mesh, ready chan<- struct{}) map[string]map[string]bool {
	seen := map[string]map[string]bool{}
	for {
		if certs, err := m.Client.Certificates(ctx); err == nil {
			for _, c := range certs {
				if c.Holder == "node" || c.Serial == "" {
					continue
				}
				if seen[c.ID] == nil {
					seen[c.ID] = map[string]bool{}
				}
				seen[c.ID][c.Serial] = true
			}
		}
		if ready != nil {
			close(ready)
			ready = nil
		}
		select {
		case <-ctx.Done():
			return seen
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// TestRotationUnderLoad: certificates of ten seconds are renewed every five,
// for a minute, under a constant load of short connections beside long ones.
// Nothing fails, and no tunnel outlives what it was opened with.
func TestRotationUnderLoad(t *testing.T) {
	m := rotating(t, rotationTTL)
	ctx, cancel := context.WithTimeout(t.Context(), rotationTime)
	defer cancel()
	start := time.Now()
	var wg sync.WaitGroup
	var serials map[string]map[string]bool // owned by the next goroutine until wg.Wait
	ready := make(chan struct{})
	wg.Go(func() { serials = observeSerials(ctx, m, ready) })
	<-ready
	calls := underLoad(ctx, t, m)
	wg.Wait()
	took := time.Since(start)
	for id, s := range serials {
		t.Logf("%s held %d certificates", id, len(s))
		if len(s) < 8 {
			t.Errorf("%s held %d certificates in %s, want at least 8", id, len(s), took)
		}
	}
	if len(serials) != 3 {
		t.Errorf("%d identities held certificates, want 3", len(serials))
	}
	checkTunnels(t, m, calls, serials)
}

// underLoad keeps a constant load of short connections beside long ones on a
// mesh of rotating until ctx ends. Every failure fails the test. It returns the
// number of short connections.
func underLoad(ctx context.Context, t *testing.T, m *harness.Mesh) int {
	t.Helper()
	pods := []*lab.Pod{m.Pod("red"), m.Pod("blue")}
	start := time.Now()
	var wg sync.WaitGroup
	var long []*held
	for i := range 8 {
		long = append(long, hold(t, pods[i%2], serverAt))
	}

	var mu sync.Mutex
	var failures []string // guarded by mu
	fail := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		failures = append(failures, time.Since(start).Round(time.Millisecond).String()+": "+fmt.Sprintf(format, args...))
	}
	var words atomic.Int64
	for i, h := range long {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := h.ping(); err != nil {
					fail("long connection %d: %v", i, err)
					return
				}
				words.Add(1)
				select {
				case <-ctx.Done():
				case <-time.After(100 * time.Millisecond):
				}
			}
		})
	}
	var calls, slowest atomic.Int64
	jobs := make(chan int)
	for range 64 {
		wg.Go(func() {
			for i := range jobs {
				began := time.Now()
				if err := callEcho(t.Context(), pods[i%2], serverAt); err != nil {
					fail("short connection %d: %v", i, err)
				}
				calls.Add(1)
				for took := int64(time.Since(began)); ; {
					old := slowest.Load()
					if took <= old || slowest.CompareAndSwap(old, took) {
						break
					}
				}
			}
		})
	}
	// The load follows the clock: after a stall it catches up.
	for i := 0; ctx.Err() == nil; {
		for due := int(time.Since(start).Seconds() * rotationRate); i < due; i++ {
			jobs <- i
		}
		time.Sleep(time.Second / rotationRate)
	}
	close(jobs)
	wg.Wait()
	took := time.Since(start)
	t.Logf("%d short connections (%.0f a second), the slowest in %s; %d long ones with %d words; %d failures",
		calls.Load(), float64(calls.Load())/took.Seconds(), time.Duration(slowest.Load()).Round(time.Millisecond), len(long), words.Load(), len(failures))
	for _, f := range failures[:min(10, len(failures))] {
		t.Error(f)
	}
	if len(failures) > 0 {
		t.Errorf("%d connections failed, want 0", len(failures))
	}
	return int(calls.Load())
}

// tunnelSpan is what the audit shows of one tunnel.
type tunnelSpan struct {
	id, serial  string
	first, last time.Time // starts of its connections
	streams     int
}

// tunnelSpans groups the destination's records by the tunnel they came
// through; a tunnel is known by its source address and certificate.
func tunnelSpans(t *testing.T, records []audit.Record) map[string]*tunnelSpan {
	t.Helper()
	spans := map[string]*tunnelSpan{}
	for i := range records {
		r := &records[i]
		if r.Side != audit.Destination || r.Verdict != audit.Allowed {
			continue
		}
		key := r.Source.Address + " " + r.Source.Serial
		s := spans[key]
		if s == nil {
			s = &tunnelSpan{id: r.Source.ID, serial: r.Source.Serial, first: r.Start, last: r.Start}
			spans[key] = s
		}
		s.streams++
		if r.Start.Before(s.first) {
			s.first = r.Start
		}
		if r.Start.After(s.last) {
			s.last = r.Start
		}
	}
	return spans
}

// tunnelSlack is how long a tunnel may take new connections beyond half of a
// certificate's life: the notice that it goes is on its way, on a machine that
// may be busy.
const tunnelSlack = rotationTTL / 2

// checkTunnels looks at the audit of a run: which certificates were used, that
// the agent held them, and that no tunnel took new connections for much longer
// than half of their life.
func checkTunnels(t *testing.T, m *harness.Mesh, calls int, held map[string]map[string]bool) {
	t.Helper()
	var records []audit.Record
	m.Eventually(20*time.Second, "the audit to hold every call", func() error {
		records = m.Records(adminclient.AuditQuery{Side: audit.Destination})
		if len(records) < calls {
			return fmt.Errorf("%d records, want %d", len(records), calls)
		}
		return nil
	})
	for i := range records {
		if v := records[i].Verdict; v != audit.Allowed {
			t.Errorf("a %s record: %s", v, records[i].Reason)
			break
		}
	}
	serials, count, longest := map[string]map[string]bool{}, map[string]int{}, time.Duration(0)
	for _, s := range tunnelSpans(t, records) {
		if serials[s.id] == nil {
			serials[s.id] = map[string]bool{}
		}
		serials[s.id][s.serial] = true
		if !held[s.id][s.serial] {
			t.Errorf("%s was proven with certificate %s, which the agent did not hold", s.id, s.serial)
		}
		count[s.id]++
		longest = max(longest, s.last.Sub(s.first))
	}
	for _, id := range slices.Sorted(maps.Keys(serials)) {
		t.Logf("%s was proven with %d certificates, in %d tunnels", id, len(serials[id]), count[id])
		if len(serials[id]) < 8 {
			t.Errorf("the audit has %d certificates of %s, want at least 8", len(serials[id]), id)
		}
	}
	if len(serials) != 2 {
		t.Errorf("the audit has %d callers, want 2", len(serials))
	}
	t.Logf("no tunnel took new connections for longer than %s", longest.Round(time.Millisecond))
	if longest > rotationTTL/2+tunnelSlack {
		t.Errorf("a tunnel took new connections for %s, want about %s", longest, rotationTTL/2)
	}
}

// TestExpiryClosesTheMesh: without a control plane certificates expire, and
// then connections fail. No tunnel is opened with an expired certificate, and one
// that was opened in time takes no new connections after it has expired; what is
// open stays open. When the control plane is back, all works again.
func TestExpiryClosesTheMesh(t *testing.T) {
	m := rotating(t, rotationTTL)
	pods := []*lab.Pod{m.Pod("red"), m.Pod("blue")}
	long := hold(t, pods[0], serverAt)
	control := m.Pid("control")
	resume := func() { _ = syscall.Kill(control, syscall.SIGCONT) } // a program that hangs cannot be stopped in the ordinary way
	t.Cleanup(resume)
	if err := syscall.Kill(control, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	certs, err := m.Client.Certificates(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var expiry time.Time // of the last certificate
	expiries := map[string]time.Time{}
	for _, c := range certs {
		expiries[c.ID] = c.NotAfter
		if c.Holder != "node" && c.NotAfter.After(expiry) {
			expiry = c.NotAfter
		}
	}
	if left := expiry.Sub(stopped); left > rotationTTL || left < 0 {
		t.Fatalf("the certificates expire in %s, want at most %s", left, rotationTTL)
	}
	t.Logf("the last certificate expires %s after the control plane stopped", expiry.Sub(stopped).Round(time.Millisecond))

	// Calls, well beyond the expiry.
	var lastGood, firstBad time.Time
	good, bad := 0, 0
	for i := 0; time.Now().Before(expiry.Add(rotationTTL + rotationTTL/2)); i++ {
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 8*time.Second)
		err := callEcho(ctx, pods[i%2], serverAt)
		cancel()
		if err == nil {
			good++
			lastGood = began
		} else {
			bad++
			if firstBad.IsZero() {
				firstBad = began
				t.Logf("the first call that failed: %v", err)
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Logf("%d calls went well, the last began %s after the expiry; %d failed, the first began %s after it",
		good, lastGood.Sub(expiry).Round(time.Millisecond), bad, firstBad.Sub(expiry).Round(time.Millisecond))
	if good == 0 || bad == 0 {
		t.Errorf("%d calls went well and %d failed, want some of each", good, bad)
	}
	if !firstBad.IsZero() && firstBad.Before(expiry.Add(-rotationTTL/2)) {
		t.Errorf("a call failed %s before the certificates expired", expiry.Sub(firstBad))
	}
	if late := lastGood.Sub(expiry); late > time.Second {
		t.Errorf("a call went well %s after the certificates had expired", late)
	}
	for _, s := range tunnelSpans(t, m.Records(adminclient.AuditQuery{Side: audit.Destination})) {
		if late := s.first.Sub(expiries[s.id]); late > 0 {
			t.Errorf("a tunnel of %s was opened %s after its certificate had expired", s.id, late)
		}
	}
	if err := long.ping(); err != nil {
		t.Errorf("a connection that was open ended: %v", err)
	}
	certs, err = m.Client.Certificates(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range certs {
		if c.Holder != "node" && (c.Serial != "" || c.LastError == "") {
			t.Errorf("the agent still shows a certificate of %s, serial %q, error %q", c.Holder, c.Serial, c.LastError)
		}
	}

	resume()
	resumed := time.Now()
	for _, pod := range pods {
		m.Eventually(60*time.Second, pod.Name+" to work again", func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			return callEcho(ctx, pod, serverAt)
		})
	}
	t.Logf("calls went well again %s after the control plane was back", time.Since(resumed).Round(time.Millisecond))
	if err := long.ping(); err != nil {
		t.Errorf("the connection from before: %v", err)
	}
}

package svid

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// manyIssuer is a control plane that can be asked for many.
type manyIssuer struct {
	*issuer
	took   time.Duration                                           // by a call
	before func(ctx context.Context, asks []Ask) ([]Answer, error) // answers in its place; nil, nil: it does not

	mu      sync.Mutex
	batches [][]Ask // guarded by mu
}

func (m *manyIssuer) IssueMany(ctx context.Context, asks []Ask) ([]Answer, error) {
	m.mu.Lock()
	m.batches = append(m.batches, asks)
	before := m.before
	m.mu.Unlock()
	time.Sleep(m.took)
	if before != nil {
		if answers, err := before(ctx, asks); answers != nil || err != nil {
			return answers, err
		}
	}
	out := make([]Answer, len(asks))
	m.set(func(i *issuer) {
		for n, a := range asks {
			out[n].Chain, out[n].Err = i.issue(a.Workload, a.CSR)
		}
	})
	return out, nil
}

// sizes are how many certificates were asked for in each call.
func (m *manyIssuer) sizes() (out []int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range m.batches {
		out = append(out, len(b))
	}
	return out
}

func startMany(t *testing.T, m *manyIssuer, names ...string) *node {
	t.Helper()
	n := prepare(t, m.issuer, Config{})
	n.Manager = New(Config{Issuer: m, Log: slog.New(slog.NewTextHandler(n.log, nil)), Jitter: func() float64 { return 0.5 }})
	n.state = State{TrustDomain: td, Bundle: []*x509.Certificate{m.root}, Workloads: m.workloads(names...), TTL: m.ttl}
	n.Update(n.state)
	n.run()
	return n
}

func names(count int) (out []string) {
	for i := range count {
		out = append(out, fmt.Sprintf("w%d", i))
	}
	return out
}

// What is due at the same time is asked for in few calls, none larger than it may be,
// and each identity has its own certificate.
func TestCollect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &manyIssuer{issuer: newIssuer(t, time.Hour), took: 5 * time.Millisecond}
		n := startMany(t, m, names(100)...)
		defer n.stop()
		time.Sleep(time.Second)
		synctest.Wait()
		for _, name := range names(100) {
			n.must(name)
		}
		sizes := m.sizes()
		if slices.Max(sizes) > collectMost || len(sizes) > 12 || m.count() > 3 {
			t.Errorf("%d calls for one and calls for %v; want few", m.count(), sizes)
		}
		// All are due again at once: at half of their life.
		time.Sleep(31 * time.Minute)
		synctest.Wait()
		if again := m.sizes()[len(sizes):]; slices.Max(again) > collectMost || len(again) > 12 {
			t.Errorf("renewed by calls for %v", again)
		}
	})
}

// Defends: a pod that starts alone waits for no other.
func TestCollectNotForOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &manyIssuer{issuer: newIssuer(t, time.Hour)}
		began := time.Now()
		n := startMany(t, m, "web")
		defer n.stop()
		synctest.Wait()
		n.must("web")
		time.Sleep(2 * collectQuiet)
		n.state.Workloads = m.workloads("web", "db")
		n.Update(n.state)
		synctest.Wait()
		n.must("db")
		if waited := time.Since(began) - 2*collectQuiet; waited != 0 || len(m.sizes()) != 0 {
			t.Errorf("waited %s, calls for %v", waited, m.sizes())
		}
		// Soon after another it waits, but hardly.
		n.state.Workloads = m.workloads("web", "db", "mail")
		n.Update(n.state)
		time.Sleep(collectFor)
		synctest.Wait()
		n.must("mail")
		if len(m.sizes()) != 0 {
			t.Errorf("calls for %v; one is asked for by Issue", m.sizes())
		}
	})
}

// An older control plane knows no such call: it is asked one by one, at once, and
// asked anew after a minute.
func TestCollectOlderControlPlane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &manyIssuer{issuer: newIssuer(t, time.Hour)}
		m.before = func(context.Context, []Ask) ([]Answer, error) { return nil, fmt.Errorf("wrapped: %w", ErrSingly) }
		n := startMany(t, m, names(100)...)
		defer n.stop()
		time.Sleep(time.Second)
		synctest.Wait()
		for _, name := range names(100) {
			n.must(name)
		}
		if got := len(m.sizes()); got > 3 || m.count() != 100 {
			t.Errorf("%d calls for many, %d for one; want one or two, and 100", got, m.count())
		}
		m.mu.Lock()
		m.before, m.batches = nil, nil // it was updated
		m.mu.Unlock()
		time.Sleep(31 * time.Minute)
		synctest.Wait()
		if len(m.sizes()) == 0 {
			t.Error("never asked for many again")
		}
	})
}

// Each answer of a batch is its identity's own: what is refused is asked for again by
// itself, and what is to be asked for singly is.
func TestCollectPartly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &manyIssuer{issuer: newIssuer(t, time.Hour)}
		m.before = func(_ context.Context, asks []Ask) ([]Answer, error) {
			out := make([]Answer, len(asks))
			m.set(func(i *issuer) {
				for n, a := range asks {
					switch a.Workload {
					case "default/bad":
						out[n].Err = errors.New("no such pod")
					case "default/alone":
						out[n].Err = ErrSingly
					default:
						out[n].Chain, out[n].Err = i.issue(a.Workload, a.CSR)
					}
				}
			})
			return out, nil
		}
		m.issuer.before = func(_ context.Context, w string) error {
			if w == "default/bad" {
				return errors.New("no such pod")
			}
			return nil
		}
		n := startMany(t, m, append(names(10), "bad", "alone")...)
		defer n.stop()
		time.Sleep(50 * time.Millisecond)
		synctest.Wait()
		for _, name := range append(names(10), "alone") {
			n.must(name)
		}
		if why := n.Missing()[sa("bad")]; len(n.Missing()) != 1 || why == "" {
			t.Errorf("missing %v", n.Missing())
		}
	})
}

// Defends: what a batch answers is believed no more than what one is answered.
func TestCollectIsNotBelieved(t *testing.T) {
	for name, spoil := range map[string]func([]Answer) []Answer{
		"too few":       func(a []Answer) []Answer { return a[1:] },
		"too many":      func(a []Answer) []Answer { return append(a, Answer{}) },
		"none":          func([]Answer) []Answer { return []Answer{} },
		"empty":         func(a []Answer) []Answer { return make([]Answer, len(a)) },
		"another order": func(a []Answer) []Answer { slices.Reverse(a); return a },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := &manyIssuer{issuer: newIssuer(t, time.Hour)}
				n := startMany(t, m, "first")
				defer n.stop()
				synctest.Wait()
				m.before = func(_ context.Context, asks []Ask) ([]Answer, error) {
					out := make([]Answer, len(asks))
					m.set(func(i *issuer) {
						for n, a := range asks {
							out[n].Chain, out[n].Err = i.issue(a.Workload, a.CSR)
						}
					})
					return spoil(out), nil
				}
				n.state.Workloads = m.workloads("first", "a", "b", "c", "d")
				n.Update(n.state)
				time.Sleep(collectFor)
				synctest.Wait()
				if got := len(n.All()); got != 1 || len(m.sizes()) != 1 {
					t.Errorf("%d certificates after calls for %v; want the one from before", got, m.sizes())
				}
			})
		})
	}
}

// Defends: a batch goes on for the others when one of them is no longer wanted,
// also when that one began it: which does is chance.
func TestCollectOneLeaves(t *testing.T) {
	for range 25 {
		synctest.Test(t, func(t *testing.T) {
			m := &manyIssuer{issuer: newIssuer(t, time.Hour)}
			n := startMany(t, m, "first")
			defer n.stop()
			synctest.Wait()
			release := make(chan struct{})
			m.before = func(ctx context.Context, _ []Ask) ([]Answer, error) {
				select {
				case <-ctx.Done():
					return nil, ctx.Err()
				case <-release:
					return nil, nil
				}
			}
			n.state.Workloads = m.workloads("first", "a", "b", "c")
			n.Update(n.state)
			time.Sleep(2 * collectFor)
			rest := slices.DeleteFunc([]string{"first", "a", "b", "c"}, func(name string) bool { return name == "a" })
			n.state.Workloads = m.workloads(rest...)
			n.Update(n.state)
			synctest.Wait()
			close(release)
			synctest.Wait()
			for _, name := range rest {
				n.must(name)
			}
			if len(n.All()) != 3 || len(m.sizes()) != 1 {
				t.Errorf("%d certificates after calls for %v", len(n.All()), m.sizes())
			}
		})
	}
}

// Defends: a call ends when nobody waits for it: the agent's end does not wait for a
// control plane that hangs.
func TestCollectAbandoned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &manyIssuer{issuer: newIssuer(t, time.Hour)}
		n := startMany(t, m, "first")
		synctest.Wait()
		m.before = func(ctx context.Context, _ []Ask) ([]Answer, error) { <-ctx.Done(); return nil, ctx.Err() }
		n.state.Workloads = m.workloads("first", "d", "e")
		n.Update(n.state)
		time.Sleep(2 * collectFor)
		began := time.Now()
		n.stop() // it returns, and nothing of it is left
		if took := time.Since(began); took != 0 || len(m.sizes()) != 1 {
			t.Errorf("the end waited %s for calls for %v", took, m.sizes())
		}
	})
}

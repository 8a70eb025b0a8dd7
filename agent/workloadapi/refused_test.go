package workloadapi

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"

	"github.com/signet-mesh/signet/agent/attest"
	"github.com/signet-mesh/signet/agent/refusal"
	"github.com/signet-mesh/signet/internal/mesh"
)

// refusals keeps what the server tells.
type refusals struct {
	mu  sync.Mutex
	all []refusal.Refusal // guarded by mu
}

func (r *refusals) add(one refusal.Refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, one)
}

// take returns what was told since the last time.
func (r *refusals) take() []refusal.Refusal {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := r.all
	r.all = nil
	return out
}

func (r *refusals) told() []refusal.Refusal {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.all)
}

// Defends: whoever gets no identity is told of, once for each call, with the
// process, what it asked for, and the reason that the answer keeps from it.
func TestRefusalsAreTold(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	web, other := rule{"web", "web", self(t)}, rule{"other", "other", mesh.Attest{UID: ptr(1234)}}
	a := startAgent(t, nil, web, other)
	c := a.client()
	told := func(kind refusal.Kind, call, id, reason string) {
		t.Helper()
		got := a.refused.take()
		if len(got) != 1 {
			t.Fatalf("%d refusals were told, want one: %+v", len(got), got)
		}
		r := got[0]
		if r.Kind != kind || r.Call != call || r.ID != id || !strings.Contains(r.Reason, reason) {
			t.Errorf("%+v; want %s of %s for %q with %q", r, kind, call, id, reason)
		}
		if r.Caller.PID != os.Getpid() || r.Caller.UID == nil || *r.Caller.UID != uint32(os.Getuid()) || r.Caller.Executable != exe {
			t.Errorf("the caller is %+v", r.Caller)
		}
	}
	// What is given is not told, nor what is wrong with a request.
	if _, err := a.fetch("", "ledger"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.validate("x.y.z", "ledger"); err == nil {
		t.Fatal("a token that is none is good")
	}
	if got := a.refused.take(); len(got) != 0 {
		t.Errorf("told %+v", got)
	}

	_, _ = c.FetchJWTSVID(context.Background(), &workload.JWTSVIDRequest{Audience: []string{"x"}})
	told(refusal.Header, "FetchJWTSVID", "", header)
	_, _ = a.fetch(sa("other").String(), "ledger")
	told(refusal.NotItsOwn, "FetchJWTSVID", sa("other").String(), "not an identity")
	a.issuer.set(func(i *issuer) { i.refuse = errors.New("the secret reason") })
	_, _ = a.fetch("", "bank")
	told(refusal.NoSVID, "FetchJWTSVID", sa("web").String(), "the secret reason")
	a.cutOff = sa("web")
	a.set(web, other)
	_, _ = a.fetch("", "ledger")
	told(refusal.Quarantined, "FetchJWTSVID", sa("web").String(), "quarantined")

	a.set(other)
	_, _ = a.fetch("", "ledger")
	told(refusal.Stranger, "FetchJWTSVID", "", "uid: want 1234")
	_, _ = a.validate("x.y.z", "ledger")
	told(refusal.Stranger, "ValidateJWTSVID", "", "uid: want 1234")
	_, _ = a.bundles().Recv()
	told(refusal.Stranger, "FetchJWTBundles", "", "uid: want 1234")
	_, _ = a.stream().Recv()
	told(refusal.Stranger, "FetchX509SVID", "", "uid: want 1234")
}

// Defends: a user who is refused for what it has open is told of.
func TestBoundsAreTold(t *testing.T) {
	a := startAgent(t, func(a *agent) { a.perUID = 2 }, rule{"web", "web", self(t)})
	c := a.client()
	for range 2 {
		s, err := c.FetchX509SVID(call(t), &workload.X509SVIDRequest{})
		if err != nil {
			t.Fatal(err)
		}
		recv(t, s)
	}
	if s, err := c.FetchX509SVID(call(t), &workload.X509SVIDRequest{}); err == nil {
		_, _ = s.Recv()
	}
	for range 2 {
		conn, err := net.Dial("unix", a.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		time.Sleep(50 * time.Millisecond) // until the server has taken it
	}
	for range 200 {
		var calls []string
		for _, r := range a.refused.told() {
			if r.Kind != refusal.Limit || r.Caller.PID != os.Getpid() {
				t.Fatalf("%+v", r)
			}
			calls = append(calls, r.Call)
		}
		if slices.Equal(calls, []string{"FetchX509SVID", "connect"}) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("told %+v", a.refused.take())
}

// A caller of whom there is no process is told of with what the kernel says.
func TestUnidentified(t *testing.T) {
	r := unidentified("connect", &attest.PeerError{PID: 7, UID: 1234, Err: attest.ErrGone})
	if r.Kind != refusal.Unidentified || r.Caller.PID != 7 || r.Caller.UID == nil || *r.Caller.UID != 1234 || r.Reason != attest.ErrGone.Error() {
		t.Errorf("%+v", r)
	}
	if r := unidentified("connect", errors.New("no")); r.Caller.UID != nil || r.Caller.PID != 0 {
		t.Errorf("%+v", r)
	}
}

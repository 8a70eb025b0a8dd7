package sdkapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/agent/attest"
	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/refusal"
	sdkv1 "github.com/signet-mesh/signet/api/sdk/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// attestor answers what it is told to.
type attestor struct {
	changed chan struct{} // a test sends on it
	asked   func()        // before each answer; nil: nothing

	mu  sync.Mutex
	err error // guarded by mu
}

func (a *attestor) fail(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.err = err
}

func (a *attestor) Attest(ctx context.Context, p *attest.Process) ([]mesh.Workload, error) {
	if a.asked != nil {
		a.asked()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil {
		return nil, a.err
	}
	return everyone{}.Attest(ctx, p)
}

func (a *attestor) Changed() <-chan struct{} { return a.changed }

func nobodysProcess(context.Context) (*attest.Process, error) { return nil, nil }

// watching is the agent's end of a Watch. Its calls are the server's, one after
// the other.
type watching struct {
	grpc.ServerStream
	ctx  context.Context
	sent chan *sdkv1.Rules
	err  error
}

func (w *watching) Context() context.Context { return w.ctx }
func (w *watching) Send(r *sdkv1.Rules) error {
	if w.err == nil {
		w.sent <- r
	}
	return w.err
}

// watcher is a server with all that Watch needs, whose parts a test replaces.
func watcher(t *testing.T) (*Server, *attestor, *watching, *[]refusal.Refusal) {
	t.Helper()
	a := &attestor{changed: make(chan struct{})}
	var refused []refusal.Refusal
	s := New(Config{
		Attestor: a, Caller: nobodysProcess,
		Rules: func() (Rules, bool) { return rules(mesh.ModeEnforce), true }, Stopping: make(chan struct{}),
		Refused: func(r refusal.Refusal) { refused = append(refused, r) }, Store: newStore(t), Log: slog.New(slog.DiscardHandler),
	})
	return s, a, &watching{ctx: t.Context(), sent: make(chan *sdkv1.Rules, 8)}, &refused
}

func rules(mode mesh.Mode) Rules {
	return Rules{TrustDomain: td, Model: authz.NewModel(nil), Mode: func(string) mesh.Mode { return mode }}
}

func watch(session int) *sdkv1.WatchRequest {
	return &sdkv1.WatchRequest{SpiffeId: web.String(), Session: make([]byte, session)}
}

// Defends: who is nobody, or not who it says, is told no rules and nothing is taken
// from it, by either call. What differed is for the operator: the caller would learn
// the rules from it. That the agent does not know yet is no refusal of anybody.
func TestRefusedCallers(t *testing.T) {
	const secret = "uid: want 4711, is 0"
	for name, c := range map[string]struct {
		change func(*Server, *attestor, context.CancelFunc)
		id     string
		code   codes.Code
		say    string
		kind   refusal.Kind // empty: nobody was refused an identity
	}{
		"the kernel does not say who": {
			change: func(s *Server, _ *attestor, _ context.CancelFunc) {
				s.cfg.Caller = func(context.Context) (*attest.Process, error) { return nil, errors.New("no process") }
			}, code: codes.PermissionDenied, say: "no process",
		},
		"no state": {
			change: func(s *Server, _ *attestor, _ context.CancelFunc) {
				s.cfg.Rules = func() (Rules, bool) { return rules(mesh.ModeEnforce), false }
			}, code: codes.Unavailable, say: "the agent is starting",
		},
		"a stranger": {
			change: func(_ *Server, a *attestor, _ context.CancelFunc) {
				a.fail(fmt.Errorf("%w: %s", attest.ErrStranger, secret))
			},
			code: codes.PermissionDenied, say: "no workload's attest rules match", kind: refusal.Stranger,
		},
		"another program": {
			change: func(_ *Server, a *attestor, _ context.CancelFunc) {
				a.fail(fmt.Errorf("%w: %s", attest.ErrGone, secret))
			},
			code: codes.PermissionDenied, say: "runs another program now", kind: refusal.Gone,
		},
		"another cgroup": {
			change: func(_ *Server, a *attestor, _ context.CancelFunc) {
				a.fail(fmt.Errorf("%w: %s", attest.ErrMoved, secret))
			},
			code: codes.PermissionDenied, say: "no workload's attest rules match", kind: refusal.Moved,
		},
		"another's identity": {
			change: func(*Server, *attestor, context.CancelFunc) {}, id: "spiffe://mesh.test/ns/shop/sa/bank",
			code: codes.PermissionDenied, say: "bank", kind: refusal.NotItsOwn,
		},
		"its identity by half": {
			change: func(*Server, *attestor, context.CancelFunc) {}, id: strings.TrimSuffix(web.String(), "b"),
			code: codes.PermissionDenied, say: "is not", kind: refusal.NotItsOwn,
		},
		"one that has hung up": {
			change: func(_ *Server, a *attestor, cancel context.CancelFunc) { a.asked = cancel; a.fail(attest.ErrGone) },
			code:   codes.Canceled, say: "canceled",
		},
	} {
		for call, do := range map[string]func(context.Context, *Server, *watching, string) error{
			"Report": func(ctx context.Context, s *Server, _ *watching, id string) error {
				req := report(1, good(1))
				req.SpiffeId = id
				_, err := s.Report(ctx, req)
				return err
			},
			"Watch": func(_ context.Context, s *Server, w *watching, id string) error {
				req := watch(sessionBytes)
				req.SpiffeId = id
				return s.Watch(req, w)
			},
		} {
			t.Run(call+"/"+name, func(t *testing.T) {
				s, a, w, refused := watcher(t)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				w.ctx = ctx
				c.change(s, a, cancel)
				id := c.id
				if id == "" {
					id = web.String()
				}
				err := do(ctx, s, w, id)
				if status.Code(err) != c.code || !strings.Contains(err.Error(), c.say) || strings.Contains(err.Error(), "4711") {
					t.Errorf("%v; want %s, %q, and no rule", err, c.code, c.say)
				}
				if len(w.sent) != 0 || len(records(t, s.cfg.Store)) != 0 || len(s.sessions) != 0 {
					t.Errorf("%d messages were sent, and %d sessions are kept", len(w.sent), len(s.sessions))
				}
				switch r := *refused; {
				case c.kind == "" && len(r) != 0, c.kind != "" && len(r) != 1:
					t.Errorf("refused were %+v", r)
				case c.kind != "" && (r[0].Kind != c.kind || r[0].Call != call || r[0].ID != id || r[0].Reason == ""):
					t.Errorf("refused was %+v", r[0])
				}
			})
		}
	}
}

// stream is an open Watch.
type stream struct {
	*watching
	t        *testing.T
	s        *Server
	a        *attestor
	mode     atomic.Int32 // of the namespace
	cancel   context.CancelFunc
	stopping chan struct{}
	ended    chan error
}

func openStream(t *testing.T) (*stream, *[]refusal.Refusal) {
	t.Helper()
	s, a, w, refused := watcher(t)
	o := &stream{watching: w, t: t, s: s, a: a, stopping: make(chan struct{}), ended: make(chan error, 1)}
	w.ctx, o.cancel = context.WithCancel(t.Context())
	o.mode.Store(int32(mesh.ModeObserve))
	s.cfg.Rules = func() (Rules, bool) { return rules(mesh.Mode(o.mode.Load())), true }
	s.cfg.Stopping = o.stopping
	t.Cleanup(o.cancel)
	go func() { o.ended <- s.Watch(watch(sessionBytes), w) }()
	o.hears("observe")
	return o, refused
}

func (o *stream) hears(mode string) {
	o.t.Helper()
	select {
	case r := <-o.sent:
		if r.GetMode() != mode {
			o.t.Errorf("the workload hears %s, want %s", r.GetMode(), mode)
		}
	case <-time.After(10 * time.Second):
		o.t.Fatalf("the workload hears nothing, want %s", mode)
	}
}

// change has the server look again. It is waiting then.
func (o *stream) change() {
	o.t.Helper()
	select {
	case o.a.changed <- struct{}{}:
	case <-time.After(10 * time.Second):
		o.t.Fatal("the server does not wait for changes")
	}
}

// ends wants the stream to be over, without a further message, and its session
// to be nobody's watch.
func (o *stream) ends(code codes.Code) {
	o.t.Helper()
	select {
	case err := <-o.ended:
		if status.Code(err) != code {
			o.t.Errorf("%v, want %s", err, code)
		}
	case <-time.After(10 * time.Second):
		o.t.Fatal("the stream goes on")
	}
	if len(o.sent) != 0 {
		o.t.Errorf("the workload heard %v", <-o.sent)
	}
	for _, open := range o.s.sessions {
		if open.watches != 0 {
			o.t.Errorf("%d watches are counted", open.watches)
		}
	}
}

// Defends: an open stream is attested anew before each message. Who has become
// another program hears nothing of the newer rules. What has not changed is not
// said again.
func TestWatchIsAttestedAgain(t *testing.T) {
	o, refused := openStream(t)
	o.change()
	o.change() // so the first was looked at, and nothing was said
	o.mode.Store(int32(mesh.ModeEnforce))
	o.change()
	o.hears("enforce")
	o.a.fail(fmt.Errorf("%w: it runs another program", attest.ErrGone))
	o.mode.Store(int32(mesh.ModeObserve))
	o.change()
	o.ends(codes.PermissionDenied)
	if len(*refused) != 1 || (*refused)[0].Kind != refusal.Gone {
		t.Errorf("refused were %+v", *refused)
	}
}

// A stream ends with its caller, with the agent, and with its connection; its
// process is no longer taken for one that watches.
func TestWatchEnds(t *testing.T) {
	t.Run("the caller", func(t *testing.T) {
		o, _ := openStream(t)
		o.cancel()
		o.ends(codes.Canceled)
	})
	t.Run("the agent", func(t *testing.T) {
		o, _ := openStream(t)
		close(o.stopping)
		o.ends(codes.Unavailable)
	})
	t.Run("the connection", func(t *testing.T) {
		s, _, w, _ := watcher(t)
		w.err = status.Error(codes.DataLoss, "broken")
		if err := s.Watch(watch(sessionBytes), w); status.Code(err) != codes.DataLoss {
			t.Error(err)
		}
		for _, open := range s.sessions {
			if open.watches != 0 {
				t.Errorf("%d watches are counted", open.watches)
			}
		}
	})
}

// Defends the agent and the audit against what no SDK sends: numbers that no event
// has, sessions that are none, and more events than a workload may cause. Nothing of
// it is stored.
func TestRefusedReports(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*sdkv1.ReportRequest)
		code   codes.Code
		say    string
	}{
		"no number":          {func(r *sdkv1.ReportRequest) { r.First = 0 }, codes.InvalidArgument, "first: 0"},
		"numbers that wrap":  {func(r *sdkv1.ReportRequest) { r.First = math.MaxUint64 }, codes.InvalidArgument, "first: 18446744073709551615"},
		"no session":         {func(r *sdkv1.ReportRequest) { r.Session = nil }, codes.InvalidArgument, "session has 0 bytes"},
		"a short session":    {func(r *sdkv1.ReportRequest) { r.Session = r.Session[1:] }, codes.InvalidArgument, "session has 15 bytes"},
		"a long session":     {func(r *sdkv1.ReportRequest) { r.Session = append(r.Session, 0) }, codes.InvalidArgument, "session has 17 bytes"},
		"one event of two":   {func(r *sdkv1.ReportRequest) { r.Events = append(r.Events, &sdkv1.Event{}) }, codes.InvalidArgument, "events[1]."},
		"an event of nobody": {func(r *sdkv1.ReportRequest) { r.Events = append(r.Events, nil) }, codes.InvalidArgument, "events[1]."},
	} {
		t.Run(name, func(t *testing.T) {
			store := newStore(t)
			req := report(1, good(1))
			c.change(req)
			if _, err := newServer(store).Report(t.Context(), req); status.Code(err) != c.code || !strings.Contains(err.Error(), c.say) {
				t.Errorf("%v; want %s, %q", err, c.code, c.say)
			}
			if n := len(records(t, store)); n != 0 {
				t.Errorf("%d records were stored", n)
			}
		})
	}
	if err := New(Config{Attestor: everyone{}, Caller: nobodysProcess, Rules: func() (Rules, bool) { return rules(mesh.ModeEnforce), true }}).
		Watch(watch(sessionBytes-1), &watching{ctx: t.Context()}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a watch of a short session: %v", err)
	}

	s := newServer(nil) // a store would be slower than the bound
	taken := 0
	var err error
	for i := uint64(0); err == nil && i < 20*eventsAtOnce/MaxEvents; i++ {
		var events []*sdkv1.Event
		for j := range uint64(MaxEvents) {
			events = append(events, good(i*MaxEvents+j+1))
		}
		if _, err = s.Report(t.Context(), report(i*MaxEvents+1, events...)); err == nil {
			taken += MaxEvents
		}
	}
	if status.Code(err) != codes.ResourceExhausted || taken < eventsAtOnce/2 {
		t.Errorf("after %d events: %v; want ResourceExhausted", taken, err)
	}
}

// Defends: what the store does not take is not acknowledged, so that the workload
// keeps it; and what a workload had no room for is missing in the audit, and said.
func TestStoreThatFails(t *testing.T) {
	store := newStore(t)
	s := newServer(store)
	lost := report(2)
	lost.Lost = 3
	if _, err := s.Report(t.Context(), lost); err != nil {
		t.Fatal(err)
	}
	var gaps []audit.Gap
	if err := store.Gaps(t.Context(), func(g audit.Gap) error { gaps = append(gaps, g); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(gaps) != 1 || gaps[0].Count != 3 || !strings.Contains(gaps[0].Reason, "shop/web-1") {
		t.Errorf("the audit knows of %+v", gaps)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	for what, req := range map[string]*sdkv1.ReportRequest{"an event": report(2, good(2)), "a gap": lost} {
		if _, err := s.Report(t.Context(), req); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v, want Unavailable", what, err)
		}
	}
	if _, err := newServer(store).Report(t.Context(), report(1, good(1))); status.Code(err) != codes.Unavailable {
		t.Errorf("when it is not known what is stored: %v, want Unavailable", err)
	}
}

// Without a store reports are judged as ever, and forgotten.
func TestNoStore(t *testing.T) {
	s := newServer(nil)
	lost := report(1, good(1))
	lost.Lost = 1
	if _, err := s.Report(t.Context(), lost); err != nil {
		t.Error(err)
	}
	if _, err := s.Report(t.Context(), report(0, good(1))); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
	var missing map[string]bool
	for range 4 {
		var err error
		if missing, err = s.look(t.Context(), missing); err != nil || len(missing) != 0 {
			t.Fatal(missing, err)
		}
	}
	if len(s.sessions) != 0 {
		t.Errorf("%d sessions are kept", len(s.sessions))
	}
}

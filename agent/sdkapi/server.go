// Package sdkapi serves workloads that decide about their own connections, with
// package sdk: it streams to each of them the rules that protect it, and takes
// its audit events. Who calls is attested as for the Workload API, at every
// message, and nothing that a caller says about who it is is believed.
package sdkapi

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/agent/attest"
	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/refusal"
	sdkv1 "github.com/signet-mesh/signet/api/sdk/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Bounds of what a workload may take up.
const (
	sessionBytes  = 16
	maxSessions   = 64   // of one workload: its processes
	eventsSecond  = 2000 // of one workload
	eventsAtOnce  = 8000
	sessionEvents = 100 // what a new session costs, in events
)

// Attestor tells which workloads a process is; *attest.Attestor implements it.
type Attestor interface {
	Attest(ctx context.Context, p *attest.Process) ([]mesh.Workload, error)
	// Changed returns a channel that is closed when the answer, or the rules,
	// may have become others.
	Changed() <-chan struct{}
}

// Rules is what the node's newest state decides by.
type Rules struct {
	TrustDomain spiffeid.TrustDomain
	Model       *authz.Model
	Mode        func(namespace string) mesh.Mode
	// Refused are certificates that nobody is to take: serial number -> reason.
	Refused map[string]string
}

// Config configures a Server. All fields but Store are required.
type Config struct {
	Attestor Attestor
	// Caller returns the process that a call comes from.
	Caller func(context.Context) (*attest.Process, error)
	// Rules returns false while the node has no state.
	Rules func() (Rules, bool)
	// Store takes what is reported; nil: no audit is kept, and reports are checked
	// and forgotten.
	Store *audit.Store
	// Refused hears of every refusal of an identity, and must not block.
	Refused func(refusal.Refusal)
	// Stopping is closed when open streams are to end.
	Stopping <-chan struct{}
	Log      *slog.Logger
}

// Server implements the service Connections.
type Server struct {
	sdkv1.UnimplementedConnectionsServer
	cfg Config

	mu        sync.Mutex
	sessions  map[sessionKey]*session // guarded by mu
	workloads map[string]*allowance   // guarded by mu; by namespace/name; those that have sessions
}

// sessionKey names a process of a workload. Nobody else's calls have its workload.
type sessionKey struct{ workload, session string }

// session is one process that uses package sdk.
type session struct {
	watches int // open
	missed  int // how often nobody was watching when it was looked

	reporting sync.Mutex
	next      uint64 // guarded by reporting; the first event that has not been stored; 0: not known
}

// allowance is what a workload may still do.
type allowance struct {
	sessions int
	events   *rate.Limiter
}

// New returns a Server.
func New(c Config) *Server {
	return &Server{cfg: c, sessions: map[sessionKey]*session{}, workloads: map[string]*allowance{}}
}

// Register registers the service.
func (s *Server) Register(r grpc.ServiceRegistrar) { sdkv1.RegisterConnectionsServer(r, s) }

// Watch implements the service.
func (s *Server) Watch(req *sdkv1.WatchRequest, stream grpc.ServerStreamingServer[sdkv1.Rules]) error {
	ctx := stream.Context()
	p, err := s.cfg.Caller(ctx)
	if err != nil {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	var last *sdkv1.Rules
	for {
		changed := s.cfg.Attestor.Changed()
		rules, known := s.cfg.Rules()
		if !known {
			return status.Error(codes.Unavailable, "the agent is starting: it knows no policies yet")
		}
		w, err := s.attest(ctx, "Watch", p, req.GetSpiffeId())
		if err != nil {
			return err
		}
		if last == nil {
			open, _, err := s.session(w.Key(), req.GetSession(), 1)
			if err != nil {
				return err
			}
			defer s.unwatch(open)
		}
		if msg := message(rules, w); last == nil || !proto.Equal(last, msg) {
			if err := stream.Send(msg); err != nil {
				return err
			}
			last = msg
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-s.cfg.Stopping:
			return status.Error(codes.Unavailable, "the agent is shutting down")
		case <-changed:
		}
	}
}

// attest returns the caller's workload that has the identity, the first by name
// if several have. The error is a gRPC status.
func (s *Server) attest(ctx context.Context, call string, p *attest.Process, id string) (*mesh.Workload, error) {
	workloads, err := s.cfg.Attestor.Attest(ctx, p)
	if ctx.Err() != nil {
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	refused := func(kind refusal.Kind, reason string) {
		s.cfg.Refused(refusal.Refusal{Kind: kind, Call: call, ID: id, Caller: refusal.Of(p), Reason: reason})
	}
	if err != nil {
		refused(refusal.KindOf(err), err.Error())
	}
	switch {
	case errors.Is(err, attest.ErrGone):
		return nil, status.Error(codes.PermissionDenied, "the process that connected has exited or runs another program now")
	case err != nil: // what differed would tell the rules
		return nil, status.Error(codes.PermissionDenied, "no workload's attest rules match the calling process; the agent's log says more")
	}
	i := slices.IndexFunc(workloads, func(w mesh.Workload) bool { return w.ID.String() == id })
	if i < 0 {
		refused(refusal.NotItsOwn, "it is not an identity of the calling process")
		return nil, status.Errorf(codes.PermissionDenied, "the calling process is not %.256q", id)
	}
	return &workloads[i], nil
}

// message is the rules for a workload, and nothing about how others are
// protected. Whoever is cut off concerns everybody: it may call anybody.
func message(r Rules, w *mesh.Workload) *sdkv1.Rules {
	out := &sdkv1.Rules{
		TrustDomain: r.TrustDomain.Name(), Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, Mode: r.Mode(w.Namespace).String(),
	}
	for _, p := range r.Model.Policies() {
		if p.Namespace != w.Namespace || p.TargetServiceAccount != "" && p.TargetServiceAccount != w.ServiceAccount {
			continue
		}
		m := &sdkv1.Policy{Namespace: p.Namespace, Name: p.Name, TargetServiceAccount: p.TargetServiceAccount, Terminate: p.Terminate, Originate: p.Originate, Alpn: p.ALPN}
		for _, port := range p.Ports {
			m.Ports = append(m.Ports, uint32(port))
		}
		for _, from := range p.From {
			m.From = append(m.From, from.String())
		}
		out.Policies = append(out.Policies, m)
	}
	for _, q := range r.Model.Quarantines() {
		if len(q.Identities) == 0 {
			continue
		}
		m := &sdkv1.Quarantined{Name: q.Name}
		for _, p := range q.Identities {
			m.Identities = append(m.Identities, p.String())
		}
		out.Quarantined = append(out.Quarantined, m)
	}
	for _, serial := range slices.Sorted(maps.Keys(r.Refused)) {
		out.Revoked = append(out.Revoked, &sdkv1.Revoked{Serial: serial, Reason: r.Refused[serial]})
	}
	return out
}

// session returns a workload's session, a new one if need be, with more watches.
func (s *Server) session(workload string, id []byte, watches int) (*session, *allowance, error) {
	if len(id) != sessionBytes {
		return nil, nil, status.Errorf(codes.InvalidArgument, "session has %d bytes; want %d random ones", len(id), sessionBytes)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.workloads[workload]
	if a == nil {
		a = &allowance{events: rate.NewLimiter(eventsSecond, eventsAtOnce)}
		s.workloads[workload] = a
	}
	key := sessionKey{workload, string(id)}
	open := s.sessions[key]
	if open == nil {
		if a.sessions >= maxSessions || !a.events.AllowN(time.Now(), sessionEvents) {
			return nil, nil, status.Errorf(codes.ResourceExhausted, "%s has %d sessions, or began too many; use one for each process", workload, a.sessions)
		}
		open = &session{}
		s.sessions[key] = open
		a.sessions++
	}
	open.watches += watches
	open.missed = 0
	return open, a, nil
}

func (s *Server) unwatch(open *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	open.watches--
}

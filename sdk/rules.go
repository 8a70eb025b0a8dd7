package sdk

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	sdkv1 "github.com/signet-mesh/signet/api/sdk/v1"
	"github.com/signet-mesh/signet/authz"
)

// rules decide about connections. Immutable.
type rules struct {
	model    *authz.Model
	td       spiffeid.TrustDomain
	self     authz.Target
	enforce  bool
	revision string
	revoked  map[string]string // serial number -> reason
}

// verdict is what happened to a connection, as the audit has it.
type verdict string

const (
	allowed  verdict = "allowed"
	denied   verdict = "denied"
	observed verdict = "observed" // let through in a namespace that is only observed
	failed   verdict = "failed"   // neither: the peer was not reachable, or not who it had to be
)

// decision is what becomes of a connection.
type decision struct {
	verdict  verdict
	reason   string
	policy   string
	revision string
}

func (d decision) refuses() bool { return d.verdict == denied }

// parse checks what the agent says; rules that make no sense are not taken.
func parse(r *sdkv1.Rules) (*rules, error) {
	td, err := spiffeid.TrustDomainFromString(r.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	out := &rules{td: td, self: authz.Target{Namespace: r.GetNamespace(), ServiceAccount: r.GetServiceAccount()}, enforce: r.GetMode() != "observe"}
	out.revoked = make(map[string]string, len(r.GetRevoked()))
	for _, c := range r.GetRevoked() {
		out.revoked[c.GetSerial()] = c.GetReason()
	}
	var policies []authz.Policy
	for _, p := range r.GetPolicies() {
		policy := authz.Policy{Namespace: p.GetNamespace(), Name: p.GetName(), TargetServiceAccount: p.GetTargetServiceAccount(), Terminate: p.GetTerminate(), Originate: p.GetOriginate(), ALPN: p.GetAlpn()}
		for _, port := range p.GetPorts() {
			if port == 0 || port > 65535 {
				return nil, fmt.Errorf("policy %s: port %d", policy.Key(), port)
			}
			policy.Ports = append(policy.Ports, uint16(port))
		}
		if policy.From, err = patterns(p.GetFrom()); err != nil {
			return nil, fmt.Errorf("policy %s: %w", policy.Key(), err)
		}
		policies = append(policies, policy)
	}
	var quarantines []authz.Quarantine
	for _, q := range r.GetQuarantined() {
		identities, err := patterns(q.GetIdentities())
		if err != nil {
			return nil, fmt.Errorf("quarantine %q: %w", q.GetName(), err)
		}
		quarantines = append(quarantines, authz.Quarantine{Name: q.GetName(), Identities: identities})
	}
	out.model = authz.NewModel(policies).WithQuarantines(td, quarantines)
	out.revision = out.model.Version(out.self)
	return out, nil
}

func patterns(texts []string) (out []authz.Pattern, err error) {
	for _, text := range texts {
		p, err := authz.ParsePattern(text)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// inbound decides about a caller.
func (r *rules) inbound(from spiffeid.ID, port uint16) decision {
	d := r.model.Decide(authz.Request{From: from, Target: r.self, Port: port})
	switch {
	case d.Verdict == authz.Allow:
		return decision{allowed, d.Reason, d.Policy, r.revision}
	case !r.enforce && d.Quarantine == "":
		return decision{observed, d.Reason, "", r.revision}
	}
	return decision{denied, d.Reason, "", r.revision}
}

// outbound decides about a call. Policies are the destination's business;
// whoever is cut off neither calls nor is called. to is zero while nobody has
// proved anything.
func (r *rules) outbound(self, to spiffeid.ID) decision {
	if name, cut := r.model.Quarantined(self); cut {
		return decision{verdict: denied, reason: authz.CallerCutOff(name, self.String())}
	}
	if name, cut := r.model.Quarantined(to); cut && !to.IsZero() {
		reason := fmt.Sprintf("quarantined by %q: target %s is cut off", name, to)
		if at := strings.Split(to.Path(), "/"); to.MemberOf(r.td) && len(at) == 5 && at[1] == "ns" && at[3] == "sa" {
			reason = r.model.DenyReason(authz.Target{Namespace: at[2], ServiceAccount: at[4]})
		}
		return decision{verdict: denied, reason: reason}
	}
	return decision{verdict: allowed, reason: "accepted by the destination"}
}

// now returns the rules in force; without any, the decision that refuses.
func (m *Mesh) now() (*rules, decision) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.rules == nil {
		return nil, decision{verdict: denied, reason: m.why}
	}
	return m.rules, decision{}
}

// decide decides about a caller, or about a call. serial is of the certificate
// that the peer has shown; empty: none yet.
func (m *Mesh) decide(accepted bool, peer spiffeid.ID, serial string, port uint16) decision {
	r, none := m.now()
	if r == nil {
		return none
	}
	why, revoked := r.revoked[serial]
	switch {
	case revoked && accepted:
		return decision{denied, authz.CallerRevoked + ": " + why, "", r.revision}
	case revoked:
		return decision{denied, "the target's certificate is revoked: " + why, "", r.revision}
	case accepted:
		return r.inbound(peer, port)
	}
	return r.outbound(m.id, peer)
}

// follow keeps the rules up to date until ctx ends. While the agent is away the
// last ones stay in force, as the agent's own do while the control plane is.
func (m *Mesh) follow(ctx context.Context) {
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		got, err := m.watch(ctx)
		if ctx.Err() != nil {
			return
		}
		if got {
			wait = 50 * time.Millisecond
		}
		if status.Code(err) == codes.PermissionDenied {
			// It is not the agent that is away: this is not the workload any more.
			m.take(nil, fmt.Sprintf("default deny: the agent does not say that this process is %s: %s", m.id, status.Convert(err).Message()))
		} else {
			m.mu.Lock()
			if m.rules == nil {
				m.why = "default deny: no policy is in force yet: " + status.Convert(err).Message()
			}
			m.mu.Unlock()
		}
		m.log.Warn("no news of policies from the agent; the last known stay in force", "error", err, "retry", wait)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// watch takes what the agent streams, and reports whether there was anything.
func (m *Mesh) watch(ctx context.Context) (got bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := m.client.Watch(outgoing(ctx), &sdkv1.WatchRequest{SpiffeId: m.id.String(), Session: m.session})
	if err != nil {
		return false, err
	}
	for {
		msg, err := stream.Recv()
		if err != nil {
			return got, err
		}
		r, err := parse(msg)
		if err != nil {
			return got, fmt.Errorf("rules that make no sense were not taken: %w", err)
		}
		m.take(r, "")
		if !got {
			got = true
			m.log.Info("policies in force", "identity", m.id, "revision", r.revision)
		}
	}
}

// outgoing has the metadata that the socket asks for.
func outgoing(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// take puts rules into force, and ends the connections that they refuse.
func (m *Mesh) take(r *rules, why string) {
	m.mu.Lock()
	m.rules, m.why = r, why
	if r != nil {
		select {
		case <-m.first:
		default:
			close(m.first)
		}
	}
	open := m.conns()
	m.mu.Unlock()
	for _, c := range open {
		_ = c.judge() // the connection says so itself
	}
}

package agent

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/bundle"
	"github.com/signet-mesh/signet/internal/mesh"
	"github.com/signet-mesh/signet/internal/wholefile"
)

// nodeState is the control plane's view of this node, parsed. Immutable.
type nodeState struct {
	revision    string
	xdsVersion  string
	trustDomain spiffeid.TrustDomain
	bundle      []*x509.Certificate
	distrusted  []ca.Fingerprint            // roots that were ever distrusted
	revoked     map[string]revokedCert      // by serial number
	jwtKeys     map[string]crypto.PublicKey // by kid
	foreign     []*bundle.Bundle            // of other trust domains, sorted by name
	ttl         time.Duration
	keyType     mesh.KeyType
	workloads   []mesh.Workload
	modes       map[string]mesh.Mode // by namespace
	model       *authz.Model
	identities  []spiffeid.ID   // see mesh.View
	enrolled    map[string]bool // every namespace of the mesh that takes part
	excluded    map[string]bool // UIDs of pods here that opted out
}

// view is what the node's own configuration is built from.
func (s *nodeState) view() *mesh.View {
	return &mesh.View{
		Revision: s.revision, Model: s.model, Identities: s.identities, Refused: s.refused(),
		State: &mesh.State{
			TrustDomain: s.trustDomain, SVIDTTL: s.ttl, Namespaces: s.modes, Workloads: s.workloads, Federations: s.federations(),
		},
	}
}

// federations are the other trust domains whose names can be proven here.
func (s *nodeState) federations() (out []mesh.Federation) {
	for _, b := range s.foreign {
		if len(b.Roots) > 0 {
			out = append(out, mesh.Federation{TrustDomain: b.TrustDomain})
		}
	}
	return out
}

// parseState checks everything that comes over the wire before any of it is used.
func parseState(m *nodev1.NodeState, node string) (*nodeState, error) {
	td, err := spiffeid.TrustDomainFromString(m.GetTrustDomain())
	if err != nil {
		return nil, err
	}
	s := &nodeState{
		revision: m.GetRevision(), xdsVersion: m.GetXdsVersion(), trustDomain: td,
		ttl: time.Duration(m.GetSvidTtlSeconds()) * time.Second, modes: map[string]mesh.Mode{},
		enrolled: map[string]bool{}, excluded: map[string]bool{},
	}
	var known bool
	if s.keyType, known = mesh.ParseKeyType(m.GetSvidKeyType()); !known {
		return nil, fmt.Errorf("svid_key_type: %q is not one of %s", m.GetSvidKeyType(), mesh.KeyTypes())
	}
	for _, der := range m.GetBundle() {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("bundle: %w", err)
		}
		s.bundle = append(s.bundle, c)
	}
	for _, b := range m.GetDistrusted() {
		if len(b) != len(ca.Fingerprint{}) {
			return nil, fmt.Errorf("distrusted: %d bytes are no SHA-256", len(b))
		}
		s.distrusted = append(s.distrusted, ca.Fingerprint(b))
	}
	if s.revoked, err = parseRevoked(m.GetRevoked()); err != nil {
		return nil, err
	}
	if s.jwtKeys, err = parseJWTKeys(m.GetJwtKeys()); err != nil {
		return nil, err
	}
	if s.foreign, err = parseForeign(td, m.GetForeignBundles()); err != nil {
		return nil, err
	}
	for _, w := range m.GetWorkloads() {
		parsed, mode, err := parseWorkload(w, node)
		if err != nil {
			return nil, fmt.Errorf("workload %s/%s: %w", w.GetNamespace(), w.GetName(), err)
		}
		s.workloads = append(s.workloads, parsed)
		s.modes[parsed.Namespace] = mode
	}
	for _, text := range m.GetIdentities() {
		id, err := spiffeid.FromString(text)
		if err != nil {
			return nil, fmt.Errorf("identities: %w", err)
		}
		s.identities = append(s.identities, id)
	}
	for _, ns := range m.GetEnrolledNamespaces() {
		s.enrolled[ns] = true
	}
	for _, uid := range m.GetExcludedPods() {
		s.excluded[uid] = true
	}
	var policies []authz.Policy
	for _, p := range m.GetPolicies() {
		out := authz.Policy{Namespace: p.GetNamespace(), Name: p.GetName(), TargetServiceAccount: p.GetTargetServiceAccount(), Terminate: p.GetTerminate(), Originate: p.GetOriginate(), ALPN: p.GetAlpn()}
		for _, port := range p.GetPorts() {
			out.Ports = append(out.Ports, uint16(port))
		}
		for _, f := range p.GetFrom() {
			pattern, err := authz.ParsePattern(f)
			if err != nil {
				return nil, fmt.Errorf("policy %s: %w", out.Key(), err)
			}
			out.From = append(out.From, pattern)
		}
		policies = append(policies, out)
	}
	var quarantines []authz.Quarantine
	for _, q := range m.GetQuarantined() {
		out := authz.Quarantine{Name: q.GetName()}
		for _, text := range q.GetIdentities() {
			pattern, err := authz.ParsePattern(text)
			if err != nil {
				return nil, fmt.Errorf("quarantine %q: %w", q.GetName(), err)
			}
			out.Identities = append(out.Identities, pattern)
		}
		quarantines = append(quarantines, out)
	}
	s.model = authz.NewModel(policies).WithQuarantines(td, quarantines)
	return s, nil
}

// parseJWTKeys reads the keys that verify tokens. One that could not is refused
// here, where it is seen, and not at the first token.
func parseJWTKeys(keys []*nodev1.JWTKey) (map[string]crypto.PublicKey, error) {
	out := map[string]crypto.PublicKey{}
	for _, k := range keys {
		id := k.GetKeyId()
		pub, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err != nil {
			return nil, fmt.Errorf("JWT key %.64q: %w", id, err)
		}
		_, isECDSA := pub.(*ecdsa.PublicKey)
		_, twice := out[id]
		if id == "" || twice || !isECDSA {
			return nil, fmt.Errorf("JWT key %.64q: a %T; want ECDSA keys, each with an id of its own", id, pub)
		}
		out[id] = pub
	}
	return out, nil
}

func parseWorkload(w *nodev1.Workload, node string) (mesh.Workload, mesh.Mode, error) {
	out := mesh.Workload{
		Namespace: w.GetNamespace(), Name: w.GetName(), ServiceAccount: w.GetServiceAccount(), Node: node, UID: w.GetUid(), Hint: w.GetHint(),
	}
	mode, ok := mesh.ParseMode(w.GetMode())
	if !ok || mode == mesh.ModeOff {
		return out, 0, fmt.Errorf("mode %q", w.GetMode())
	}
	var err error
	if out.ID, err = spiffeid.FromString(w.GetSpiffeId()); err != nil {
		return out, 0, err
	}
	if a := w.GetAttest(); a != nil {
		out.Attest = &mesh.Attest{UID: a.Uid, Path: a.GetPath(), SHA256: a.GetSha256(), SystemdUnit: a.GetSystemdUnit(), Cgroup: a.GetCgroup(), PodUID: a.GetPodUid()}
	}
	if c := w.GetCapture(); c != nil {
		out.Capture = &mesh.Capture{NetNS: c.GetNetns()}
		for _, s := range c.GetAddresses() {
			addr, err := netip.ParseAddr(s)
			if err != nil {
				return out, 0, err
			}
			out.Capture.Addrs = append(out.Capture.Addrs, addr)
		}
		for _, p := range c.GetProbePorts() {
			if p == 0 || p > 65535 {
				return out, 0, fmt.Errorf("probe port %d", p)
			}
			out.Capture.Probes = append(out.Capture.Probes, uint16(p))
		}
	}
	return out, mode, nil
}

// workload returns the workload with the given key, or nil.
func (s *nodeState) workload(key string) *mesh.Workload {
	for i := range s.workloads {
		if s.workloads[i].Key() == key {
			return &s.workloads[i]
		}
	}
	return nil
}

func (a *agent) stateFile() string { return filepath.Join(a.cfg.StateDir, "state.pb") }

// loadState takes up the state that the last run worked with, so that a
// restart does not depend on the control plane.
func (a *agent) loadState() {
	b, err := os.ReadFile(a.stateFile())
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	var m nodev1.NodeState
	if err == nil {
		err = proto.Unmarshal(b, &m)
	}
	if err == nil {
		err = a.take(&m)
	}
	if err == nil {
		// Should a workload have left meanwhile, its rules must go.
		for i := range a.state.workloads {
			if w := &a.state.workloads[i]; w.Capture != nil && w.Capture.NetNS != "" {
				a.rules.applied[w.Capture.NetNS] = ruled{state: captures, home: w.Namespace}
			}
		}
		for _, path := range a.pods.pinned() { // also those that left just before
			if a.rules.get(path) == noRules {
				a.rules.applied[path] = ruled{state: captures}
			}
		}
	}
	if err != nil {
		a.log.Warn("the last known state is not usable; waiting for the control plane", "error", err)
	}
}

// take puts a state into force.
func (a *agent) take(m *nodev1.NodeState) error {
	s, err := parseState(m, a.cfg.Node)
	if err != nil {
		return err
	}
	// The proxy is given what follows from the state before anybody can see the
	// state, or its revision would be called in force while the proxy still has
	// the policies of the one before.
	a.giving.Lock()
	s.workloads = a.pods.place(context.Background(), s.workloads)
	a.live.revoke(s) // before the proxy refuses a certificate, so that its holder opens new tunnels with another
	a.give(s)
	a.mu.Lock()
	a.state = s
	a.mu.Unlock()
	a.giving.Unlock()
	a.live.update(s)
	a.attestor.SetWorkloads(s.workloads) // first: who lost an identity hears so, and not of a certificate
	a.svids.Update(svidState(s))
	a.ready.Store(true)
	a.wake()
	return nil
}

// watch follows the control plane until ctx ends.
func (a *agent) watch(ctx context.Context, client nodev1.NodeClient) {
	for wait := 100 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, 5*time.Second) {
		began := time.Now()
		err := a.watchOnce(ctx, client)
		a.connected.Store(false)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > 5*time.Second {
			wait = 100 * time.Millisecond
		}
		a.rejoin(ctx, err)
		a.log.Warn("the control plane is away; the last known state stays in force", "error", err, "retry", wait)
		select {
		case <-ctx.Done():
		case <-time.After(wait/2 + rand.N(wait/2)):
		}
	}
}

func (a *agent) watchOnce(ctx context.Context, client nodev1.NodeClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.Watch(ctx, &nodev1.WatchRequest{Revision: a.reportedRevision()})
	if err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		a.connected.Store(true)
		if err := a.node.setBundle(m.GetBundle()); err != nil {
			return err
		}
		if err := a.take(m); err != nil {
			return fmt.Errorf("a state that makes no sense was not taken: %w", err)
		}
		b, err := proto.Marshal(m)
		if err == nil {
			err = wholefile.Write(a.stateFile(), b)
		}
		if err != nil {
			a.log.Error("keeping the state for a restart", "error", err)
		}
		a.log.Info("state in force", "revision", m.GetRevision(), "workloads", len(m.GetWorkloads()), "policies", len(m.GetPolicies()))
	}
}

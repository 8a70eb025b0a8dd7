package caserver

import (
	"cmp"
	"crypto/x509"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/mesh"
)

// nodeState is all that one node may see of a view, in an order that depends
// on nothing but its content.
func nodeState(view *mesh.View, name string, bundle []*x509.Certificate) *nodev1.NodeState {
	ttl := view.State.SVIDTTL
	if ttl == 0 {
		ttl = ca.DefaultTTL
	}
	out := &nodev1.NodeState{
		Revision:       view.Revision,
		TrustDomain:    view.State.TrustDomain.Name(),
		Bundle:         rawCerts(bundle),
		SvidTtlSeconds: int64(ttl / time.Second),
		SvidKeyType:    view.State.SVIDKeyType.String(),
	}
	for namespace, mode := range view.State.Namespaces {
		if mode != mesh.ModeOff {
			out.EnrolledNamespaces = append(out.EnrolledNamespaces, namespace)
		}
	}
	slices.Sort(out.EnrolledNamespaces)
	for uid, node := range view.State.Excluded {
		if node == name {
			out.ExcludedPods = append(out.ExcludedPods, uid)
		}
	}
	slices.Sort(out.ExcludedPods)
	local := view.State.OnNode(name)
	slices.SortFunc(local, func(a, b mesh.Workload) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	targets := make(map[authz.Target]bool)
	namespaces := make(map[string]bool)
	for i := range local {
		w := &local[i]
		targets[authz.Target{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}] = true
		namespaces[w.Namespace] = true
		out.Workloads = append(out.Workloads, workloadMessage(w, view.State.Mode(w.Namespace)))
	}
	if view.Model == nil {
		return out
	}
	var wide []authz.Pattern // to be expanded over the identities that exist
	for _, p := range view.Model.Policies() {
		protects := namespaces[p.Namespace]
		if p.TargetServiceAccount != "" {
			protects = targets[authz.Target{Namespace: p.Namespace, ServiceAccount: p.TargetServiceAccount}]
		}
		if protects {
			out.Policies = append(out.Policies, policyMessage(&p))
			wide = appendWide(wide, p.From)
		}
	}
	slices.SortFunc(out.Policies, func(a, b *nodev1.Policy) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	for _, q := range view.Model.Quarantines() {
		if len(q.Identities) == 0 {
			continue
		}
		message := &nodev1.Quarantined{Name: q.Name}
		for _, p := range q.Identities {
			message.Identities = append(message.Identities, p.String())
		}
		out.Quarantined = append(out.Quarantined, message)
		wide = appendWide(wide, q.Identities)
	}
	out.Identities = matching(view.State, wide)
	return out
}

// jwtKeyMessages encodes the JWT bundle.
func jwtKeyMessages(keys []ca.JWTKey) ([]*nodev1.JWTKey, error) {
	out := make([]*nodev1.JWTKey, len(keys))
	for i, k := range keys {
		der, err := x509.MarshalPKIXPublicKey(k.Key)
		if err != nil {
			return nil, err
		}
		out[i] = &nodev1.JWTKey{KeyId: k.ID, PublicKey: der}
	}
	return out, nil
}

// appendWide adds the patterns that a proxy cannot compare by itself: those
// that are neither one identity nor every service account of one namespace.
func appendWide(wide, patterns []authz.Pattern) []authz.Pattern {
	for _, p := range patterns {
		if _, ok := p.Exact(); ok {
			continue
		}
		if prefix, ok := p.Prefix(); ok && wholeNamespace(prefix) {
			continue
		}
		wide = append(wide, p)
	}
	return wide
}

// wholeNamespace reports whether a prefix is spiffe://<domain>/ns/<name>/sa/,
// behind which no identity has further segments.
func wholeNamespace(prefix string) bool {
	s := strings.Split(strings.TrimPrefix(prefix, "spiffe://"), "/")
	return len(s) == 5 && s[1] == "ns" && s[3] == "sa" && s[4] == ""
}

// matching lists the identities of workloads that match one of the patterns.
func matching(state *mesh.State, patterns []authz.Pattern) []string {
	if len(patterns) == 0 {
		return nil
	}
	var out []string
	for i := range state.Workloads {
		id := state.Workloads[i].ID
		if slices.ContainsFunc(patterns, func(p authz.Pattern) bool { return p.Matches(id) }) {
			out = append(out, id.String())
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func workloadMessage(w *mesh.Workload, mode mesh.Mode) *nodev1.Workload {
	out := &nodev1.Workload{
		Namespace:      w.Namespace,
		Name:           w.Name,
		ServiceAccount: w.ServiceAccount,
		SpiffeId:       w.ID.String(),
		Mode:           mode.String(),
		Uid:            w.UID,
		Hint:           w.Hint,
	}
	if a := w.Attest; a != nil {
		out.Attest = &nodev1.Attest{Path: a.Path, Sha256: a.SHA256, SystemdUnit: a.SystemdUnit, Cgroup: a.Cgroup, PodUid: a.PodUID}
		if a.UID != nil {
			out.Attest.Uid = proto.Uint32(*a.UID)
		}
	}
	if c := w.Capture; c != nil {
		out.Capture = &nodev1.Capture{Netns: c.NetNS}
		for _, addr := range c.Addrs {
			out.Capture.Addresses = append(out.Capture.Addresses, addr.String())
		}
		for _, port := range c.Probes {
			out.Capture.ProbePorts = append(out.Capture.ProbePorts, uint32(port))
		}
	}
	return out
}

func policyMessage(p *authz.Policy) *nodev1.Policy {
	out := &nodev1.Policy{Namespace: p.Namespace, Name: p.Name, TargetServiceAccount: p.TargetServiceAccount, Terminate: p.Terminate, Originate: p.Originate, Alpn: p.ALPN}
	for _, port := range p.Ports {
		out.Ports = append(out.Ports, uint32(port))
	}
	for _, from := range p.From {
		out.From = append(out.From, from.String())
	}
	return out
}

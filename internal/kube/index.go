package kube

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// byService is the index of EndpointSlices by the service they belong to.
const byService = "service"

func sliceIndexer(obj any) ([]string, error) {
	if s, ok := obj.(*discoveryv1.EndpointSlice); ok && s.Labels[discoveryv1.LabelServiceName] != "" {
		return []string{s.Namespace + "/" + s.Labels[discoveryv1.LabelServiceName]}, nil
	}
	return nil, nil
}

// dirty names what may have changed, by "namespace/name".
type dirty struct {
	namespaces, pods, services set
	documents                  bool // a MeshConfig, AllowPolicy or Quarantine
}

type set map[string]struct{}

func (s set) add(key string) { s[key] = struct{}{} }

func newDirty() *dirty { return &dirty{namespaces: set{}, pods: set{}, services: set{}} }

// index turns the cached objects into a mesh.State, working only on what
// changed. One goroutine uses it.
type index struct {
	caches
	td       spiffeid.TrustDomain
	services services

	namespaces map[string]namespace
	turns      map[string]*turn     // namespaces that join or leave
	gradual    bool                 // namespaces with running pods join and leave in steps
	plain      map[string]bool      // namespaces that are called in plain although captured; replaced whole
	modes      map[string]mesh.Mode // of those that take part; replaced whole
	excluded   map[string]string    // pod UID -> node; replaced whole
	workloads  table[mesh.Workload]
	serviceSet table[mesh.Service]
	meanings   map[string]meaning    // of every pod, by key
	byAddr     map[netip.Addr]string // workload keys
	needs      map[string][]string   // service -> pods and addresses that it depends on
	neededBy   map[string]set        // the reverse
}

// caches are the informers' stores. They are read, never written.
type caches struct {
	namespaceStore, podStore, serviceStore, sliceStore cache.Indexer
}

// meaning is what a pod is to those who call it.
type meaning struct {
	uid      string
	workload bool
	plain    bool // lives outside the mesh, and is known to
	addrs    string
}

func newIndex(c caches, td spiffeid.TrustDomain, skipped func(*corev1.Service, int32)) *index {
	x := &index{
		caches: c, td: td,
		namespaces: map[string]namespace{}, turns: map[string]*turn{}, plain: map[string]bool{}, modes: map[string]mesh.Mode{}, excluded: map[string]string{},
		meanings: map[string]meaning{}, byAddr: map[netip.Addr]string{},
		needs: map[string][]string{}, neededBy: map[string]set{},
	}
	x.services = services{podEndpoint: x.podEndpoint, workloadAt: func(a netip.Addr) string { return x.byAddr[a] }, skipped: skipped}
	return x
}

// everything marks all cached objects.
func (x *index) everything() *dirty {
	d := newDirty()
	for marked, store := range map[*set]cache.Indexer{&d.namespaces: x.namespaceStore, &d.pods: x.podStore, &d.services: x.serviceStore} {
		for _, key := range store.ListKeys() {
			marked.add(key)
		}
	}
	d.documents = true
	return d
}

// update brings the index up to date and reports whether the state changed. It
// adds to d what follows from it.
func (x *index) update(d *dirty) bool {
	changed := x.updateNamespaces(d)
	if x.updatePods(d) {
		changed = true
	}
	return x.updateServices(d) || changed
}

func (x *index) updateNamespaces(d *dirty) bool {
	modes, plain := maps.Clone(x.modes), maps.Clone(x.plain)
	for name := range d.namespaces {
		var now namespace
		obj, exists, _ := x.namespaceStore.GetByKey(name) // a store in memory has none
		if exists {
			now = parseNamespace(obj.(*corev1.Namespace))
		}
		was := x.namespaces[name]
		t := x.turned(name, was.wanted, now.wanted, x.turns[name], time.Now())
		if !exists {
			t = nil
		}
		if x.turns[name] = t; t == nil {
			delete(x.turns, name)
		}
		var inPlain bool
		now.mode, inPlain = t.mode(now.wanted)
		if x.namespaces[name] = now; !exists {
			delete(x.namespaces, name)
		}
		if plain[name] = inPlain; !inPlain {
			delete(plain, name)
		}
		if now.mode == mesh.ModeOff {
			delete(modes, name)
		} else {
			modes[name] = now.mode
		}
		if (was.mode == mesh.ModeOff) == (now.mode == mesh.ModeOff) && was.allowOptOut == now.allowOptOut {
			continue
		}
		pods, _ := x.podStore.ByIndex(cache.NamespaceIndex, name) // the index exists
		for _, p := range pods {
			d.pods.add(name + "/" + p.(*pod).Name)
		}
		// Endpoints that name pods which are not known yet.
		for key := range x.neededBy {
			if strings.HasPrefix(key, name+"/") {
				for service := range x.neededBy[key] {
					d.services.add(service)
				}
			}
		}
	}
	if maps.Equal(modes, x.modes) && maps.Equal(plain, x.plain) {
		return false
	}
	x.modes, x.plain = modes, plain
	return true
}

func (x *index) updatePods(d *dirty) bool {
	changes := map[string]*mesh.Workload{}
	excluded := maps.Clone(x.excluded)
	for key := range d.pods {
		touched := set{} // addresses whose owner may have changed
		name, rest, _ := strings.Cut(key, "/")
		var p *pod
		if obj, ok, _ := x.podStore.GetByKey(key); ok { // a store in memory has none
			p = obj.(*pod)
		}
		was := x.meanings[key]
		delete(excluded, was.uid)
		row := rowKey(name, rest)
		if old, ok := x.workloads.get(row); ok {
			for _, a := range old.Capture.Addrs {
				if x.byAddr[a] == key {
					delete(x.byAddr, a)
					touched.add(a.String())
				}
			}
		}
		workload, now := x.convert(p)
		changes[row] = workload
		if p == nil {
			delete(x.meanings, key)
		} else {
			x.meanings[key] = now
		}
		if workload == nil && p != nil && p.runs() && x.namespaces[name].mode != mesh.ModeOff && now.plain {
			excluded[now.uid] = p.node
		}
		if workload != nil {
			for _, a := range workload.Capture.Addrs {
				x.byAddr[a] = key
				touched.add(a.String())
			}
		}
		if now == was {
			continue
		}
		x.mark(d, key)
		for addr := range touched {
			x.mark(d, addr)
		}
	}
	changed := x.workloads.apply(changes)
	if !maps.Equal(excluded, x.excluded) {
		x.excluded, changed = excluded, true
	}
	return changed
}

// mark makes the services dirty that depend on a pod or an address.
func (x *index) mark(d *dirty, need string) {
	for service := range x.neededBy[need] {
		d.services.add(service)
	}
}

// convert returns the workload that a pod is, nil if it is none, and what it
// means to callers.
func (x *index) convert(p *pod) (*mesh.Workload, meaning) {
	if p == nil {
		return nil, meaning{}
	}
	m := meaning{uid: string(p.UID)}
	ns := x.namespaces[p.Namespace]
	switch {
	case ns.mode == mesh.ModeOff || p.hostNetwork && !p.over:
		m.plain = true
		return nil, m
	case !p.runs():
		return nil, m
	case p.optOut && ns.allowOptOut:
		m.plain = true
		return nil, m
	}
	id, err := spiffeid.FromSegments(x.td, "ns", p.Namespace, "sa", p.serviceAccount)
	if err != nil || authz.CheckNamespace(p.Namespace) != nil || authz.CheckName(p.serviceAccount) != nil {
		return nil, m // no identity, so it does not start
	}
	m.workload = true
	for _, a := range p.addrs {
		m.addrs += a.String() + " "
	}
	return &mesh.Workload{
		Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.serviceAccount, ID: id,
		Node: p.node, UID: m.uid,
		Attest:  &mesh.Attest{PodUID: m.uid},
		Capture: &mesh.Capture{Addrs: p.addrs, Probes: p.probes},
	}, m
}

// podEndpoint says what a pod that an EndpointSlice names is. A pod that is not
// known with that UID yet, in a namespace that takes part, is neither: to call
// it in plain because its slice came first would be wrong.
func (x *index) podEndpoint(ns, name, uid string) (workload string, plain bool) {
	key := ns + "/" + name
	m, known := x.meanings[key]
	switch {
	case known && (uid == "" || m.uid == uid):
		if m.workload {
			return key, false
		}
		return "", m.plain
	default:
		return "", x.namespaces[ns].mode == mesh.ModeOff
	}
}

func (x *index) updateServices(d *dirty) bool {
	changes := map[string]*mesh.Service{}
	for key := range d.services {
		name, rest, _ := strings.Cut(key, "/")
		var out *mesh.Service
		var needs []string
		if obj, ok, _ := x.serviceStore.GetByKey(key); ok { // a store in memory has none
			out, needs = x.services.convert(obj.(*corev1.Service), x.slices(key))
		}
		changes[rowKey(name, rest)] = out
		x.depend(key, needs)
	}
	return x.serviceSet.apply(changes)
}

// slices returns a service's EndpointSlices by name, so that the result does
// not depend on the cache's order.
func (x *index) slices(service string) []*discoveryv1.EndpointSlice {
	objs, _ := x.sliceStore.ByIndex(byService, service) // the index exists
	out := make([]*discoveryv1.EndpointSlice, 0, len(objs))
	for _, obj := range objs {
		out = append(out, obj.(*discoveryv1.EndpointSlice))
	}
	slices.SortFunc(out, func(a, b *discoveryv1.EndpointSlice) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func (x *index) depend(service string, needs []string) {
	for _, need := range x.needs[service] {
		if delete(x.neededBy[need], service); len(x.neededBy[need]) == 0 {
			delete(x.neededBy, need)
		}
	}
	if len(needs) == 0 {
		delete(x.needs, service)
		return
	}
	x.needs[service] = needs
	for _, need := range needs {
		if x.neededBy[need] == nil {
			x.neededBy[need] = set{}
		}
		x.neededBy[need].add(service)
	}
}

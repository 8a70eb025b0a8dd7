// Package relay stands between the control plane and the node's proxies: it
// keeps a copy of their resources, in memory and on disk, adds the
// certificates that never leave the node, and serves both over one socket.
// There is one proxy, or two while one takes over from the other.
// The proxy keeps working, and can be restarted, while the control plane is
// away.
package relay

import (
	"log/slog"
	"maps"
	"sync"

	"github.com/signet-mesh/signet/xds"
	"github.com/signet-mesh/signet/xds/xdsserver"
)

// Relay implements xdsserver.Source for the proxy.
type Relay struct {
	cache string // file of the last good copy; empty: none
	log   *slog.Logger
	keys  Keys

	mu       sync.Mutex
	upstream versioned               // guarded by mu; from the control plane
	local    versioned               // guarded by mu; built on this node
	secrets  map[string]xds.Resource // guarded by mu; replaced whole
	held     Held                    // guarded by mu; what the secrets were made of
	merged   versioned               // guarded by mu; upstream, local and secrets
	onDemand map[string]answer       // guarded by mu; clusters asked for by name
	present  map[string]uint64       // guarded by mu; network namespaces that exist
	changed  chan struct{}           // guarded by mu
	asked    chan struct{}           // signals that onDemand has new names
	proxies  map[*proxyStream]bool   // guarded by mu; those that are connected
	opened   uint64                  // guarded by mu; proxies' streams so far

	draining func(instance string) bool
}

// versioned is a set, replaced whole, with its hash, which is asked for far more
// often than the set changes. Its zero value is a set that is not known yet.
type versioned struct {
	xds.Set
	version string // empty until the set is known
}

func version(set xds.Set) versioned { return versioned{set, set.Version()} }

// answer is what the control plane said about a name.
type answer struct {
	state    xdsserver.Answer
	resource xds.Resource
}

// Config configures a Relay.
type Config struct {
	// Cache is the file that keeps the last good copy. Empty keeps none.
	Cache string
	Keys  Keys
	// Draining reports whether a proxy takes no new connections any more. Nil:
	// every proxy that is connected takes them. It must not block.
	Draining func(instance string) bool
	Log      *slog.Logger
}

// New returns a Relay that serves the last good copy, if there is one.
func New(c Config) *Relay {
	r := &Relay{
		cache: c.Cache, log: c.Log, keys: c.Keys,
		onDemand: map[string]answer{},
		changed:  make(chan struct{}),
		asked:    make(chan struct{}, 1),
		proxies:  map[*proxyStream]bool{},
		draining: c.Draining,
	}
	if r.draining == nil {
		r.draining = func(string) bool { return false }
	}
	if set, err := loadCopy(c.Cache); err != nil {
		c.Log.Warn("the last good copy of the proxy's configuration is not usable; waiting for the control plane", "error", err)
	} else if set != nil {
		r.upstream = version(set)
	}
	r.readKeys()
	return r
}

// Resources implements xdsserver.Source.
func (r *Relay) Resources() (xds.Set, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.merged.Set, r.changed
}

// Lookup implements xdsserver.Source. The first question about a cluster is
// passed to the control plane, and answered when that answers.
func (r *Relay) Lookup(typeURL, name string) (xds.Resource, xdsserver.Answer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch typeURL {
	case xds.TypeCluster:
		if _, ok := xds.ParseDestination(name); !ok {
			return xds.Resource{}, xdsserver.Absent
		}
		a, ok := r.onDemand[name]
		if !ok {
			a = answer{state: xdsserver.Pending}
			r.onDemand[name] = a
			select {
			case r.asked <- struct{}{}:
			default:
			}
		}
		return a.resource, a.state
	case xds.TypeSecret:
		// A certificate that is not here yet, or is no more: the proxy
		// waits, and a handshake that needs it does not complete.
		return xds.Resource{}, xdsserver.Pending
	}
	return xds.Resource{}, xdsserver.Absent
}

// Version returns the hash of what the control plane gave; it equals the
// control plane's own hash when the copy is current.
func (r *Relay) Version() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.upstream.version
}

// apply takes one update of what the control plane pushes.
func (r *Relay) apply(typeURL string, added []xds.Resource, removed []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := xds.Set{}
	maps.Copy(next, r.upstream.Set)
	next[typeURL] = maps.Clone(next[typeURL])
	if next[typeURL] == nil {
		next[typeURL] = map[string]xds.Resource{}
	}
	for _, a := range added {
		next[typeURL][a.Name] = a
	}
	for _, n := range removed {
		delete(next[typeURL], n)
	}
	r.upstream = version(next)
	r.publish()
	if err := saveCopy(r.cache, next); err != nil {
		r.log.Error("keeping a copy of the proxy's configuration", "error", err)
	}
}

// answer takes the control plane's answers for clusters that were asked for.
func (r *Relay) answer(found []xds.Resource, absent []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range found {
		r.onDemand[a.Name] = answer{state: xdsserver.Found, resource: a}
	}
	for _, n := range absent {
		r.onDemand[n] = refused(n)
	}
	r.publish()
}

// refused answers for a name that stands for nothing.
func refused(name string) answer {
	if resource, ok := xds.Refused(name); ok {
		return answer{state: xdsserver.Found, resource: resource}
	}
	return answer{state: xdsserver.Absent}
}

// SetLocal gives the resources that this node builds for its own workloads.
func (r *Relay) SetLocal(set xds.Set) {
	local := version(set)
	r.mu.Lock()
	defer r.mu.Unlock()
	if local.version == r.local.version {
		return
	}
	r.local = local
	r.publish()
}

// publish rebuilds what the proxy sees and wakes its stream. mu is held.
//
// Nothing is there to see before all parts are known: a proxy that has worked
// through a restart of the agent would take what is still missing for removed,
// and end its connections.
func (r *Relay) publish() {
	if r.upstream.Set != nil && r.local.Set != nil && r.present != nil {
		m := xds.Set{}
		maps.Copy(m, r.local.Set)
		m[xds.TypeSecret] = r.secrets
		m[xds.TypeListener] = r.placed(r.local.Set[xds.TypeListener])
		m[xds.TypeCluster] = map[string]xds.Resource{}
		maps.Copy(m[xds.TypeCluster], r.local.Set[xds.TypeCluster])
		maps.Copy(m[xds.TypeCluster], r.upstream.Set[xds.TypeCluster])
		r.merged = version(m)
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

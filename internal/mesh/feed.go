package mesh

import (
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/authz"
)

// View is one consistent picture of the mesh. It is replaced whole and never
// edited.
type View struct {
	// Revision is the content hash of State and the policies.
	Revision string
	State    *State
	Model    *authz.Model
	// Identities are those that exist, in the whole mesh, and match a pattern
	// whose wildcard is not its last segment. Only an agent's view has them.
	Identities []spiffeid.ID
	// Refused are the serial numbers of certificates that are revoked, as the
	// proxy writes them. Only an agent's view has them.
	Refused []string
}

// Feed hands the newest View to any number of readers. The zero Feed is empty
// and ready. It is safe for concurrent use.
type Feed struct {
	mu      sync.Mutex
	view    *View         // guarded by mu
	changed chan struct{} // guarded by mu; closed and replaced by Set
}

// Set replaces the view and wakes every reader that waits.
func (f *Feed) Set(v *View) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.view = v
	if f.changed != nil {
		close(f.changed)
		f.changed = nil
	}
}

// Get returns the newest view, nil before the first Set, and a channel that is
// closed when a newer one has been set.
func (f *Feed) Get() (*View, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.changed == nil {
		f.changed = make(chan struct{})
	}
	return f.view, f.changed
}

// Target returns what policies protect behind an identity: the namespace and
// service account of the workloads that have it.
func (v *View) Target(id spiffeid.ID) (authz.Target, bool) {
	for i := range v.State.Workloads {
		if w := &v.State.Workloads[i]; w.ID == id {
			return authz.Target{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}, true
		}
	}
	return authz.Target{}, false
}

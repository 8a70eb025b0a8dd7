package caserver

import (
	"cmp"
	"slices"
	"time"

	"golang.org/x/time/rate"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
)

// node is what is known about a node that has proven its name. Entries are
// never removed: their number is that of the nodes that ever joined.
type node struct {
	limiter *rate.Limiter // safe for concurrent use

	streams  int       // guarded by Server.mu; open Watch calls
	revision string    // guarded by Server.mu
	since    time.Time // guarded by Server.mu; when connected last changed
}

// node returns the entry of a node, making it at first sight.
func (s *Server) node(name string) *node {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nodeLocked(name)
}

func (s *Server) nodeLocked(name string) *node {
	n := s.nodes[name]
	if n == nil {
		n = &node{limiter: rate.NewLimiter(s.rate, s.burst), since: s.now()}
		s.nodes[name] = n
	}
	return n
}

func (s *Server) connected(name, revision string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodeLocked(name)
	if n.streams == 0 {
		n.since = s.now()
	}
	n.streams++
	if revision != "" {
		n.revision = revision
	}
}

func (s *Server) disconnected(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodeLocked(name)
	n.streams--
	if n.streams == 0 {
		n.since = s.now()
	}
}

// Acked notes the revision that a node's proxy has taken. The caller has
// established the node's name from its certificate.
func (s *Server) Acked(name, revision string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nodeLocked(name).revision = revision
}

// Nodes returns the nodes that have called since the start and those that
// the newest view puts workloads on, sorted by name. Since is when a node was
// last connected or lost, and zero for one that has never called.
func (s *Server) Nodes() []adminv1.NodeStatus {
	view, _ := s.feed.Get()
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []adminv1.NodeStatus
	for name, n := range s.nodes {
		out = append(out, adminv1.NodeStatus{Name: name, Connected: n.streams > 0, Revision: n.revision, Since: n.since})
	}
	if view != nil && view.State != nil {
		added := make(map[string]bool)
		for _, w := range view.State.Workloads {
			if s.nodes[w.Node] == nil && !added[w.Node] {
				added[w.Node] = true
				out = append(out, adminv1.NodeStatus{Name: w.Node})
			}
		}
	}
	slices.SortFunc(out, func(a, b adminv1.NodeStatus) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

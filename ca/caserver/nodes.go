package caserver

import (
	"cmp"
	"slices"
	"time"

	"golang.org/x/time/rate"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/internal/mesh"
)

// node is what is known about a node that has proven its name. Entries are
// never removed: their number is that of the nodes that ever joined.
type node struct {
	limiter *rate.Limiter // of certificates; safe for concurrent use
	tokens  *rate.Limiter // of JWT-SVIDs; safe for concurrent use

	streams  int                      // guarded by Server.mu; open Watch calls
	revision string                   // guarded by Server.mu; the newest that the node has reported
	sent     []string                 // guarded by Server.mu; the revisions under which it was sent its newest state
	current  string                   // guarded by Server.mu; the newest revision in which that state is the same
	report   []*nodev1.WorkloadReport // guarded by Server.mu; replaced whole
	reported time.Time                // guarded by Server.mu; when; zero: never
	clock    time.Duration            // guarded by Server.mu; how far its clock is ahead, by its last report; 0: hardly
	roots    *nodev1.Roots            // guarded by Server.mu; of its last report, never edited; nil: it did not say
	since    time.Time                // guarded by Server.mu; when connected last changed
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
		n = &node{limiter: rate.NewLimiter(s.rate, s.burst), tokens: rate.NewLimiter(s.rate, s.burst), since: s.now()}
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

// sending notes what a node is told: whether the state of this revision is news
// to it, and whether it is sent.
func (s *Server) sending(name, revision string, news, send bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodeLocked(name)
	if news {
		n.sent = nil
	}
	if send {
		if len(n.sent) >= maxSent {
			n.sent = append([]string(nil), n.sent[1:]...)
		}
		n.sent = append(n.sent, revision)
	}
	n.current = revision
}

// maxSent bounds how many names of one state are remembered, for a node that
// is slow to confirm.
const maxSent = 8

// inForce is the revision that the node's proxy acts by. When it has taken the
// newest state that it was sent, that is the newest revision in which its state
// is the same.
func (n *node) inForce() string {
	if slices.Contains(n.sent, n.revision) {
		return n.current
	}
	return n.revision
}

// NodeReport is what a node has last said about itself.
type NodeReport struct {
	Node      string
	Connected bool
	// Revision is in force on the node.
	Revision string
	// At is when it reported; zero: never since the start.
	At time.Time
	// Workloads is the report. It is shared: callers must not edit it.
	Workloads []*nodev1.WorkloadReport
	// Clock is how far the node's clock is ahead of this one; negative: behind;
	// zero: within what certificates allow for, or not said.
	Clock time.Duration
	// Roots is which roots the node trusts and uses; nil: it did not say. It is
	// shared: callers must not edit it.
	Roots *nodev1.Roots
	// Since is when Connected last changed.
	Since time.Time
}

// Reports returns what the nodes that have called since the start have last
// reported, sorted by name.
func (s *Server) Reports() []NodeReport {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]NodeReport, 0, len(s.nodes))
	for name, n := range s.nodes {
		out = append(out, NodeReport{Node: name, Connected: n.streams > 0, Revision: n.inForce(), At: n.reported, Workloads: n.report, Clock: n.clock, Roots: n.roots, Since: n.since})
	}
	slices.SortFunc(out, func(a, b NodeReport) int { return cmp.Compare(a.Node, b.Node) })
	return out
}

// Nodes returns the nodes that there are reports of and those that a view puts
// workloads on, sorted by name. Since is when a node was last connected or lost,
// and zero for one that has never called.
func Nodes(view *mesh.View, reports []NodeReport) []adminv1.NodeStatus {
	var out []adminv1.NodeStatus
	known := make(map[string]bool)
	for _, r := range reports {
		known[r.Node] = true
		out = append(out, adminv1.NodeStatus{Name: r.Node, Connected: r.Connected, Revision: r.Revision, Since: r.Since})
	}
	if view != nil && view.State != nil {
		for _, w := range view.State.Workloads {
			if !known[w.Node] {
				known[w.Node] = true
				out = append(out, adminv1.NodeStatus{Name: w.Node})
			}
		}
	}
	slices.SortFunc(out, func(a, b adminv1.NodeStatus) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

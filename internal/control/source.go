package control

import (
	"context"
	"errors"
	"sync"

	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/mesh"
	"github.com/signet-mesh/signet/xds"
	"github.com/signet-mesh/signet/xds/xdsserver"
)

// builds remembers what was built of the newest view, per node.
type builds struct {
	mu   sync.Mutex
	view *mesh.View         // guarded by mu
	sets map[string]xds.Set // guarded by mu; by node, built from view
}

func (b *builds) get(v *mesh.View, node string) (xds.Set, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.view != v {
		b.view, b.sets = v, map[string]xds.Set{}
	}
	if set, ok := b.sets[node]; ok {
		return set, nil
	}
	set, err := xds.Destinations(v, node)
	if err != nil {
		return nil, err
	}
	b.sets[node] = set
	return set, nil
}

// xdsVersion is the hash of what a node's proxy gets in a view.
func (c *control) xdsVersion(v *mesh.View, node string) string {
	set, err := c.built.get(v, node)
	if err != nil {
		return ""
	}
	return set.Version()
}

// open names the source of a node's stream by its certificate.
func (c *control) open(ctx context.Context) (xdsserver.Source, xdsserver.Subscriber, error) {
	node, ok := caserver.NodeFromContext(ctx)
	if !ok {
		return nil, nil, errors.New("no node certificate")
	}
	return &source{control: c, node: node}, nil, nil
}

// source is what one node's stream may see.
type source struct {
	control *control
	node    string
}

// Resources implements xdsserver.Source.
func (s *source) Resources() (xds.Set, <-chan struct{}) {
	view, changed := s.control.feed.Get()
	if view == nil {
		return nil, changed
	}
	set, err := s.control.built.get(view, s.node)
	if err != nil {
		s.control.log.Error("building a node's configuration; the node keeps what it has", "node", s.node, "error", err)
		return nil, changed
	}
	return set, changed
}

// Lookup implements xdsserver.Source: only destinations are built on demand.
func (s *source) Lookup(typeURL, name string) (xds.Resource, xdsserver.Answer) {
	if typeURL != xds.TypeCluster {
		return xds.Resource{}, xdsserver.Absent
	}
	view, _ := s.control.feed.Get()
	if r, ok := xds.Destination(view, s.node, name); ok {
		return r, xdsserver.Found
	}
	return xds.Resource{}, xdsserver.Absent
}

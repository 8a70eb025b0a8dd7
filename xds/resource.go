// Package xds turns the compiled policies and the state of the mesh into the
// Envoy resources of one node. It is pure: the same input gives the same
// bytes, and a resource's version is the hash of its content.
package xds

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// The type URLs that the mesh uses.
const (
	TypeListener = "type.googleapis.com/envoy.config.listener.v3.Listener"
	TypeCluster  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	TypeRoute    = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	TypeSecret   = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
)

// Resource is one named resource, ready to be sent.
type Resource struct {
	Name    string
	Version string // content hash
	Body    *anypb.Any
}

// NewResource packs a message. It fails only when the message cannot be
// marshalled, which for messages built here means a string that is not UTF-8.
func NewResource(name string, m proto.Message) (Resource, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return Resource{}, fmt.Errorf("packing %q: %w", name, err)
	}
	body := &anypb.Any{
		TypeUrl: "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName()),
		Value:   b,
	}
	return Resource{Name: name, Version: hash(b), Body: body}, nil
}

// Set holds resources by type URL and name. A Set that has been handed out is
// never edited.
type Set map[string]map[string]Resource

// Add packs m and files it under its own type.
func (s Set) Add(name string, m proto.Message) error {
	r, err := NewResource(name, m)
	if err != nil {
		return err
	}
	s.Put(r)
	return nil
}

// Put files r under its type.
func (s Set) Put(r Resource) {
	t := s[r.Body.TypeUrl]
	if t == nil {
		t = map[string]Resource{}
		s[r.Body.TypeUrl] = t
	}
	t[r.Name] = r
}

// Version returns the hash over all resources of a set.
func (s Set) Version() string {
	var b strings.Builder
	for _, t := range slices.Sorted(maps.Keys(s)) {
		for _, n := range slices.Sorted(maps.Keys(s[t])) {
			fmt.Fprintf(&b, "%s\x00%s\x00%s\n", t, n, s[t][n].Version)
		}
	}
	return hash([]byte(b.String()))
}

func hash(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8])
}

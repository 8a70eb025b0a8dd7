package xdsserver

import (
	"maps"
	"slices"
	"strconv"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/signet-mesh/signet/xds"
)

// wildcard subscribes to a whole type.
const wildcard = "*"

// subscription is what a peer asked for of one type and what it has. Owned by
// the stream's goroutine.
type subscription struct {
	all      bool
	names    map[string]bool
	sent     map[string]string // name -> version; gone once told that it is absent
	answered bool              // at least one response was sent
	nonce    uint64            // of the last response
	acked    uint64            // last nonce that the peer took
}

// gone marks a name that the peer was told does not exist.
const gone = ""

func newSubscription(req *discoveryv3.DeltaDiscoveryRequest) *subscription {
	s := &subscription{names: map[string]bool{}, sent: map[string]string{}}
	// Per the xDS protocol, a first request that names nothing is a wildcard.
	s.all = len(req.GetResourceNamesSubscribe()) == 0
	s.amend(req)
	maps.Copy(s.sent, req.GetInitialResourceVersions())
	return s
}

// amend applies a request's changes. A name that is subscribed to again is
// sent again, as the protocol asks.
func (s *subscription) amend(req *discoveryv3.DeltaDiscoveryRequest) {
	for _, n := range req.GetResourceNamesSubscribe() {
		if n == wildcard {
			s.all = true
			continue
		}
		s.names[n] = true
		delete(s.sent, n)
	}
	for _, n := range req.GetResourceNamesUnsubscribe() {
		if n == wildcard {
			s.all = false
			continue
		}
		delete(s.names, n)
		delete(s.sent, n)
	}
}

// update returns what the peer must be told, or nil. A nil set is "not known
// yet": nothing is said, so the peer keeps what it has.
func (s *subscription) update(typeURL string, set xds.Set, source Source) *discoveryv3.DeltaDiscoveryResponse {
	if set == nil {
		return nil
	}
	resp := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: typeURL}
	have := set[typeURL]
	send := func(r xds.Resource) {
		if s.sent[r.Name] == r.Version {
			return
		}
		s.sent[r.Name] = r.Version
		resp.Resources = append(resp.Resources, &discoveryv3.Resource{
			Name: r.Name, Version: r.Version, Resource: r.Body,
		})
	}
	for _, n := range s.wanted(have) {
		if r, ok := have[n]; ok {
			send(r)
			continue
		}
		r, answer := source.Lookup(typeURL, n)
		switch answer {
		case Found:
			send(r)
		case Absent:
			if v, told := s.sent[n]; !told || v != gone {
				s.sent[n] = gone
				resp.RemovedResources = append(resp.RemovedResources, n)
			}
		case Pending:
		}
	}
	// What came by wildcard and is no more.
	for _, n := range slices.Sorted(maps.Keys(s.sent)) {
		if _, ok := have[n]; !ok && !s.names[n] {
			delete(s.sent, n)
			resp.RemovedResources = append(resp.RemovedResources, n)
		}
	}
	if len(resp.Resources) == 0 && len(resp.RemovedResources) == 0 && (s.answered || !s.all) {
		return nil
	}
	s.answered = true
	s.nonce++
	resp.Nonce = s.nonceString()
	return resp
}

func (s *subscription) wanted(have map[string]xds.Resource) []string {
	names := maps.Clone(s.names)
	if s.all {
		for n := range have {
			names[n] = true
		}
	}
	return slices.Sorted(maps.Keys(names))
}

func (s *subscription) nonceString() string { return strconv.FormatUint(s.nonce, 10) }

package main

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/authz"
)

// seenPair is one caller at one port of one target.
type seenPair struct {
	Caller      string    `json:"caller"` // SPIFFE ID
	Target      string    `json:"target"` // namespace/service-account
	Port        uint16    `json:"port"`
	Connections int       `json:"connections"`
	LastSeen    time.Time `json:"lastSeen"`
	// Denied counts those that enforce would have refused.
	Denied int `json:"wouldBeDenied"`
}

// leftOut is what was seen and no policy is made of.
type leftOut struct {
	Caller      string    `json:"caller"` // an address, or what else is known
	Target      string    `json:"target"`
	Why         string    `json:"why"`
	Connections int       `json:"connections"`
	LastSeen    time.Time `json:"lastSeen"`
}

// observations collects what records say about who reaches whom.
type observations struct {
	pairs map[pairKey]*seenPair
	out   map[leftOut]*leftOut // by caller, target and why
}

type pairKey struct {
	caller, target spiffeid.ID
	port           uint16
}

func newObservations() *observations {
	return &observations{pairs: map[pairKey]*seenPair{}, out: map[leftOut]*leftOut{}}
}

// add takes one record of the destination's side, which is the one that saw the
// caller prove its identity. Only what flowed counts: a connection that was
// refused is no reason to allow it.
func (o *observations) add(r audit.Record) {
	if r.Side != audit.Destination || r.Verdict != audit.Allowed && r.Verdict != audit.Observed {
		return
	}
	at := r.Start
	if r.End.After(at) {
		at = r.End
	}
	key, why := identified(r)
	if why != "" {
		caller := r.Source.ID
		if addr, err := netip.ParseAddrPort(r.Source.Address); caller == "" && err == nil {
			caller = addr.Addr().String() // its port says nothing
		}
		l := leftOut{Caller: cmp.Or(caller, r.Source.Address, "unknown"), Target: cmp.Or(r.Destination.ID, r.Destination.Workload, r.Destination.Address), Why: why}
		if o.out[l] == nil {
			o.out[l] = new(l)
		}
		o.out[l].Connections++
		o.out[l].LastSeen = latest(o.out[l].LastSeen, at)
		return
	}
	p := o.pairs[key]
	if p == nil {
		target, _ := workloadOf(key.target)
		p = &seenPair{Caller: key.caller.String(), Target: target.String(), Port: key.port}
		o.pairs[key] = p
	}
	p.Connections++
	p.LastSeen = latest(p.LastSeen, at)
	if r.Verdict == audit.Observed {
		p.Denied++
	}
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// identified returns who reached whom, or why that is not known for certain.
func identified(r audit.Record) (key pairKey, why string) {
	if r.Transport != "mtls" {
		return key, "plaintext: the caller proved no identity"
	}
	caller, err := spiffeid.FromString(r.Source.ID)
	if err != nil {
		return key, "the caller proved no identity"
	}
	target, err := spiffeid.FromString(r.Destination.ID)
	if err != nil {
		return key, "the record does not say whose workload was reached"
	}
	if _, ok := workloadOf(target); !ok {
		return key, "the target is no service account of a namespace"
	}
	address, err := netip.ParseAddrPort(r.Destination.Address)
	if err != nil || address.Port() == 0 || slices.Contains(meshPorts, address.Port()) {
		return key, "the record has no port that can be granted"
	}
	if caller.TrustDomain() != target.TrustDomain() {
		return key, "the caller is of another trust domain, of which no policy can admit anybody"
	}
	if _, ok := workloadOf(caller); !ok {
		return key, "the caller is a part of the mesh, and no workload"
	}
	return pairKey{caller, target, address.Port()}, ""
}

// workloadOf returns the namespace and service account in an ID.
func workloadOf(id spiffeid.ID) (authz.Target, bool) {
	parts := strings.Split(id.Path(), "/")
	if len(parts) != 5 || parts[1] != "ns" || parts[3] != "sa" || authz.CheckNamespace(parts[2]) != nil || authz.CheckName(parts[4]) != nil {
		return authz.Target{}, false
	}
	return authz.Target{Namespace: parts[2], ServiceAccount: parts[4]}, true
}

// Bounds of one policy's lists, as the API server has them.
const (
	maxPorts = 256
	maxFrom  = 256
)

// generatedPolicy is one AllowPolicy and what it was made of.
type generatedPolicy struct {
	Namespace, Name string
	Target          string // service account
	Ports           []uint16
	From            []string // SPIFFE IDs
	Evidence        []*seenPair
	trustDomain     spiffeid.TrustDomain
}

// policies makes the fewest policies that admit what was seen and nothing else.
// A policy admits each of its callers at each of its ports, so callers share
// one only if they were seen at the same ports.
func (o *observations) policies() []generatedPolicy {
	ports := map[spiffeid.ID]map[spiffeid.ID][]uint16{} // by target and caller
	for k := range o.pairs {
		if ports[k.target] == nil {
			ports[k.target] = map[spiffeid.ID][]uint16{}
		}
		ports[k.target][k.caller] = append(ports[k.target][k.caller], k.port)
	}
	var all []generatedPolicy
	for target, callers := range ports {
		groups := map[string][]spiffeid.ID{} // callers by their ports
		for caller, p := range callers {
			slices.Sort(p)
			groups[fmt.Sprint(p)] = append(groups[fmt.Sprint(p)], caller)
		}
		for _, group := range groups {
			slices.SortFunc(group, func(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) })
			for from := range slices.Chunk(group, maxFrom) {
				for chunk := range slices.Chunk(callers[group[0]], maxPorts) {
					all = append(all, o.policy(target, from, chunk))
				}
			}
		}
	}
	slices.SortFunc(all, func(a, b generatedPolicy) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Target, b.Target), slices.Compare(a.Ports, b.Ports), slices.Compare(a.From, b.From))
	})
	distinct(all)
	return all
}

func (o *observations) policy(target spiffeid.ID, from []spiffeid.ID, ports []uint16) generatedPolicy {
	of, _ := workloadOf(target)
	p := generatedPolicy{Namespace: of.Namespace, Target: of.ServiceAccount, Ports: ports, trustDomain: target.TrustDomain()}
	for _, caller := range from {
		p.From = append(p.From, caller.String())
		for _, port := range ports {
			p.Evidence = append(p.Evidence, o.pairs[pairKey{caller, target, port}])
		}
	}
	var numbers []string
	for _, port := range ports {
		numbers = append(numbers, strconv.Itoa(int(port)))
	}
	p.Name = "observed-" + of.ServiceAccount + "-" + strings.Join(numbers, "-")
	if len(p.Name) > 63 { // as long as a part of a name may be, and as people read
		p.Name = "observed-" + strings.TrimRight(of.ServiceAccount[:min(len(of.ServiceAccount), 40)], ".-") + "-" + p.digest()
	}
	return p
}

// digest tells policies apart by what they say.
func (p *generatedPolicy) digest() string {
	sum := sha256.Sum256(fmt.Append(nil, p.Target, p.Ports, p.From))
	return hex.EncodeToString(sum[:4])
}

// distinct gives policies of one namespace that came to the same name names
// that differ.
func distinct(all []generatedPolicy) {
	uses := map[string]int{}
	for i := range all {
		uses[all[i].Namespace+"/"+all[i].Name]++
	}
	for i := range all {
		if uses[all[i].Namespace+"/"+all[i].Name] > 1 {
			all[i].Name += "-" + all[i].digest()
		}
	}
}

// leftOut returns what no policy was made of, in order.
func (o *observations) leftOut() []leftOut {
	var all []leftOut
	for _, l := range o.out {
		all = append(all, *l)
	}
	slices.SortFunc(all, func(a, b leftOut) int {
		return cmp.Or(strings.Compare(a.Target, b.Target), strings.Compare(a.Caller, b.Caller), strings.Compare(a.Why, b.Why))
	})
	return all
}

// sorted returns what was seen, by target, port and caller.
func (o *observations) sorted() []*seenPair {
	return slices.SortedFunc(maps.Values(o.pairs), func(a, b *seenPair) int {
		return cmp.Or(strings.Compare(a.Target, b.Target), cmp.Compare(a.Port, b.Port), strings.Compare(a.Caller, b.Caller))
	})
}

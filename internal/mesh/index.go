package mesh

import (
	"net/netip"
	"sync"
)

// index finds things in a State without walking it. It is made at the first
// question; a State is not edited after that.
type index struct {
	once   sync.Once
	byKey  map[string]*Workload
	byAddr map[netip.Addr]*Workload
	byVIP  map[netip.Addr]*Service
	onNode map[string][]*Workload
}

func (s *State) indexed() *index {
	x := &s.index
	x.once.Do(func() {
		x.byKey = make(map[string]*Workload, len(s.Workloads))
		x.byAddr = make(map[netip.Addr]*Workload, len(s.Workloads))
		x.byVIP = make(map[netip.Addr]*Service, len(s.Services))
		x.onNode = map[string][]*Workload{}
		for i := range s.Workloads {
			w := &s.Workloads[i]
			x.byKey[w.Key()] = w
			x.onNode[w.Node] = append(x.onNode[w.Node], w)
			if w.Capture == nil {
				continue
			}
			for _, a := range w.Capture.Addrs {
				x.byAddr[a] = w
			}
		}
		for i := range s.Services {
			for _, vip := range s.Services[i].VIPs {
				if x.byVIP[vip] == nil {
					x.byVIP[vip] = &s.Services[i]
				}
			}
		}
	})
	return x
}

// Workload returns the workload with the given key, or nil.
func (s *State) Workload(key string) *Workload { return s.indexed().byKey[key] }

// WorkloadAt returns the captured workload that has an address, or nil. Of
// several, which a source of facts should not let happen, it is the last: the
// caller's proxy expects that one's identity there, and any other is refused.
func (s *State) WorkloadAt(a netip.Addr) *Workload { return s.indexed().byAddr[a] }

// ServiceAt returns the service that has a virtual address, or nil.
func (s *State) ServiceAt(a netip.Addr) *Service { return s.indexed().byVIP[a] }

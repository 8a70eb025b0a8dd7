package relay

import (
	"fmt"
	"maps"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/xds"
)

// SetNamespaces says which network namespaces exist (path to inode number).
// Until the first call the proxy gets nothing.
// Listeners in others are held back: the proxy would refuse them for good. A
// namespace that was made anew under the same path gets new listeners.
func (r *Relay) SetNamespaces(present map[string]uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if maps.Equal(present, r.present) && r.present != nil {
		return
	}
	r.present = maps.Clone(present)
	r.publish()
}

// placed returns the listeners whose namespaces exist, each named after the
// namespace it is in. mu is held.
func (r *Relay) placed(listeners map[string]xds.Resource) map[string]xds.Resource {
	out := map[string]xds.Resource{}
	for _, res := range listeners {
		var l listenerv3.Listener
		if err := proto.Unmarshal(res.Body.GetValue(), &l); err != nil {
			r.log.Error("a listener that cannot be read is left out", "name", res.Name, "error", err)
			continue
		}
		netns := l.GetAddress().GetSocketAddress().GetNetworkNamespaceFilepath()
		if netns == "" {
			out[res.Name] = res
			continue
		}
		inode, ok := r.present[netns]
		if !ok {
			continue
		}
		l.Name = fmt.Sprintf("%s@%d", res.Name, inode)
		// These, and not those inside the proxy, stop accepting when it drains;
		// see internal/proxy.
		l.TrafficDirection = corev3.TrafficDirection_INBOUND
		moved, err := xds.NewResource(l.Name, &l)
		if err != nil {
			r.log.Error("a listener that cannot be packed is left out", "name", res.Name, "error", err)
			continue
		}
		out[moved.Name] = moved
	}
	return out
}

package capture

import (
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/mesh"
)

// redirected matches the connections that the kernel has redirected to the proxy.
type redirected struct{}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (redirected) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	to := f.Reverse.SrcPort
	return f.Forward.Protocol == unix.IPPROTO_TCP && to != f.Forward.DstPort && (to == mesh.PortOutbound || to == mesh.PortInbound)
}

// forget has the kernel forget them. It remembers ended ones for some minutes, and
// would, if rules come back in that time, take packets of a connection between the
// same two ports that has begun meanwhile for theirs. Where the kernel cannot be
// asked to, it forgets them by itself.
func (n *NS) forget() {
	_ = n.do(func() error {
		for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			_, _ = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, redirected{})
		}
		return nil
	})
}

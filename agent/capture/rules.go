package capture

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/capture/nft"
	"github.com/signet-mesh/signet/internal/mesh"
)

const (
	tableName = "signet"
	// loopbackIndex is lo's interface index in every network namespace.
	loopbackIndex = 1
	// savedChain is attached to no hook. Its rules' comments hold the
	// settings from before Apply, so that they live and die with the
	// namespace, and survive this process.
	savedChain = "saved"
)

var table = &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}

type (
	chain = nft.Chain
	rule  = nft.Rule
)

// ruleset is what Apply writes and Verify expects, the saved chain apart.
func ruleset(o Options) []chain {
	// All rules but these hold for both families.
	var probesNAT, probesFilter []rule
	for _, port := range o.ports() {
		about := fmt.Sprintf("probes of port %d", port)
		for _, source := range []netip.Addr{ProbeSource, ProbeSource6} {
			from := slices.Concat(nft.Family(source), nft.TCP(), nft.Source(source), toPort(port))
			probesNAT = append(probesNAT, rule{Comment: about, Exprs: slices.Concat(from, nft.Done())})
			probesFilter = append(probesFilter, rule{Comment: about, Exprs: slices.Concat(from, nft.Direction(nft.Original), nft.Done())})
		}
	}
	past := []rule{
		{Comment: "nothing past the proxy", Exprs: slices.Concat(nft.TCP(), nft.Direction(nft.Original), nft.Reset())},
		// Not reset: a stray packet must not end the proxy's connection.
		{Comment: "nothing untracked", Exprs: slices.Concat(nft.TCP(), nft.Drop())},
	}
	var before []rule
	if o.KeepOpen {
		past = nil
		before = []rule{{Comment: "from before", Exprs: slices.Concat(nft.TCP(), nft.Begun(), nft.Done())}}
	}
	return []chain{
		{Name: "output_nat", Kind: nftables.ChainTypeNAT, Hook: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest, Rules: slices.Concat(before, []rule{
			{Comment: "the proxy's own sockets", Exprs: slices.Concat(mark(), nft.Done())},
			{Comment: "inside the namespace", Exprs: slices.Concat(toLoopback(), nft.Done())},
			// A socket that dialled one is bound to the interface, and would not
			// hear from the proxy on loopback. What is not redirected is refused.
			{Comment: "link-local", Exprs: slices.Concat(nft.TCP(), toLinkLocal(), nft.Done())},
			{Comment: "outbound", Exprs: slices.Concat(nft.TCP(), redirect(mesh.PortOutbound))},
		})},
		{Name: "input_nat", Kind: nftables.ChainTypeNAT, Hook: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest, Rules: slices.Concat(before, []rule{
			{Comment: "inside the namespace", Exprs: slices.Concat(fromLoopback(), nft.Done())},
		}, probesNAT, []rule{
			{Comment: "tunnels", Exprs: slices.Concat(nft.TCP(), toPort(mesh.PortTunnel), nft.Done())},
			{Comment: "inbound without a tunnel", Exprs: slices.Concat(nft.TCP(), redirect(mesh.PortInbound))},
		})},
		{Name: "output_filter", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter, Rules: slices.Concat([]rule{
			{Comment: "no loop into the proxy", Exprs: slices.Concat(mark(), toLoopback(), nft.TCP(), toPort(mesh.PortOutbound), nft.Reset())},
			{Comment: "no loop into the proxy", Exprs: slices.Concat(mark(), toLoopback(), nft.TCP(), toPort(mesh.PortInbound), nft.Reset())},
			{Comment: "resets may leave", Exprs: slices.Concat(nft.TCP(), nft.Resets(), nft.Done())},
			// The kernel redirects a connection by its first packet only.
			// What it took for a part of an older one is caught here.
			{Comment: "the proxy's own sockets", Exprs: slices.Concat(mark(), nft.Done())},
			{Comment: "inside the namespace", Exprs: slices.Concat(toLoopback(), nft.Done())},
			{Comment: "answers", Exprs: slices.Concat(nft.TCP(), nft.Direction(nft.Reply), nft.Done())},
			{Comment: "redirected", Exprs: slices.Concat(nft.TCP(), translated(), nft.Done())},
		}, past)},
		{Name: "input_filter", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter, Rules: slices.Concat([]rule{
			{Comment: "inside the namespace", Exprs: slices.Concat(fromLoopback(), nft.Done())},
		}, probesFilter, []rule{
			{Comment: "redirected", Exprs: slices.Concat(nft.TCP(), toPort(mesh.PortInbound), nft.Done())},
			{Comment: "tunnels", Exprs: slices.Concat(nft.TCP(), toPort(mesh.PortTunnel), nft.Done())},
			{Comment: "answers", Exprs: slices.Concat(nft.TCP(), nft.Direction(nft.Reply), nft.Done())},
		}, past)},
		{Name: "vouch", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityLast, Rules: []rule{
			{Comment: "what leaves went by these rules", Exprs: vouch()},
		}},
	}
}

// translation is what the kernel needs to go on with the connections that it
// has redirected, and redirects none: it tracks connections only while a rule
// asks about them, and translates only while a chain could say how.
func translation() []chain {
	tracked := []rule{{Comment: "tracked", Exprs: slices.Concat(nft.TCP(), translated(), nft.Done())}}
	return []chain{
		{Name: "output_nat", Kind: nftables.ChainTypeNAT, Hook: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest, Rules: tracked},
		{Name: "input_nat", Kind: nftables.ChainTypeNAT, Hook: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest, Rules: tracked},
	}
}

func mark() []expr.Any {
	return nft.Meta(expr.MetaKeyMARK, expr.CmpOpEq, nft.Native(mesh.SocketMark))
}

func toLoopback() []expr.Any {
	return nft.Meta(expr.MetaKeyOIF, expr.CmpOpEq, nft.Native(loopbackIndex))
}

func fromLoopback() []expr.Any {
	return nft.Meta(expr.MetaKeyIIF, expr.CmpOpEq, nft.Native(loopbackIndex))
}

func toPort(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
	}
}

// toLinkLocal matches packets to fe80::/10.
func toLinkLocal() []expr.Any {
	return slices.Concat(nft.Family(netip.IPv6Unspecified()), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: nft.DestinationAt(netip.IPv6Unspecified()), Len: 2},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 2, Mask: []byte{0xff, 0xc0}, Xor: []byte{0, 0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0xfe, 0x80}},
	})
}

// translated matches connections whose destination the kernel changed.
func translated() []expr.Any {
	const dstNAT = 1 << 5 // IPS_DST_NAT
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: nft.Native(dstNAT), Xor: nft.Native(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: nft.Native(0)},
	}
}

func redirect(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
		// Both bounds and the flag as the kernel reports them, for Verify.
		&expr.Redir{RegisterProtoMin: 1, RegisterProtoMax: 1, Flags: unix.NF_NAT_RANGE_PROTO_SPECIFIED},
	}
}

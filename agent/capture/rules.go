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
	var probesNAT, probesFilter []rule
	for _, port := range o.ports() {
		about := fmt.Sprintf("probes of port %d", port)
		probesNAT = append(probesNAT, rule{Comment: about, Exprs: exprs(ipv4(), tcp(), from(ProbeSource), toPort(port), done())})
		probesFilter = append(probesFilter, rule{Comment: about, Exprs: exprs(ipv4(), tcp(), from(ProbeSource), toPort(port), direction(original), done())})
	}
	return []chain{
		{Name: "output_nat", Kind: nftables.ChainTypeNAT, Hook: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest, Rules: []rule{
			{Comment: "the proxy's own sockets", Exprs: exprs(mark(), done())},
			{Comment: "inside the namespace", Exprs: exprs(toLoopback(expr.CmpOpEq), done())},
			{Comment: "outbound", Exprs: exprs(ipv4(), tcp(), redirect(mesh.PortOutbound))},
		}},
		{Name: "input_nat", Kind: nftables.ChainTypeNAT, Hook: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest, Rules: slices.Concat([]rule{
			{Comment: "inside the namespace", Exprs: exprs(fromLoopback(expr.CmpOpEq), done())},
		}, probesNAT, []rule{
			{Comment: "tunnels", Exprs: exprs(ipv4(), tcp(), toPort(mesh.PortTunnel), done())},
			{Comment: "inbound without a tunnel", Exprs: exprs(ipv4(), tcp(), redirect(mesh.PortInbound))},
		})},
		{Name: "output_filter", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter, Rules: []rule{
			{Comment: "no loop into the proxy", Exprs: exprs(mark(), toLoopback(expr.CmpOpEq), tcp(), toPort(mesh.PortOutbound), reset())},
			{Comment: "no loop into the proxy", Exprs: exprs(mark(), toLoopback(expr.CmpOpEq), tcp(), toPort(mesh.PortInbound), reset())},
			{Comment: "resets may leave", Exprs: exprs(tcp(), resets(), done())},
			{Comment: "no IPv6 past the proxy", Exprs: exprs(ipv6(), tcp(), toLoopback(expr.CmpOpNeq), reset())},
			// The kernel redirects a connection by its first packet only.
			// What it took for a part of an older one is caught here.
			{Comment: "the proxy's own sockets", Exprs: exprs(mark(), done())},
			{Comment: "inside the namespace", Exprs: exprs(toLoopback(expr.CmpOpEq), done())},
			{Comment: "answers", Exprs: exprs(tcp(), direction(reply), done())},
			{Comment: "redirected", Exprs: exprs(tcp(), translated(), done())},
			{Comment: "nothing past the proxy", Exprs: exprs(ipv4(), tcp(), direction(original), reset())},
			{Comment: "nothing untracked", Exprs: exprs(ipv4(), tcp(), drop())},
		}},
		{Name: "input_filter", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter, Rules: slices.Concat([]rule{
			{Comment: "inside the namespace", Exprs: exprs(fromLoopback(expr.CmpOpEq), done())},
			{Comment: "no IPv6 past the proxy", Exprs: exprs(ipv6(), tcp(), reset())},
		}, probesFilter, []rule{
			{Comment: "redirected", Exprs: exprs(ipv4(), tcp(), toPort(mesh.PortInbound), done())},
			{Comment: "tunnels", Exprs: exprs(ipv4(), tcp(), toPort(mesh.PortTunnel), done())},
			{Comment: "answers", Exprs: exprs(tcp(), direction(reply), done())},
			{Comment: "nothing past the proxy", Exprs: exprs(ipv4(), tcp(), direction(original), reset())},
			// Not reset: a stray packet must not end the proxy's connection.
			{Comment: "nothing untracked", Exprs: exprs(ipv4(), tcp(), drop())},
		})},
	}
}

func exprs(parts ...[]expr.Any) []expr.Any {
	var out []expr.Any
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

// meta compares a fact about the packet.
func meta(key expr.MetaKey, op expr.CmpOp, value []byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: value},
	}
}

func native(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

func mark() []expr.Any {
	return meta(expr.MetaKeyMARK, expr.CmpOpEq, native(mesh.SocketMark))
}

func toLoopback(op expr.CmpOp) []expr.Any {
	return meta(expr.MetaKeyOIF, op, native(loopbackIndex))
}

func fromLoopback(op expr.CmpOp) []expr.Any {
	return meta(expr.MetaKeyIIF, op, native(loopbackIndex))
}

func ipv4() []expr.Any {
	return meta(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{unix.NFPROTO_IPV4})
}

func ipv6() []expr.Any {
	return meta(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{unix.NFPROTO_IPV6})
}

func tcp() []expr.Any {
	return meta(expr.MetaKeyL4PROTO, expr.CmpOpEq, []byte{unix.IPPROTO_TCP})
}

// from matches packets by their source.
func from(a netip.Addr) []expr.Any {
	const sourceAt = 12
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: sourceAt, Len: 4},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: a.AsSlice()},
	}
}

func toPort(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
	}
}

// resets matches TCP resets: refusals and destroyed connections must be told
// to the peer. They carry no data.
func resets() []expr.Any {
	const flagsAt, rst = 13, 0x04
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: flagsAt, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{rst}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0}},
	}
}

// The directions of a tracked connection, as the kernel numbers them.
const (
	original = 0 // of its first packet
	reply    = 1
)

// direction matches packets of tracked connections.
func direction(d byte) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{d}},
	}
}

// translated matches connections whose destination the kernel changed.
func translated() []expr.Any {
	const dstNAT = 1 << 5 // IPS_DST_NAT
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native(dstNAT), Xor: native(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: native(0)},
	}
}

func drop() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}} }

func done() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}} }

func reset() []expr.Any { return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}} }

func redirect(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
		// Both bounds and the flag as the kernel reports them, for Verify.
		&expr.Redir{RegisterProtoMin: 1, RegisterProtoMax: 1, Flags: unix.NF_NAT_RANGE_PROTO_SPECIFIED},
	}
}

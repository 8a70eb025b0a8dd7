package capture

import (
	"encoding/binary"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

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

// chain is one chain of the table with its rules, in order.
type chain struct {
	name     string
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
	rules    []rule
}

type rule struct {
	comment string
	exprs   []expr.Any
}

// ruleset is what Apply writes and Verify expects, the saved chain apart.
func ruleset() []chain {
	return []chain{
		{"output_nat", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest, []rule{
			{"the proxy's own sockets", exprs(mark(), done())},
			{"inside the namespace", exprs(toLoopback(expr.CmpOpEq), done())},
			{"outbound", exprs(ipv4(), tcp(), redirect(mesh.PortOutbound))},
		}},
		{"input_nat", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, []rule{
			{"inside the namespace", exprs(fromLoopback(expr.CmpOpEq), done())},
			{"tunnels", exprs(ipv4(), tcp(), toPort(mesh.PortTunnel), done())},
			{"inbound without a tunnel", exprs(ipv4(), tcp(), redirect(mesh.PortInbound))},
		}},
		{"output_filter", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityFilter, []rule{
			{"no loop into the proxy", exprs(mark(), toLoopback(expr.CmpOpEq), tcp(), toPort(mesh.PortOutbound), reset())},
			{"no loop into the proxy", exprs(mark(), toLoopback(expr.CmpOpEq), tcp(), toPort(mesh.PortInbound), reset())},
			{"resets may leave", exprs(tcp(), resets(), done())},
			{"no IPv6 past the proxy", exprs(ipv6(), tcp(), toLoopback(expr.CmpOpNeq), reset())},
			// The kernel redirects a connection by its first packet only.
			// What it took for a part of an older one is caught here.
			{"the proxy's own sockets", exprs(mark(), done())},
			{"inside the namespace", exprs(toLoopback(expr.CmpOpEq), done())},
			{"answers", exprs(tcp(), direction(reply), done())},
			{"redirected", exprs(tcp(), translated(), done())},
			{"nothing past the proxy", exprs(ipv4(), tcp(), direction(original), reset())},
			{"nothing untracked", exprs(ipv4(), tcp(), drop())},
		}},
		{"input_filter", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, []rule{
			{"inside the namespace", exprs(fromLoopback(expr.CmpOpEq), done())},
			{"no IPv6 past the proxy", exprs(ipv6(), tcp(), reset())},
			{"redirected", exprs(ipv4(), tcp(), toPort(mesh.PortInbound), done())},
			{"tunnels", exprs(ipv4(), tcp(), toPort(mesh.PortTunnel), done())},
			{"answers", exprs(tcp(), direction(reply), done())},
			{"nothing past the proxy", exprs(ipv4(), tcp(), direction(original), reset())},
			// Not reset: a stray packet must not end the proxy's connection.
			{"nothing untracked", exprs(ipv4(), tcp(), drop())},
		}},
	}
}

// chain returns c as the netlink library wants it.
func (c *chain) chain() *nftables.Chain {
	out := &nftables.Chain{Name: c.name, Table: table, Type: c.kind, Hooknum: c.hook, Priority: c.priority}
	if c.hook != nil {
		accept := nftables.ChainPolicyAccept
		out.Policy = &accept
	}
	return out
}

func comment(s string) []byte {
	return userdata.AppendString(nil, userdata.TypeComment, s)
}

// commentText is the inverse of comment; "" for anything else. The bytes may
// be of somebody else's making, so the library's reader, which trusts the
// lengths in them, is not used.
func commentText(b []byte) string {
	if len(b) < 3 || b[0] != byte(userdata.TypeComment) || int(b[1]) != len(b)-2 {
		return ""
	}
	return strings.TrimSuffix(string(b[2:]), "\x00")
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

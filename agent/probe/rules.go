package probe

import (
	"encoding/binary"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/agent/capture/nft"
)

var (
	table       = &nftables.Table{Name: "signet", Family: nftables.TableFamilyINet}
	bridgeTable = &nftables.Table{Name: "signet", Family: nftables.TableFamilyBridge}
)

const (
	setName     = "probes"
	rootComment = "probes by root"
)

// label is the conntrack label of connections that the kubelet made to a
// probed port: bit 93, which is in nobody's use.
var label = [16]byte{11: 1 << 5}

// register9 is the 32-bit register behind the first four bytes of register 1;
// together they hold an address and a port.
const register9 = unix.NFT_REG32_01

func probedSet() *nftables.Set {
	return &nftables.Set{
		Table:         table,
		Name:          setName,
		KeyType:       nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService),
		Concatenation: true,
	}
}

// key is the set's form of a target: the address, the port, and padding.
func (t target) key() []byte {
	return append(binary.BigEndian.AppendUint16(t.addr.AsSlice(), t.port), 0, 0)
}

// ruleset is what belongs into the table "inet signet".
func ruleset(w *who) []nft.Chain {
	before := func(p *nftables.ChainPriority) *nftables.ChainPriority { return nftables.ChainPriorityRef(*p - 1) }
	return []nft.Chain{
		{Name: "claimed", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw, Rules: []nft.Rule{
			{Comment: "nobody else has this source", Exprs: exprs(ipv4(), fromProbe(), drop())},
		}},
		{Name: "answers", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle, Rules: []nft.Rule{
			{Comment: "answers to the kubelet", Exprs: exprs(ipv4(), toProbe(), reply(), labelled(), done())},
			{Comment: "answers to a forged source", Exprs: exprs(ipv4(), toProbe(), tcp(), reset())},
			{Comment: "nothing else", Exprs: exprs(ipv4(), toProbe(), drop())},
		}},
		{Name: "kubelet", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookOutput, Priority: nftables.ChainPriorityMangle, Rules: append([]nft.Rule{
			{Comment: "resets of forged connections", Exprs: exprs(ipv4(), fromProbe(), tcp(), resets(), done())},
			{Comment: "nobody else has this source", Exprs: exprs(ipv4(), fromProbe(), drop())},
		}, w.rules()...)},
		// Before kube-proxy and the CNI plugins change the source.
		{Name: "source", Kind: nftables.ChainTypeNAT, Hook: nftables.ChainHookPostrouting, Priority: before(nftables.ChainPriorityNATSource), Rules: []nft.Rule{
			{Comment: "the kubelet's connections", Exprs: exprs(ipv4(), tcp(), labelled(), snat())},
		}},
	}
}

// bridgeRuleset is what belongs into the table "bridge signet": packets between
// two ports of a bridge do not pass the other one.
func bridgeRuleset() []nft.Chain {
	raw := nftables.ChainPriorityRaw
	return []nft.Chain{
		{Name: "claimed", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookPrerouting, Priority: raw, Rules: []nft.Rule{
			{Comment: "nobody else has this source", Exprs: exprs(meta(expr.MetaKeyPROTOCOL, []byte{0x08, 0x00}), fromProbe(), drop())},
		}},
	}
}

// rules label the kubelet's connections.
func (w *who) rules() []nft.Rule {
	if w.kind == Root {
		return []nft.Rule{{Comment: rootComment, Exprs: exprs(ipv4(), tcp(), probed(), meta(expr.MetaKeySKUID, native(0)), setLabel())}}
	}
	return []nft.Rule{
		// A socket in the kubelet's cgroup itself has no ancestor at the next
		// level, and then the expression does not match.
		{Comment: "below the kubelet's cgroup", Exprs: exprs(ipv4(), tcp(), probed(), cgroup(w.level+1, expr.CmpOpNeq, 0), done())},
		{Comment: "probes by the kubelet", Exprs: exprs(ipv4(), tcp(), probed(), cgroup(w.level, expr.CmpOpEq, w.id), setLabel())},
	}
}

func exprs(parts ...[]expr.Any) []expr.Any {
	var out []expr.Any
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

func meta(key expr.MetaKey, value []byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value},
	}
}

func native(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

func ipv4() []expr.Any { return meta(expr.MetaKeyNFPROTO, []byte{unix.NFPROTO_IPV4}) }

func tcp() []expr.Any { return meta(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_TCP}) }

// Where the addresses are in an IPv4 header.
const (
	sourceAt      = 12
	destinationAt = 16
)

func address(at uint32) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: at, Len: 4},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: capture.ProbeSource.AsSlice()},
	}
}

func fromProbe() []expr.Any { return address(sourceAt) }

func toProbe() []expr.Any { return address(destinationAt) }

// probed matches connections to a member of the set.
func probed() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: destinationAt, Len: 4},
		&expr.Payload{DestRegister: register9, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: 1, SetName: setName},
	}
}

// cgroup compares the number of the ancestor, at a level below the root, of the
// cgroup that the packet's socket was made in.
func cgroup(level uint32, op expr.CmpOp, id uint64) []expr.Any {
	return []expr.Any{
		&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: level, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: binary.NativeEndian.AppendUint64(nil, id)},
	}
}

// resets matches TCP resets.
func resets() []expr.Any {
	const flagsAt, rst = 13, 0x04
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: flagsAt, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{rst}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0}},
	}
}

// reply matches packets against the direction of their connection's first one.
func reply() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{1}},
	}
}

func labelled() []expr.Any {
	zero := make([]byte, len(label))
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyLABELS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(len(label)), Mask: label[:], Xor: zero},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: zero},
	}
}

func setLabel() []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: label[:]},
		&expr.Ct{Key: expr.CtKeyLABELS, Register: 1, SourceRegister: true},
	}
}

func snat() []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: capture.ProbeSource.AsSlice()},
		// Both bounds, as the kernel reports them.
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegAddrMax: 1},
	}
}

func drop() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}} }

func done() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}} }

func reset() []expr.Any { return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}} }

package probe

import (
	"encoding/binary"
	"slices"

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
			{Comment: "nobody else has this source", Exprs: slices.Concat(ipv4(), fromProbe(), nft.Drop())},
		}},
		{Name: "answers", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle, Rules: []nft.Rule{
			{Comment: "answers to the kubelet", Exprs: slices.Concat(ipv4(), toProbe(), nft.Direction(nft.Reply), labelled(), nft.Done())},
			{Comment: "answers to a forged source", Exprs: slices.Concat(ipv4(), toProbe(), nft.TCP(), nft.Reset())},
			{Comment: "nothing else", Exprs: slices.Concat(ipv4(), toProbe(), nft.Drop())},
		}},
		{Name: "kubelet", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookOutput, Priority: nftables.ChainPriorityMangle, Rules: append([]nft.Rule{
			{Comment: "resets of forged connections", Exprs: slices.Concat(ipv4(), fromProbe(), nft.TCP(), nft.Resets(), nft.Done())},
			{Comment: "nobody else has this source", Exprs: slices.Concat(ipv4(), fromProbe(), nft.Drop())},
		}, w.rules()...)},
		// Before kube-proxy and the CNI plugins change the source.
		{Name: "source", Kind: nftables.ChainTypeNAT, Hook: nftables.ChainHookPostrouting, Priority: before(nftables.ChainPriorityNATSource), Rules: []nft.Rule{
			{Comment: "the kubelet's connections", Exprs: slices.Concat(ipv4(), nft.TCP(), labelled(), snat())},
		}},
	}
}

// bridgeRuleset is what belongs into the table "bridge signet": packets between
// two ports of a bridge do not pass the other one.
func bridgeRuleset() []nft.Chain {
	raw := nftables.ChainPriorityRaw
	return []nft.Chain{
		{Name: "claimed", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookPrerouting, Priority: raw, Rules: []nft.Rule{
			{Comment: "nobody else has this source", Exprs: slices.Concat(nft.Meta(expr.MetaKeyPROTOCOL, expr.CmpOpEq, []byte{0x08, 0x00}), fromProbe(), nft.Drop())},
		}},
	}
}

// rules label the kubelet's connections.
func (w *who) rules() []nft.Rule {
	if w.kind == Root {
		return []nft.Rule{{Comment: rootComment, Exprs: slices.Concat(ipv4(), nft.TCP(), probed(), nft.Meta(expr.MetaKeySKUID, expr.CmpOpEq, nft.Native(0)), setLabel())}}
	}
	return []nft.Rule{
		// A socket in the kubelet's cgroup itself has no ancestor at the next
		// level, and then the expression does not match.
		{Comment: "below the kubelet's cgroup", Exprs: slices.Concat(ipv4(), nft.TCP(), probed(), cgroup(w.level+1, expr.CmpOpNeq, 0), nft.Done())},
		{Comment: "probes by the kubelet", Exprs: slices.Concat(ipv4(), nft.TCP(), probed(), cgroup(w.level, expr.CmpOpEq, w.id), setLabel())},
	}
}

func ipv4() []expr.Any { return nft.Family(capture.ProbeSource) }

func fromProbe() []expr.Any { return nft.Source(capture.ProbeSource) }

func toProbe() []expr.Any { return nft.Destination(capture.ProbeSource) }

// probed matches connections to a member of the set.
func probed() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: nft.DestinationAt(capture.ProbeSource), Len: 4},
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

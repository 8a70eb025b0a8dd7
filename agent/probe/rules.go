package probe

import (
	"encoding/binary"
	"net/netip"
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

const rootComment = "probes by root"

// family is what differs between IPv4 and IPv6.
type family struct {
	source    netip.Addr // of probes, as the pods see them
	addrType  nftables.SetDatatype
	etherType []byte
	// portRegister is the 32-bit register behind those of register 1 that an
	// address takes; together they hold an address and a port.
	portRegister uint32
}

var families = []*family{
	{source: capture.ProbeSource, addrType: nftables.TypeIPAddr, etherType: []byte{0x08, 0x00}, portRegister: unix.NFT_REG32_01},
	{source: capture.ProbeSource6, addrType: nftables.TypeIP6Addr, etherType: []byte{0x86, 0xdd}, portRegister: unix.NFT_REG_2},
}

// both makes a rule for each family.
func both(comment string, exprs func(f *family) []expr.Any) []nft.Rule {
	var out []nft.Rule
	for _, f := range families {
		out = append(out, nft.Rule{Comment: comment, Exprs: slices.Concat(nft.Family(f.source), exprs(f))})
	}
	return out
}

// label is the conntrack label of connections that the kubelet made to a
// probed port: bit 93, which is in nobody's use.
var label = [16]byte{11: 1 << 5}

// set holds the family's addresses and ports that are probed.
func (f *family) set() *nftables.Set {
	name := "probes"
	if f.source.Is6() {
		name = "probes6"
	}
	return &nftables.Set{
		Table:         table,
		Name:          name,
		KeyType:       nftables.MustConcatSetType(f.addrType, nftables.TypeInetService),
		Concatenation: true,
	}
}

// has reports whether an address is of the family.
func (f *family) has(a netip.Addr) bool { return a.Is4() == f.source.Is4() }

// key is the set's form of a target: the address, the port, and padding.
func (t target) key() []byte {
	return append(binary.BigEndian.AppendUint16(t.addr.AsSlice(), t.port), 0, 0)
}

// ruleset is what belongs into the table "inet signet".
func ruleset(w *who) []nft.Chain {
	before := func(p *nftables.ChainPriority) *nftables.ChainPriority { return nftables.ChainPriorityRef(*p - 1) }
	return []nft.Chain{
		{Name: "claimed", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw, Rules: both("nobody else has this source", func(f *family) []expr.Any {
			return slices.Concat(nft.Source(f.source), nft.Drop())
		})},
		{Name: "answers", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle, Rules: slices.Concat(
			both("answers to the kubelet", func(f *family) []expr.Any {
				return slices.Concat(nft.Destination(f.source), nft.Direction(nft.Reply), labelled(), nft.Done())
			}),
			both("answers to a forged source", func(f *family) []expr.Any {
				return slices.Concat(nft.Destination(f.source), nft.TCP(), nft.Reset())
			}),
			both("nothing else", func(f *family) []expr.Any {
				return slices.Concat(nft.Destination(f.source), nft.Drop())
			}),
		)},
		{Name: "kubelet", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookOutput, Priority: nftables.ChainPriorityMangle, Rules: slices.Concat(
			both("resets of forged connections", func(f *family) []expr.Any {
				return slices.Concat(nft.Source(f.source), nft.TCP(), nft.Resets(), nft.Done())
			}),
			both("nobody else has this source", func(f *family) []expr.Any {
				return slices.Concat(nft.Source(f.source), nft.Drop())
			}),
			w.rules(),
		)},
		// Before kube-proxy and the CNI plugins change the source.
		{Name: "source", Kind: nftables.ChainTypeNAT, Hook: nftables.ChainHookPostrouting, Priority: before(nftables.ChainPriorityNATSource), Rules: both("the kubelet's connections", func(f *family) []expr.Any {
			return slices.Concat(nft.TCP(), labelled(), f.snat())
		})},
	}
}

// bridgeRuleset is what belongs into the table "bridge signet": packets between
// two ports of a bridge do not pass the other one.
func bridgeRuleset() []nft.Chain {
	var claimed []nft.Rule
	for _, f := range families {
		claimed = append(claimed, nft.Rule{Comment: "nobody else has this source", Exprs: slices.Concat(
			nft.Meta(expr.MetaKeyPROTOCOL, expr.CmpOpEq, f.etherType), nft.Source(f.source), nft.Drop())})
	}
	return []nft.Chain{{Name: "claimed", Kind: nftables.ChainTypeFilter, Hook: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw, Rules: claimed}}
}

// rules label the kubelet's connections.
func (w *who) rules() []nft.Rule {
	if w.kind == Root {
		return both(rootComment, func(f *family) []expr.Any {
			return slices.Concat(nft.TCP(), f.probed(), nft.Meta(expr.MetaKeySKUID, expr.CmpOpEq, nft.Native(0)), setLabel())
		})
	}
	return slices.Concat(
		// A socket in the kubelet's cgroup itself has no ancestor at the next
		// level, and then the expression does not match.
		both("below the kubelet's cgroup", func(f *family) []expr.Any {
			return slices.Concat(nft.TCP(), f.probed(), cgroup(w.level+1, expr.CmpOpNeq, 0), nft.Done())
		}),
		both("probes by the kubelet", func(f *family) []expr.Any {
			return slices.Concat(nft.TCP(), f.probed(), cgroup(w.level, expr.CmpOpEq, w.id), setLabel())
		}),
	)
}

// probed matches connections to a member of the set.
func (f *family) probed() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: nft.DestinationAt(f.source), Len: uint32(f.source.BitLen() / 8)},
		&expr.Payload{DestRegister: f.portRegister, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: 1, SetName: f.set().Name},
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

func (f *family) snat() []expr.Any {
	of := uint32(unix.NFPROTO_IPV4)
	if f.source.Is6() {
		of = unix.NFPROTO_IPV6
	}
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: f.source.AsSlice()},
		// Both bounds, as the kernel reports them.
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: of, RegAddrMin: 1, RegAddrMax: 1},
	}
}

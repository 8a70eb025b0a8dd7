package nft

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The words that rules are made of. Each matches, and lets the rule go on, or
// ends it; slices.Concat makes a rule of them. They use register 1.

// Meta compares a fact about the packet.
func Meta(key expr.MetaKey, op expr.CmpOp, value []byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: value},
	}
}

// Native is a number as the kernel keeps it.
func Native(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// Family matches packets of an address's family.
func Family(a netip.Addr) []expr.Any {
	family := byte(unix.NFPROTO_IPV6)
	if a.Is4() {
		family = unix.NFPROTO_IPV4
	}
	return Meta(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{family})
}

// TCP matches packets of TCP.
func TCP() []expr.Any {
	return Meta(expr.MetaKeyL4PROTO, expr.CmpOpEq, []byte{unix.IPPROTO_TCP})
}

// Source matches packets of the address's family by their source.
func Source(a netip.Addr) []expr.Any {
	if a.Is4() {
		return address(12, a)
	}
	return address(8, a)
}

// Destination matches packets of the address's family by their destination.
func Destination(a netip.Addr) []expr.Any {
	return address(DestinationAt(a), a)
}

// DestinationAt is where the destination is in the header of the address's
// family.
func DestinationAt(a netip.Addr) uint32 {
	if a.Is4() {
		return 16
	}
	return 24
}

func address(at uint32, a netip.Addr) []expr.Any {
	b := a.AsSlice()
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: at, Len: uint32(len(b))},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: b},
	}
}

// Resets matches TCP resets. They carry no data.
func Resets() []expr.Any {
	const flagsAt, rst = 13, 0x04
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: flagsAt, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{rst}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0}},
	}
}

// Begun matches TCP packets that do not begin a connection.
func Begun() []expr.Any {
	const flagsAt, syn = 13, 0x02
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: flagsAt, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{syn}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0}},
	}
}

// The directions of a tracked connection, as the kernel numbers them.
const (
	Original = 0 // of its first packet
	Reply    = 1
)

// Direction matches packets of tracked connections.
func Direction(d byte) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{d}},
	}
}

// Drop ends the packet.
func Drop() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}} }

// Done ends the chain and lets the packet go on.
func Done() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}} }

// Reset ends the packet and tells its sender with a TCP reset.
func Reset() []expr.Any { return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}} }

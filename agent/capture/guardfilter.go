package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Where the kernel cannot hang a program on a link itself, before Linux 6.6, the
// guard is a filter below a queueing discipline of the link. While that comes or
// goes, the kernel drops what the link is to send, for some milliseconds.

const (
	guardName = "signet-guard"
	// guardPriority comes before filters of others, which see what it lets pass.
	guardPriority, guardHandle = 1, 0x5160e7
	// What a filter says of a packet.
	filterNext, filterDrop = 0xffffffff, 2
)

// guardProgram is classic packet filter code, which needs neither a compiler nor
// a right that the agent has not. IPv6 packets with headers before TCP's are
// taken for TCP: what they hold may be hidden well.
func guardProgram() []bpf.RawInstruction {
	const netOff = 0xfff00000 // SKF_NET_OFF
	program := []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtMark},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: vouched, SkipTrue: 12},
		bpf.LoadExtension{Num: bpf.ExtProto},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_IP, SkipTrue: 8},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.ETH_P_IPV6, SkipTrue: 9},
		bpf.LoadAbsolute{Off: netOff + protocolV6, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_TCP, SkipTrue: 8},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_HOPOPTS, SkipTrue: 7},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_ROUTING, SkipTrue: 6},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_FRAGMENT, SkipTrue: 5},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_AH, SkipTrue: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_DSTOPTS, SkipTrue: 3, SkipFalse: 2},
		bpf.LoadAbsolute{Off: netOff + protocolV4, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_TCP, SkipTrue: 1},
		bpf.RetConstant{Val: filterNext},
		bpf.RetConstant{Val: filterDrop},
	}
	raw, err := bpf.Assemble(program)
	if err != nil {
		panic(err) // it is the same each time
	}
	return raw
}

// guardOps is the program as the kernel takes it and gives it back.
func guardOps() []byte {
	var out []byte
	for _, i := range guardProgram() {
		out = binary.NativeEndian.AppendUint16(out, i.Op)
		out = append(out, i.Jt, i.Jf)
		out = binary.NativeEndian.AppendUint32(out, i.K)
	}
	return out
}

// filtered reports whether a link has the guard as a filter, and it does what it should.
func filtered(l netlink.Link) (bool, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETTFILTER, unix.NLM_F_DUMP)
	req.AddData(guardAt(l, 0))
	messages, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWTFILTER)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return false, nil // no link any more, or nothing that filters hang on
	}
	if err != nil {
		return false, fmt.Errorf("list filters of link %s: %w", l.Attrs().Name, err)
	}
	for _, m := range messages {
		msg := nl.DeserializeTcMsg(m)
		if msg.Handle != guardHandle || msg.Info>>16 != guardPriority {
			continue
		}
		attrs, err := nl.ParseRouteAttr(m[msg.Len():])
		if err != nil {
			return false, fmt.Errorf("list filters of link %s: %w", l.Attrs().Name, err)
		}
		for _, a := range attrs {
			if a.Attr.Type != nl.TCA_OPTIONS {
				continue
			}
			options, err := nl.ParseRouteAttr(a.Value)
			if err != nil {
				return false, fmt.Errorf("list filters of link %s: %w", l.Attrs().Name, err)
			}
			var ops []byte
			direct := false
			for _, o := range options {
				switch o.Attr.Type {
				case nl.TCA_BPF_OPS:
					ops = o.Value
				case nl.TCA_BPF_FLAGS:
					direct = len(o.Value) == 4 && binary.NativeEndian.Uint32(o.Value)&nl.TCA_BPF_FLAG_ACT_DIRECT != 0
				}
			}
			return direct && slices.Equal(ops, guardOps()), nil
		}
	}
	return false, nil
}

// guardAt is where the guard hangs on a link.
func guardAt(l netlink.Link, handle uint32) *nl.TcMsg {
	msg := &nl.TcMsg{Family: nl.FAMILY_ALL, Ifindex: int32(l.Attrs().Index), Parent: netlink.HANDLE_MIN_EGRESS, Handle: handle}
	if handle != 0 {
		msg.Info = netlink.MakeHandle(guardPriority, nl.Swap16(unix.ETH_P_ALL))
	}
	return msg
}

func filterLink(l netlink.Link) error {
	if err := netlink.QdiscAdd(clsact(l)); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	req := nl.NewNetlinkRequest(unix.RTM_NEWTFILTER, unix.NLM_F_CREATE|unix.NLM_F_REPLACE|unix.NLM_F_ACK)
	req.AddData(guardAt(l, guardHandle))
	req.AddData(nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated("bpf")))
	options := nl.NewRtAttr(nl.TCA_OPTIONS, nil)
	ops := guardOps()
	options.AddRtAttr(nl.TCA_BPF_OPS_LEN, nl.Uint16Attr(uint16(len(guardProgram()))))
	options.AddRtAttr(nl.TCA_BPF_OPS, ops)
	options.AddRtAttr(nl.TCA_BPF_NAME, nl.ZeroTerminated(guardName))
	options.AddRtAttr(nl.TCA_BPF_FLAGS, nl.Uint32Attr(nl.TCA_BPF_FLAG_ACT_DIRECT))
	req.AddData(options)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func clsact(l netlink.Link) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

// unfilterLink reports whether there was a filter.
func unfilterLink(l netlink.Link) (had bool, err error) {
	if had, err = filtered(l); err != nil || !had {
		return had, err
	}
	req := nl.NewNetlinkRequest(unix.RTM_DELTFILTER, unix.NLM_F_ACK)
	req.AddData(guardAt(l, guardHandle))
	req.AddData(nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated("bpf")))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
		return true, fmt.Errorf("link %s: %w", l.Attrs().Name, err)
	}
	return true, nil
}

// unhangLink removes what filters hang on, unless there are any.
func unhangLink(l netlink.Link) error {
	all, err := netlink.QdiscList(l)
	if err != nil {
		return fmt.Errorf("link %s: %w", l.Attrs().Name, err)
	}
	if !slices.ContainsFunc(all, func(q netlink.Qdisc) bool { return q.Type() == "clsact" }) {
		return nil
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		others, err := netlink.FilterList(l, parent)
		if err != nil || len(others) > 0 {
			return err
		}
	}
	if err := netlink.QdiscDel(clsact(l)); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("link %s: %w", l.Attrs().Name, err)
	}
	return nil
}

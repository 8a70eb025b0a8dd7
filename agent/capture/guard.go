package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/capture/nft"
)

// The guard is what is left when the rules are gone: a packet filter of another
// part of the kernel, at the way out of each link, that drops TCP which the
// rules have not vouched for. So a namespace whose rules somebody deleted is
// cut off until they are repaired, rather than open: a handshake from outside
// gets no answer, one to the outside is not heard.

// vouched is the mark that the last of the rules puts on what leaves by a link,
// where it replaces whatever mark was there. Links to other namespaces take it
// off again.
const vouched = 0x5160e7ed

// vouch is that last rule.
func vouch() []expr.Any {
	return slices.Concat(nft.Meta(expr.MetaKeyOIF, expr.CmpOpNeq, nft.Native(loopbackIndex)), []expr.Any{
		&expr.Immediate{Register: 1, Data: nft.Native(vouched)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
	})
}

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
	const netOff, protocolV4, protocolV6 = 0xfff00000, 9, 6 // SKF_NET_OFF, and where headers name the next
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

// links returns the namespace's ways out. It runs in the namespace.
func links() ([]netlink.Link, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	return slices.DeleteFunc(all, func(l netlink.Link) bool { return l.Attrs().Index == loopbackIndex }), nil
}

// guardDiffers names the first link without the guard, "" if there is none.
func (n *NS) guardDiffers() (string, error) {
	diff := ""
	err := n.do(func() error {
		all, err := links()
		if err != nil {
			return err
		}
		for _, l := range all {
			found, err := guarded(l)
			if err != nil {
				return err
			}
			if !found && diff == "" {
				diff = fmt.Sprintf("link %s has no guard", l.Attrs().Name)
			}
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("capture: %s: read guard: %w", n.path, err)
	}
	return diff, nil
}

// guarded reports whether a link has the guard and it does what it should.
func guarded(l netlink.Link) (bool, error) {
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

// setGuard puts the guard on every link that has it not. The rules are there
// already, or it would cut the namespace off.
func (n *NS) setGuard() error {
	err := n.do(func() error {
		all, err := links()
		if err != nil {
			return err
		}
		for _, l := range all {
			if found, err := guarded(l); err != nil || found {
				if err != nil {
					return err
				}
				continue
			}
			if err := guardLink(l); err != nil && !errors.Is(err, unix.ENODEV) {
				return fmt.Errorf("link %s (the kernel needs sch_ingress and cls_bpf): %w", l.Attrs().Name, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("capture: %s: set guard: %w", n.path, err)
	}
	return nil
}

func guardLink(l netlink.Link) error {
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

// removeGuard takes the guard off every link, and what it hung on where nobody
// else uses that.
func (n *NS) removeGuard() error {
	err := n.do(func() error {
		all, err := links()
		if err != nil {
			return err
		}
		var errs []error
		for _, l := range all {
			found, err := guarded(l)
			if err == nil && found {
				err = unguardLink(l)
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return fmt.Errorf("capture: %s: remove guard: %w", n.path, err)
	}
	return nil
}

func unguardLink(l netlink.Link) error {
	req := nl.NewNetlinkRequest(unix.RTM_DELTFILTER, unix.NLM_F_ACK)
	req.AddData(guardAt(l, guardHandle))
	req.AddData(nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated("bpf")))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("link %s: %w", l.Attrs().Name, err)
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

package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Since Linux 6.6 a link takes programs by itself (tcx). The guard is one there: it
// comes and goes without the loss of a packet. It stays when this process ends.

// What such a program says of a packet: the next one decides, or it is dropped.
const (
	tcxNext = -1
	tcxDrop = 2
)

// extensions are the headers of IPv6 that TCP may be behind.
var extensions = []int32{unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_FRAGMENT, unix.IPPROTO_AH, unix.IPPROTO_DSTOPTS}

// tcxInstructions do what guardProgram does. A header that cannot be read is dropped.
func tcxInstructions() asm.Instructions {
	const (
		skbMark, skbProtocol = 8, 16 // offsets in struct __sk_buff
		headerNet            = 1     // BPF_HDR_START_NET
		next, drop, load     = "next", "drop", "load"
	)
	// As the field has it, in the network's order.
	order := func(proto uint16) int32 {
		return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, proto)))
	}
	out := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R0, asm.R6, skbMark, asm.Word),
		asm.JEq.Imm32(asm.R0, vouched, next),
		asm.LoadMem(asm.R7, asm.R6, skbProtocol, asm.Word),
		asm.Mov.Imm(asm.R2, protocolV4),
		asm.JEq.Imm32(asm.R7, order(unix.ETH_P_IP), load),
		asm.JNE.Imm32(asm.R7, order(unix.ETH_P_IPV6), next),
		asm.Mov.Imm(asm.R2, protocolV6),
		asm.Mov.Reg(asm.R1, asm.R6).WithSymbol(load),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, -8),
		asm.Mov.Imm(asm.R4, 1),
		asm.Mov.Imm(asm.R5, headerNet),
		asm.FnSkbLoadBytesRelative.Call(),
		asm.JNE.Imm(asm.R0, 0, drop),
		asm.LoadMem(asm.R0, asm.RFP, -8, asm.Byte),
		asm.JEq.Imm(asm.R0, unix.IPPROTO_TCP, drop),
		asm.JEq.Imm32(asm.R7, order(unix.ETH_P_IP), next),
	}
	for _, header := range extensions {
		out = append(out, asm.JEq.Imm(asm.R0, header, drop))
	}
	return append(out,
		asm.Mov.Imm(asm.R0, tcxNext).WithSymbol(next),
		asm.Return(),
		asm.Mov.Imm(asm.R0, tcxDrop).WithSymbol(drop),
		asm.Return(),
	)
}

// tcx is the loaded program. The kernel keeps one copy for all links.
type tcx struct {
	program *ebpf.Program
	id      ebpf.ProgramID
	tag     string // a hash of the instructions
}

// loadTCX loads the program, once for as long as this process lives. It fails where
// the kernel has no such thing, or this process not the right to it.
var loadTCX = sync.OnceValues(func() (*tcx, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "signet_guard", Type: ebpf.SchedCLS, License: "Apache-2.0", Instructions: tcxInstructions()})
	if err != nil {
		return nil, err
	}
	info, err := p.Info()
	if err != nil {
		return nil, errors.Join(err, p.Close())
	}
	id, ok := info.ID()
	if !ok || info.Tag == "" {
		return nil, errors.Join(errors.New("the kernel does not name programs"), p.Close())
	}
	// Nobody else's: it is looked at whether a link takes programs at all.
	if _, err := link.QueryPrograms(link.QueryOptions{Target: loopbackIndex, Attach: ebpf.AttachTCXEgress}); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return &tcx{p, id, info.Tag}, nil
})

// on returns the link's programs that do what the guard does: this process's own, or
// those of one before it.
func (g *tcx) on(l netlink.Link) ([]ebpf.ProgramID, error) {
	all, err := link.QueryPrograms(link.QueryOptions{Target: l.Attrs().Index, Attach: ebpf.AttachTCXEgress})
	if errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list programs of link %s: %w", l.Attrs().Name, err)
	}
	var out []ebpf.ProgramID
	for _, p := range all.Programs {
		same := p.ID == g.id
		if !same {
			same, err = g.same(p.ID)
			if err != nil {
				return nil, fmt.Errorf("program %d of link %s: %w", p.ID, l.Attrs().Name, err)
			}
		}
		if same {
			out = append(out, p.ID)
		}
	}
	return out, nil
}

// same reports whether a program has the guard's instructions.
func (g *tcx) same(id ebpf.ProgramID) (bool, error) {
	p, err := ebpf.NewProgramFromID(id)
	if errors.Is(err, unix.ENOENT) {
		return false, nil // gone meanwhile
	}
	if err != nil {
		return false, err
	}
	info, err := p.Info()
	if err := errors.Join(err, p.Close()); err != nil {
		return false, err
	}
	return info.Type == ebpf.SchedCLS && info.Tag == g.tag, nil
}

// attach puts the guard before the link's other programs, which see what it lets pass.
func (g *tcx) attach(l netlink.Link) error {
	return link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: l.Attrs().Index, Program: g.program, Attach: ebpf.AttachTCXEgress, Anchor: link.Head(),
	})
}

// detach takes off all that do what the guard does.
func (g *tcx) detach(l netlink.Link) error {
	ids, err := g.on(l)
	if err != nil {
		return err
	}
	for _, id := range slices.Backward(ids) {
		p, err := ebpf.NewProgramFromID(id)
		if err == nil {
			err = errors.Join(link.RawDetachProgram(link.RawDetachProgramOptions{Target: l.Attrs().Index, Program: p, Attach: ebpf.AttachTCXEgress}), p.Close())
		}
		if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("link %s: %w", l.Attrs().Name, err)
		}
	}
	return nil
}

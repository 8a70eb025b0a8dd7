package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// probeCommand runs in namespaces of its own; runProbes starts it.
const probeCommand = "probe-kernel"

func (a *app) newProbeCommand() *cobra.Command {
	return &cobra.Command{
		Use:     probeCommand,
		Short:   "Try kernel features; run by `signet check` in a namespace of its own",
		Long:    "Try kernel features. `signet check` runs this in a network namespace of its own;\nit refuses to run where there is any other interface than loopback.",
		Example: "  unshare -n signet " + probeCommand,
		Hidden:  true,
		Args:    args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			if err := loopbackUp(); err != nil {
				return err
			}
			return json.NewEncoder(a.out).Encode([]check{probeNftables(), probeDestroy()})
		},
	}
}

// loopbackUp refuses a namespace that is in use.
func loopbackUp() error {
	self, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return err
	}
	if parent, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", os.Getppid())); err == nil && parent == self {
		return errors.New("this is the network namespace of the caller; nothing is tried here")
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback interface: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set the loopback interface up: %w", err)
	}
	return nil
}

// probeNftables sets a rule of the kind that captures connections, and tries
// that it redirects one.
func probeNftables() check {
	const fix = "load or build the kernel modules nf_tables, nft_redir and nf_nat (modprobe nft_redir); no nft program is needed"
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return subjectNftables.error(fix, "cannot be tried: %v", err)
	}
	defer func() { _ = l.Close() }()
	if err := redirect(uint16(l.Addr().(*net.TCPAddr).Port)); err != nil {
		return subjectNftables.error(fix, "the kernel refuses a redirect rule: %v", err)
	}
	// Nobody listens there: only the rule can make this connection.
	c, err := net.DialTimeout("tcp4", "127.0.0.9:9", 2*time.Second)
	if err != nil {
		return subjectNftables.error(fix, "a redirect rule was taken but does not redirect: %v", err)
	}
	_ = c.Close()
	return subjectNftables.ok("a rule redirected a connection")
}

func redirect(port uint16) error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "signet-check"})
	chain := conn.AddChain(&nftables.Chain{
		Name: "output", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest,
	})
	conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0, 9}},
		&expr.Immediate{Register: 1, Data: []byte{byte(port >> 8), byte(port)}},
		&expr.Redir{RegisterProtoMin: 1},
	}})
	return conn.Flush()
}

// probeDestroy ends a connection as a withdrawn grant does.
func probeDestroy() check {
	const fix = "use a kernel with CONFIG_INET_DIAG_DESTROY (and the module tcp_diag); without it a withdrawn grant does not end open connections"
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return subjectDestroy.error(fix, "cannot be tried: %v", err)
	}
	defer func() { _ = l.Close() }()
	c, err := net.DialTimeout("tcp4", l.Addr().String(), 2*time.Second)
	if err != nil {
		return subjectDestroy.error(fix, "cannot be tried: %v", err)
	}
	defer func() { _ = c.Close() }()
	if err := netlink.SocketDestroy(c.LocalAddr(), c.RemoteAddr()); err != nil {
		return subjectDestroy.error(fix, "the kernel refuses: %v", err)
	}
	_ = c.SetReadDeadline(time.Now().Add(2 * time.Second))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
		return subjectDestroy.error(fix, "a destroyed connection lives on: %v", err)
	}
	return subjectDestroy.ok("ended a connection from %s", netip.MustParseAddrPort(c.LocalAddr().String()).Addr())
}

package capture

import (
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
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

// Where headers name the next.
const protocolV4, protocolV6 = 9, 6

// vouch is that last rule.
func vouch() []expr.Any {
	return slices.Concat(nft.Meta(expr.MetaKeyOIF, expr.CmpOpNeq, nft.Native(loopbackIndex)), []expr.Any{
		&expr.Immediate{Register: 1, Data: nft.Native(vouched)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
	})
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
	err := n.eachLink("read guard", func(l netlink.Link) error {
		found, err := guarded(l)
		if err == nil && !found && diff == "" {
			diff = fmt.Sprintf("link %s has no guard", l.Attrs().Name)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	return diff, nil
}

// kernelTCX is where the guard hangs, if it does not fail; a filter otherwise.
var kernelTCX = loadTCX

// guarded reports whether a link has the guard and it does what it should. One that
// an agent of before has hung as a filter is as good.
func guarded(l netlink.Link) (bool, error) {
	if g, err := kernelTCX(); err == nil {
		if ids, err := g.on(l); err != nil || len(ids) > 0 {
			return err == nil, err
		}
	}
	return filtered(l)
}

// setGuard puts the guard on every link that has it not. The rules are there
// already, or it would cut the namespace off.
func (n *NS) setGuard() error {
	return n.eachLink("set guard", func(l netlink.Link) error {
		found, err := guarded(l)
		if err != nil || found {
			return err
		}
		g, missing := kernelTCX()
		if missing == nil {
			err = g.attach(l)
		} else if err = filterLink(l); err != nil {
			err = fmt.Errorf("%w (the kernel needs sch_ingress and cls_bpf, or Linux 6.6: %w)", err, missing)
		}
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("link %s: %w", l.Attrs().Name, err)
		}
		return nil
	})
}

// liftGuard takes the guard off every link. What a filter hung on stays.
func (n *NS) liftGuard() error {
	return n.eachLink("lift guard", func(l netlink.Link) error {
		_, err := unguardLink(l)
		return err
	})
}

// removeGuard takes the guard off every link, and what a filter hung on where nobody
// else uses that: there was a guard until now or, if lifted, until some time ago.
func (n *NS) removeGuard(lifted bool) error {
	return n.eachLink("remove guard", func(l netlink.Link) error {
		filter, err := unguardLink(l)
		if err != nil || !filter && !lifted {
			return err
		}
		return unhangLink(l)
	})
}

// unguardLink reports whether the guard was a filter.
func unguardLink(l netlink.Link) (filter bool, err error) {
	if g, err := kernelTCX(); err == nil {
		if err := g.detach(l); err != nil {
			return false, err
		}
	}
	return unfilterLink(l)
}

// eachLink does something to every link, whatever becomes of the others.
func (n *NS) eachLink(what string, f func(netlink.Link) error) error {
	err := n.do(func() error {
		all, err := links()
		if err != nil {
			return err
		}
		var errs []error
		for _, l := range all {
			errs = append(errs, f(l))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return fmt.Errorf("capture: %s: %s: %w", n.path, what, err)
	}
	return nil
}

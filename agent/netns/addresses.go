package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses returns the addresses by which others can reach the pod whose
// network namespace is at path: those of global scope on every interface but
// loopback, without duplicates, in order. An IPv6 address that was found to
// be taken is left out.
func Addresses(path string) ([]netip.Addr, error) {
	f, err := openNS(path)
	if err != nil {
		return nil, fmt.Errorf("netns: %w", err)
	}
	defer f.Close()
	var out []netip.Addr
	if err := inside(f, func() error {
		out, err = addresses()
		return err
	}); err != nil {
		return nil, fmt.Errorf("netns: addresses in %s: %w", path, err)
	}
	return out, nil
}

// inside runs f on a thread that is in the namespace.
func inside(ns *os.File, f func() error) error {
	done := make(chan error)
	go func() { done <- enter(ns, f) }()
	return <-done
}

// enter moves the calling goroutine's thread into the namespace, calls f and
// moves the thread back. If that fails the thread stays locked, so that it
// ends with the goroutine and nothing else runs in the wrong place.
func enter(ns *os.File, f func() error) error {
	runtime.LockOSThread()
	back, err := os.Open(own)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("own network namespace: %w", err)
	}
	defer back.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter: %w", err)
	}
	ferr := f()
	if err := unix.Setns(int(back.Fd()), unix.CLONE_NEWNET); err != nil {
		return errors.Join(ferr, fmt.Errorf("leave: %w", err))
	}
	runtime.UnlockOSThread()
	return ferr
}

func addresses() ([]netip.Addr, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	loopback := map[int]bool{}
	for _, l := range links {
		loopback[l.Attrs().Index] = l.Attrs().RawFlags&unix.IFF_LOOPBACK != 0
	}
	list, err := h.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var out []netip.Addr
	for _, a := range list {
		ip, ok := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		on, known := loopback[a.LinkIndex]
		if !ok || !known || on || !ip.IsGlobalUnicast() || a.Scope != unix.RT_SCOPE_UNIVERSE || a.Flags&unix.IFA_F_DADFAILED != 0 {
			continue
		}
		out = append(out, ip)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out), nil
}

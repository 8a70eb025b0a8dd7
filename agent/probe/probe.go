// Package probe lets the node's kubelet reach the probe ports of captured pods
// without a tunnel, and nobody else.
//
// # How
//
// One nftables table, "inet signet", in the node's own network namespace:
//
//   - A set for each family holds the addresses and ports that are probed.
//   - A TCP connection to a member of the set whose socket was made by a
//     process in the kubelet's own cgroup (not above it, not below it) gets a
//     conntrack label, and by the label the source capture.ProbeSource, or
//     capture.ProbeSource6 where the pod is reached by IPv6. Labels
//     are used because no socket option sets them, as SO_MARK does for packet
//     marks, and because the marks belong to kube-proxy and the CNI plugins.
//   - Packets that claim these sources are dropped wherever they enter the node,
//     and where its own processes send them. A table "bridge signet" does the
//     same between the ports of a bridge.
//   - What pods send to these sources is either part of a connection with the
//     label, or answered with a reset, so that a handshake with a forged source
//     ends before it is complete.
//
// The pods' own rules (package capture) let these sources in on the declared
// ports. All of it is state of the kernel: probes pass while the agent
// is restarted.
//
// # What it does not do
//
//   - The kubelet connects wherever a pod's own probe says. A probe with a host
//     of another pod reaches that pod's declared ports, as the kubelet. Pod
//     Security "baseline" forbids the field from Kubernetes 1.34 on.
//   - Whoever has CAP_NET_ADMIN in the node's network namespace can change the
//     rules. With CAP_NET_RAW there, a process can read what the kubelet sends,
//     and forge frames below the packet filter. What it forges is answered by
//     the node with a reset at once, not prevented from being sent.
//   - A CNI plugin that moves packets past the packet filter (eBPF host routing,
//     macvlan, ipvlan) moves them past these rules: probes do not pass there.
package probe

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/google/nftables"

	"github.com/signet-mesh/signet/agent/attest/hostcgroup"
	"github.com/signet-mesh/signet/agent/capture/nft"
)

// Errors that callers act on, found with errors.Is.
var (
	// ErrNotInPlace: the kernel's rules or addresses are not those of the last
	// Set.
	ErrNotInPlace = errors.New("probe rules are not in place")
	// ErrUnsupported: the kubelet cannot be told from other processes here, so
	// probes are not let in.
	ErrUnsupported = errors.New("probes cannot be let in on this node")
)

// Kind says by what the kubelet is told from others.
type Kind uint8

// The kinds. The zero value lets no probe in.
const (
	None   Kind = iota
	Root        // by user id 0: weaker, any host-network pod that runs as root passes
	Cgroup      // by its cgroup
)

// String returns the kind in a word.
func (k Kind) String() string {
	switch k {
	case Root:
		return "root"
	case Cgroup:
		return "cgroup"
	}
	return "none"
}

// Pod is what may be probed.
type Pod struct {
	// UID is the pod's, for messages.
	UID string
	// Addrs are the pod's addresses, of either family.
	Addrs []netip.Addr
	// Ports are those that the pod declares probes or HTTP lifecycle handlers
	// on. None is 0.
	Ports []uint16
}

// Node is the network namespace that the agent, and the kubelet, run in. Its
// exported fields are set before first use and not changed. Its methods are
// safe for concurrent use.
type Node struct {
	// Kubelet is the path of the kubelet's cgroup in the version 2 hierarchy,
	// such as /system.slice/kubelet.service. Empty: it is looked for among the
	// processes.
	Kubelet string
	// AllowRoot accepts the kind Root where Cgroup is not possible.
	AllowRoot bool

	mu    sync.Mutex
	last  []target // guarded by mu; what Set was last asked for
	asked bool     // guarded by mu; Set has been called
	who   *who     // guarded by mu; how the kubelet was told apart last; nil if not known
}

// target is one member of the set.
type target struct {
	addr netip.Addr
	port uint16
}

// Support looks at the machine and says how the kubelet can be told from other
// processes, and why not better. Call it again from time to time: on machines
// with both cgroup versions it looks at whether the pods that run are told
// apart too. It changes nothing.
func (n *Node) Support(ctx context.Context) (Kind, string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	w, err := n.find(ctx)
	if err != nil {
		return None, err.Error()
	}
	return w.kind, w.why
}

// Set makes the pods' ports the ones that the kubelet may reach, in place of
// all from before, in one transaction. Where all is in place already it changes
// nothing. Call it only when the node's pods are known: an agent that has just
// started would cut off probes with an empty list.
//
// When the kubelet cannot be told apart, the error is ErrUnsupported and says
// why; rules from before stay, since they still let in only whom they did,
// unless they are of kind Root and AllowRoot is not set.
func (n *Node) Set(ctx context.Context, pods []Pod) error {
	targets, err := targetsOf(pods)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.last, n.asked = targets, true
	if n.who != nil && n.who.kind == Root {
		n.who = nil // there may be something better by now
	}
	if diff, err := n.differs(ctx); err == nil && diff == "" {
		return nil
	}
	w, err := n.find(ctx)
	if err != nil {
		if n.AllowRoot {
			return err
		}
		return errors.Join(err, removeRoot())
	}
	n.who = w
	return hostcgroup.Do(func() error { return write(w, targets) })
}

// Verify reads everything back and returns nil only if it is as the last Set
// should have left it: an error with ErrNotInPlace says what differs, also when
// the kubelet has moved to another cgroup. Set repairs it.
func (n *Node) Verify(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.asked {
		return fmt.Errorf("probe: %w: nothing has been set yet", ErrNotInPlace)
	}
	diff, err := n.differs(ctx)
	if err != nil {
		return err
	}
	if diff != "" {
		return fmt.Errorf("probe: %w: %s", ErrNotInPlace, diff)
	}
	return nil
}

// Remove takes all of it away: no probe passes any more. Where nothing is in
// place it does nothing.
func (n *Node) Remove() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.last, n.asked, n.who = nil, false, nil
	return remove()
}

// differs compares the kernel with what was last asked for.
func (n *Node) differs(ctx context.Context) (string, error) {
	if n.who == nil || !n.who.still(ctx) {
		w, err := n.find(ctx)
		if err != nil {
			return "", err
		}
		n.who = w
	}
	var diff string
	err := hostcgroup.Do(func() (err error) {
		diff, err = compare(n.who, n.last)
		return err
	})
	return diff, err
}

// targetsOf returns the set's members, sorted, each once.
func targetsOf(pods []Pod) ([]target, error) {
	var out []target
	for _, p := range pods {
		for _, port := range p.Ports {
			if port == 0 {
				return nil, fmt.Errorf("probe: pod %s: Ports: 0 is not a port: name the port that the probe uses", p.UID)
			}
			for _, a := range p.Addrs {
				out = append(out, target{a.Unmap(), port})
			}
		}
	}
	slices.SortFunc(out, func(x, y target) int {
		return cmp.Or(x.addr.Compare(y.addr), cmp.Compare(x.port, y.port))
	})
	return slices.Compact(out), nil
}

// batch bounds the members in one message, which the kernel limits to 64 KiB.
const batch = 500

// write replaces the tables in one transaction.
func write(w *who, targets []target) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("probe: nftables: %w", err)
	}
	for _, t := range []*nftables.Table{table, bridgeTable} {
		c.AddTable(t) // so that there is one to delete
		c.DelTable(t)
		c.AddTable(t)
	}
	for _, f := range families {
		if err := f.fill(c, targets); err != nil {
			return fmt.Errorf("probe: set of probes: %w", err)
		}
	}
	nft.Add(c, table, ruleset(w))
	nft.Add(c, bridgeTable, bridgeRuleset())
	if err := c.Flush(); err != nil {
		return fmt.Errorf("probe: write rules (the kernel needs nf_tables with nat, ct, socket and reject for inet, connection labels, and nf_tables for bridge): %w", err)
	}
	return nil
}

// fill adds the family's set with its part of the targets.
func (f *family) fill(c *nftables.Conn, targets []target) error {
	set := f.set()
	if err := c.AddSet(set, nil); err != nil {
		return err
	}
	var members []nftables.SetElement
	for _, t := range targets {
		if f.has(t.addr) {
			members = append(members, nftables.SetElement{Key: t.key()})
		}
	}
	for part := range slices.Chunk(members, batch) {
		if err := c.SetAddElements(set, part); err != nil {
			return err
		}
	}
	return nil
}

// compare returns the first difference between the kernel and what write
// writes, "" if there is none.
func compare(w *who, targets []target) (string, error) {
	c, err := nftables.New()
	if err != nil {
		return "", fmt.Errorf("probe: nftables: %w", err)
	}
	diff, err := nft.Differs(c, 0, table, ruleset(w))
	if err == nil && diff == "" {
		diff, err = nft.Differs(c, 0, bridgeTable, bridgeRuleset())
	}
	if err != nil {
		return "", fmt.Errorf("probe: %w", err)
	}
	if diff != "" {
		return diff, nil
	}
	for _, f := range families {
		if diff, err := f.compare(c, targets); diff != "" || err != nil {
			return diff, err
		}
	}
	return "", nil
}

// compare compares the family's set with its part of the targets.
func (f *family) compare(c *nftables.Conn, targets []target) (string, error) {
	members, err := c.GetSetElements(f.set())
	if err != nil {
		return "", fmt.Errorf("probe: read the set of probes: %w", err)
	}
	has := map[string]bool{}
	for _, m := range members {
		has[string(m.Key)] = true
	}
	want := 0
	for _, t := range targets {
		if !f.has(t.addr) {
			continue
		}
		want++
		if !has[string(t.key())] {
			return fmt.Sprintf("%s is not in the set of probes", netip.AddrPortFrom(t.addr, t.port)), nil
		}
	}
	if len(has) != want {
		return fmt.Sprintf("the set %s has %d members, want %d", f.set().Name, len(has), want), nil
	}
	return "", nil
}

// remove deletes the tables.
func remove() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("probe: nftables: %w", err)
	}
	for _, t := range []*nftables.Table{table, bridgeTable} {
		c.AddTable(t) // so that there is one to delete
		c.DelTable(t)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("probe: remove rules: %w", err)
	}
	return nil
}

// removeRoot removes rules that let in by user id: they were written when that
// was allowed.
func removeRoot() error {
	rules, err := nft.Read(0, table)
	if err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	for _, r := range rules {
		if nft.CommentText(r.UserData) == rootComment {
			return remove()
		}
	}
	return nil
}

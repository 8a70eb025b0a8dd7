package probe

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/google/nftables"

	"github.com/signet-mesh/signet/agent/attest/hostcgroup"
	"github.com/signet-mesh/signet/agent/capture/nft"
)

// programs are the names of executables that contain a kubelet.
var programs = []string{"kubelet", "kubelite", "hyperkube"}

// who is how the kubelet is told from others. It is not changed once made.
type who struct {
	kind Kind
	why  string // why not better, or where the kubelet was found

	path  string // of its cgroup
	level uint32 // of its cgroup, 0 is the root
	id    uint64 // of its cgroup
	pid   int    // 0 if the path was given
}

// find finds out how the kubelet can be told from others.
func (n *Node) find(ctx context.Context) (w *who, err error) {
	err = hostcgroup.Do(func() (err error) {
		w, err = n.byCgroup(ctx)
		return err
	})
	switch {
	case err == nil:
		return w, nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("probe: %w", ctx.Err())
	case n.AllowRoot:
		return &who{kind: Root, why: "probes are let in from every process of the node that runs as root, since the kubelet cannot be told from others: " + err.Error()}, nil
	}
	return nil, fmt.Errorf("probe: %w: %w", ErrUnsupported, err)
}

// byCgroup is called in the host's cgroup namespace.
func (n *Node) byCgroup(ctx context.Context) (*who, error) {
	if n.Kubelet != "" && (!strings.HasPrefix(n.Kubelet, "/") || path.Clean(n.Kubelet) != n.Kubelet) {
		return nil, fmt.Errorf("the kubelet's cgroup %q: write an absolute path such as /system.slice/kubelet.service", n.Kubelet)
	}
	all, err := processes(ctx)
	if err != nil {
		return nil, err
	}
	w := &who{kind: Cgroup, path: n.Kubelet}
	if w.path == "" {
		if w.path, w.pid, err = kubelet(all); err != nil {
			return nil, err
		}
	}
	if pods := parseMembership("0::" + w.path); pods.inPod {
		return nil, fmt.Errorf("the kubelet's cgroup %s lies below the pods'", w.path)
	}
	for _, p := range all {
		if p.inPod && p.unified == w.path {
			return nil, fmt.Errorf("process %d of a pod is in the cgroup %s (version 2), which is the kubelet's: the container runtime does not keep them apart; give the kubelet a cgroup of its own, or boot with cgroup version 2 only", p.pid, w.path)
		}
	}
	if w.id, w.level, err = cgroupID(w.path); err != nil {
		return nil, err
	}
	w.why = "the kubelet is in the cgroup " + w.path
	return w, tryRules(w)
}

// tryRules has the kernel check the rules that tell the kubelet apart, in a
// table that the same transaction removes again.
func tryRules(w *who) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	t := &nftables.Table{Name: "signet-try", Family: table.Family}
	c.AddTable(t)
	nft.Add(c, t, []nft.Chain{{Name: "try", Rules: []nft.Rule{{Exprs: slices.Concat(nft.TCP(), cgroup(w.level, 0, w.id), setLabel())}}}})
	c.DelTable(t)
	if err := c.Flush(); err != nil {
		return fmt.Errorf("the kernel's packet filter cannot match sockets by cgroup, or set connection labels (it needs CONFIG_NFT_SOCKET, CONFIG_SOCK_CGROUP_DATA and CONFIG_NF_CONNTRACK_LABELS): %w", err)
	}
	return nil
}

// still says whether the kubelet is where it was found. It looks at one process
// at most.
func (w *who) still(ctx context.Context) bool {
	if w.kind == Root {
		return true
	}
	if ctx.Err() != nil {
		return false
	}
	err := hostcgroup.Do(func() error {
		if w.pid != 0 {
			p, err := look(w.pid)
			if err != nil || !p.isKubelet || p.unified != w.path {
				return errors.New("moved")
			}
		}
		id, _, err := cgroupID(w.path)
		if err == nil && id != w.id {
			err = errors.New("another cgroup of that name")
		}
		return err
	})
	return err == nil
}

// process is what matters of one.
type process struct {
	pid int
	membership
	isKubelet bool // by its program, user, and namespaces
}

// processes lists those that could be looked at.
func processes(ctx context.Context) ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var out []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if p, err := look(pid); err == nil { // else it has ended
			out = append(out, p)
		}
	}
	return out, nil
}

// look reads a process's facts. A process is taken for a kubelet only if it
// runs as root, in the agent's network and user namespaces: then a process that
// only calls itself kubelet would have to be the node's root already.
func look(pid int) (p process, err error) {
	dir := "/proc/" + strconv.Itoa(pid)
	raw, err := os.ReadFile(dir + "/cgroup")
	if err != nil {
		return p, err
	}
	p = process{pid: pid, membership: parseMembership(string(raw))}
	exe, err := os.Readlink(dir + "/exe")
	if err != nil || !slices.Contains(programs, filepath.Base(strings.TrimSuffix(exe, " (deleted)"))) {
		return p, nil //nolint:nilerr // the kernel's own threads have no program
	}
	info, err := os.Stat(dir)
	if err != nil {
		return p, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	p.isKubelet = ok && st.Uid == 0 && !p.inPod && sameNamespace(dir, "net") && sameNamespace(dir, "user")
	return p, nil
}

func sameNamespace(dir, kind string) bool {
	a, err1 := os.Stat(dir + "/ns/" + kind)
	b, err2 := os.Stat("/proc/thread-self/ns/" + kind)
	return err1 == nil && err2 == nil && os.SameFile(a, b)
}

// kubelet returns the kubelet's cgroup. Two that differ are refused: there is
// no telling which one kubelets are.
func kubelet(all []process) (path string, pid int, err error) {
	for _, p := range all {
		if !p.isKubelet {
			continue
		}
		switch {
		case p.unified == "" || strings.Contains(p.unified+"/", "/../") || strings.HasSuffix(p.unified, " (deleted)"):
			return "", 0, fmt.Errorf("the kubelet (process %d) has no cgroup (version 2) that the agent can see", p.pid)
		case path != "" && path != p.unified:
			return "", 0, fmt.Errorf("two kubelets are found, processes %d and %d, in the cgroups %s and %s: name the right cgroup in the agent's configuration", pid, p.pid, path, p.unified)
		case path == "":
			path, pid = p.unified, p.pid
		}
	}
	if path == "" {
		return "", 0, fmt.Errorf("no kubelet is found among the node's processes (programs %s, as root, in the agent's network namespace): name its cgroup in the agent's configuration", strings.Join(programs, ", "))
	}
	return path, pid, nil
}

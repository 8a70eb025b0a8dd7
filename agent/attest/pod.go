package attest

import (
	"fmt"
	"strings"
	"sync"

	"github.com/signet-mesh/signet/agent/attest/hostcgroup"
	"github.com/signet-mesh/signet/agent/attest/procfs"
)

// podRoots says which cgroups hold the pods of this node. The zero value is of an
// agent that is no pod itself, and has to go by the names alone.
type podRoots struct {
	pods map[string]string // by hierarchy; nil: the agent is no pod
	// beside is where the agent is in version 2 when it is no pod's place: on a
	// hybrid node a runtime that manages cgroups itself leaves the processes of
	// all pods in its own unit there. Empty: it is not so.
	beside string
}

// podRootsOf reads them off the agent's own place: the same kubelet made it.
func podRootsOf(own cgroups) podRoots {
	var out podRoots
	for _, m := range own {
		if root, _, ok := cutPods(m.path); ok {
			if out.pods == nil {
				out.pods = map[string]string{}
			}
			out.pods[m.hierarchy] = root
		} else if m.hierarchy == "" {
			out.beside = m.path
		}
	}
	if out.pods == nil {
		return podRoots{}
	}
	return out
}

// cutPods splits a path at the first name that the kubelet gives to the cgroup
// of all pods: "kubepods", or "kubepods.slice" by systemd, with the names of
// the slices above where there are any.
func cutPods(path string) (root, below string, ok bool) {
	at := 0
	for seg := range strings.SplitSeq(path, "/") {
		at += len(seg)
		if seg == "kubepods" || seg == "kubepods.slice" || strings.HasSuffix(seg, "-kubepods.slice") {
			return path[:at], strings.TrimPrefix(path[at:], "/"), true
		}
		at++ // the slash
	}
	return "", "", false
}

// handedOn says whether a cgroup on the path belongs to somebody who may make
// and name further ones below it: a unit of systemd (a user's own service
// manager is one), or a container.
func handedOn(path string) bool {
	for seg := range strings.SplitSeq(path, "/") {
		if strings.HasSuffix(seg, ".service") || strings.HasSuffix(seg, ".scope") || len(seg) == 64 && isHex(seg) {
			return true
		}
	}
	return false
}

func isHex(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }

// pod returns the UID of the pod that a cgroup path lies in, "" if in none.
// The outermost match decides, at exactly the depth at which the kubelet makes
// a pod's cgroup: below a container's, the container may name cgroups as it
// likes.
func (r podRoots) pod(m membership) string {
	root, below, ok := cutPods(m.path)
	switch {
	case !ok:
		return ""
	case r.pods != nil && root != r.pods[m.hierarchy]:
		return "" // of another kubelet, or somebody's imitation
	case r.pods == nil && handedOn(root):
		return ""
	}
	segs := strings.Split(below, "/")
	slice, bySystemd := strings.CutSuffix(root[strings.LastIndexByte(root, '/')+1:], ".slice")
	for _, class := range []string{"burstable", "besteffort"} {
		if bySystemd && segs[0] == slice+"-"+class+".slice" {
			slice += "-" + class
			segs = segs[1:]
			break
		}
		if !bySystemd && segs[0] == class {
			segs = segs[1:]
			break
		}
	}
	// The pod, and a container in it.
	if len(segs) < 2 || strings.HasPrefix(segs[1], "crio-conmon-") {
		return ""
	}
	uid := segs[0]
	if bySystemd {
		if uid, ok = strings.CutPrefix(uid, slice+"-"); !ok {
			return ""
		}
		if uid, ok = strings.CutSuffix(uid, ".slice"); !ok {
			return ""
		}
		uid = strings.ReplaceAll(uid, "_", "-")
	}
	if uid, ok = strings.CutPrefix(uid, "pod"); !ok || !isPodUID(uid) {
		return ""
	}
	return uid
}

// isPodUID says whether s is written as pod UIDs are: a UUID, or the hash of a
// static pod.
func isPodUID(s string) bool {
	return len(s) >= 8 && len(s) <= 64 && isHex(strings.ReplaceAll(s, "-", ""))
}

// inPod says whether the process is in a container of the pod. Every hierarchy
// that gives it a place must say so, and at least one; except for version 2 where
// that has no pods, and the process is where the agent itself is.
func (c cgroups) inPod(roots podRoots, want string) error {
	if !isPodUID(want) {
		return fmt.Errorf("podUID: %q is not a pod's UID: use metadata.uid", want)
	}
	var yes, no, beside []string
	for _, m := range c {
		switch {
		case roots.pod(m) == want:
			yes = append(yes, m.String())
		case m.hierarchy == "" && m.path == roots.beside:
			beside = append(beside, m.String())
		default:
			no = append(no, m.String())
		}
	}
	if len(yes) == 0 {
		no = append(no, beside...)
	}
	switch {
	case len(yes) > 0 && len(no) > 0:
		return fmt.Errorf("podUID: hierarchies conflict about pod %s: in %s, but also in %s", want, strings.Join(yes, ", "), strings.Join(no, ", "))
	case len(yes) == 0 && len(no) == 0:
		return fmt.Errorf("podUID: want %s, the process is in no cgroup", want)
	case len(yes) == 0:
		return fmt.Errorf("podUID: want %s, the process is in %s", want, strings.Join(no, ", "))
	}
	return nil
}

// place is a process's cgroups as the node names them, and where its pods are.
type place struct {
	cgroups cgroups
	roots   podRoots
}

// ownRoots are those of the agent, which does not move.
var ownRoots struct {
	sync.Mutex
	known bool     // guarded by the Mutex
	roots podRoots // guarded by the Mutex; never edited
}

// readPlace reads the process's cgroups on a thread in the host's cgroup
// namespace: relative to an agent in a container, the name of the cgroup of
// all pods is not in the paths.
func (f *facts) readPlace() (out seen[place], err error) {
	err = hostcgroup.Do(func() (err error) {
		if out.value.roots, err = agentRoots(); err != nil {
			return err
		}
		var c seen[cgroups]
		c, err = f.readCgroups()
		out.file, out.value.cgroups = c.file, c.value
		return err
	})
	return out, err
}

func agentRoots() (podRoots, error) {
	ownRoots.Lock()
	defer ownRoots.Unlock()
	if !ownRoots.known {
		raw, err := procfs.ReadOwn("cgroup")
		if err != nil {
			return podRoots{}, fmt.Errorf("cgroup: the agent's own: %w", err)
		}
		own, err := parseCgroups(string(raw))
		if err != nil {
			return podRoots{}, fmt.Errorf("the agent's own place: %w", err)
		}
		ownRoots.roots, ownRoots.known = podRootsOf(own), true
	}
	return ownRoots.roots, nil
}

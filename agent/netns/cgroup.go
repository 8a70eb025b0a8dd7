package netns

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// place is where a kubelet puts a pod: the UID, and the cgroup that the
// kubelet's own tree lies in, "" for the root.
type place struct{ root, uid string }

// podsOf reads from /proc/<pid>/cgroup which pod a process belongs to: one,
// unless hierarchies conflict. Those that place it in no pod say nothing,
// since runtimes do not use all of them. outside says that a path begins
// above the reader's cgroup namespace, where it cannot be understood.
func podsOf(file string) (pods []place, outside bool, err error) {
	for line := range strings.Lines(file) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 || !strings.HasPrefix(f[2], "/") {
			return nil, false, fmt.Errorf("cgroup: line %q is not <id>:<controllers>:/<path>", shorten(line))
		}
		if slices.Contains(strings.Split(f[2], "/"), "..") {
			outside = true
			continue
		}
		if p, ok := podIn(f[2]); ok && !slices.Contains(pods, p) {
			pods = append(pods, p)
		}
	}
	return pods, outside, nil
}

// podIn finds the pod in the path of a cgroup. With kubelet's driver cgroupfs
// it is kubepods/[<class>/]pod<uid>/..., with systemd
// kubepods.slice/[kubepods-<class>.slice/]kubepods-[<class>-]pod<uid>.slice/...,
// where '-' in the UID is '_'. The outermost pod counts: what is below it is
// the pod's own to make, and proves nothing.
func podIn(path string) (place, bool) {
	seg := strings.Split(strings.TrimPrefix(path, "/"), "/")
	for i, s := range seg {
		if uid, depth, ok := cgroupfsPod(seg, i); ok {
			return place{prefix(seg[:i-depth]), uid}, true
		}
		if uid, ok := systemdPod(s); ok {
			// The slices above belong to kubelet's tree.
			top := i
			for top > 0 && strings.HasSuffix(seg[top-1], ".slice") && strings.Contains(seg[top-1], "kubepods") {
				top--
			}
			return place{prefix(seg[:top]), uid}, true
		}
	}
	return place{}, false
}

func prefix(seg []string) string {
	if len(seg) == 0 {
		return ""
	}
	return "/" + strings.Join(seg, "/")
}

// cgroupfsPod reads segment i as pod<uid>; depth is how many segments above
// it belong to kubelet's tree.
func cgroupfsPod(seg []string, i int) (uid string, depth int, ok bool) {
	uid, ok = strings.CutPrefix(seg[i], "pod")
	if !ok || CheckUID(uid) != nil {
		return "", 0, false
	}
	switch {
	case i >= 1 && seg[i-1] == "kubepods":
		return uid, 1, true
	case i >= 2 && (seg[i-1] == "burstable" || seg[i-1] == "besteffort") && seg[i-2] == "kubepods":
		return uid, 2, true
	}
	return "", 0, false
}

// systemdPod reads a segment as kubepods-[<class>-]pod<uid>.slice, which
// some runtimes follow by ":<prefix>:<container>" and kind precedes by
// "kubelet-".
func systemdPod(seg string) (string, bool) {
	name, _, _ := strings.Cut(seg, ":")
	name, ok := strings.CutSuffix(name, ".slice")
	if !ok {
		return "", false
	}
	name = strings.TrimPrefix(name, "kubelet-")
	name, ok = strings.CutPrefix(name, "kubepods-")
	if !ok {
		return "", false
	}
	name = strings.TrimPrefix(strings.TrimPrefix(name, "burstable-"), "besteffort-")
	uid, ok := strings.CutPrefix(name, "pod")
	uid = strings.ReplaceAll(uid, "_", "-")
	return uid, ok && CheckUID(uid) == nil
}

// OwnCgroupRoot returns the cgroup that the kubelet's tree lies in that the
// calling process, an agent in a pod, is part of: "" when that is the root,
// as nearly always, or when the process is in no pod. It is what
// Procfs.CgroupRoot is for.
func OwnCgroupRoot(proc string) (string, error) {
	raw, err := os.ReadFile(filepath.Join(proc, "self", "cgroup"))
	if err != nil {
		return "", fmt.Errorf("netns: %w", err)
	}
	pods, _, err := podsOf(string(raw))
	switch {
	case err != nil:
		return "", fmt.Errorf("netns: own %w", err)
	case len(pods) == 0:
		return "", nil
	case len(pods) > 1:
		return "", fmt.Errorf("netns: own cgroups: %w: pods %s and %s", ErrConflict, pods[0].uid, pods[1].uid)
	}
	return pods[0].root, nil
}

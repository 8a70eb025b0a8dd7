package attest

import (
	"strings"
	"testing"
)

const (
	podUID   = "0b8d5a2e-6c1f-4f3e-9c55-2f0a6a4f1d77"
	otherUID = "ffffffff-6c1f-4f3e-9c55-2f0a6a4f1d77"
	escaped  = "0b8d5a2e_6c1f_4f3e_9c55_2f0a6a4f1d77"
	docker   = "4f1d770b8d5a2e6c1f4f3e9c552f0a6a4f1d770b8d5a2e6c1f4f3e9c552f0a6a"
)

// What kubelets and runtimes really write, and what looks like it.
func TestPod(t *testing.T) {
	pod := "/kubepods/burstable/pod" + podUID
	agent := func(file string) podRoots {
		own, err := parseCgroups(file)
		if err != nil {
			t.Fatal(err)
		}
		return podRootsOf(own)
	}
	cgroupfs := agent("0::/kubepods/besteffort/pod" + otherUID + "/c\n")
	for _, tc := range []struct {
		name, file string
		roots      podRoots
		err        string // empty: is the pod
	}{
		{name: "cgroupfs, guaranteed", file: "0::/kubepods/pod" + podUID + "/c\n"},
		{name: "cgroupfs, burstable", file: "0::" + pod + "/c\n"},
		{name: "cgroupfs, best effort", file: "0::/kubepods/besteffort/pod" + podUID + "/c\n", roots: cgroupfs},
		{name: "cgroupfs, deeper", file: "0::" + pod + "/c/init.scope/x\n"},
		{name: "version 1", file: "2:cpu,cpuacct:" + pod + "/c\n1:name=systemd:" + pod + "/c\n"},
		{name: "hybrid, unified unused", file: "2:memory:" + pod + "/c\n0::/\n"},
		{name: "containerd by systemd", file: "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + escaped + ".slice/cri-containerd-" + docker + ".scope\n"},
		{name: "CRI-O by systemd, guaranteed", file: "0::/kubepods.slice/kubepods-pod" + escaped + ".slice/crio-" + docker + ".scope\n"},
		{name: "CRI-O with a container's own cgroup", file: "0::/kubepods.slice/kubepods-pod" + escaped + ".slice/crio-" + docker + ".scope/container\n"},
		{name: "node in a cgroup", file: "0::/node1" + pod + "/c\n", roots: agent("0::/node1/kubepods/besteffort/pod" + otherUID + "/c\n")},
		{name: "node in a cgroup, the agent is no pod", file: "0::/node1" + pod + "/c\n"},
		{name: "node in a container, the agent in it", file: "0::/system.slice/docker-" + docker + ".scope" + pod + "/c\n", roots: agent("0::/system.slice/docker-" + docker + ".scope/kubepods/pod" + otherUID + "/c\n")},
		{name: "cgroup root by systemd", file: "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + escaped + ".slice/cri-containerd-" + docker + ".scope\n"},

		{name: "another pod", file: "0::/kubepods/pod" + otherUID + "/c\n", err: "want " + podUID},
		{name: "another node's", file: "0::/node2" + pod + "/c\n", roots: agent("0::/node1/kubepods/pod" + otherUID + "/c\n"), err: "want"},
		{name: "hierarchies conflict", file: "2:cpu:" + pod + "/c\n1:memory:/kubepods/pod" + otherUID + "/c\n", err: "conflict"},
		{name: "one hierarchy says elsewhere", file: "2:cpu:" + pod + "/c\n0::/user.slice/x\n", err: "conflict"},
		{name: "on the node", file: "0::/system.slice/nginx.service\n", err: "want"},
		{name: "in no cgroup", file: "0::/\n", err: "in no cgroup"},
		{name: "no container", file: "0::" + pod + "\n", err: "want"},
		{name: "the monitor of the runtime", file: "0::/kubepods.slice/kubepods-pod" + escaped + ".slice/crio-conmon-" + docker + ".scope\n", err: "want"},
		{name: "removed", file: "0::" + pod + "/c (deleted)\n", err: "removed"},
		{name: "outside of the namespace", file: "0::/../pod" + podUID + "/c\n", err: "outside"},

		{name: "forged below a container", file: "0::/kubepods/pod" + otherUID + "/c" + pod + "/c\n", err: "want"},
		{name: "forged below a container by systemd", file: "0::/kubepods.slice/kubepods-pod" + strings.ReplaceAll(otherUID, "-", "_") + ".slice/cri-containerd-" + docker + ".scope" + pod + "/c\n", err: "want"},
		{name: "forged in place of a class", file: "0::/kubepods/x/pod" + podUID + "/c\n", err: "want"},
		{name: "forged by a user's manager", file: "0::/user.slice/user-1000.slice/user@1000.service" + pod + "/c\n", err: "want"},
		{name: "forged by a user's manager, the agent a pod", file: "0::/user.slice/user-1000.slice/user@1000.service" + pod + "/c\n", roots: cgroupfs, err: "want"},
		{name: "forged in a container of the node", file: "0::/docker/" + docker + pod + "/c\n", err: "want"},
		{name: "forged with a plain name, the agent a pod", file: "0::/ci" + pod + "/c\n", roots: cgroupfs, err: "want"},
		{name: "forged in a hierarchy that the agent has no place in", file: "1:cpu:" + pod + "/c\n", roots: cgroupfs, err: "want"},
		{name: "name of the pod only begins so", file: "0::/kubepods/pod" + podUID + "-x/c\n", err: "want"},
		{name: "name of all pods only begins so", file: "0::/kubepods-x/pod" + podUID + "/c\n", err: "want"},
		{name: "systemd's names under the other's", file: "0::/kubepods/kubepods-pod" + escaped + ".slice/c\n", err: "want"},
		{name: "slice of another class", file: "0::/kubepods.slice/kubepods-burstable.slice/kubepods-besteffort-pod" + escaped + ".slice/c.scope\n", err: "want"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := parseCgroups(tc.file)
			if err == nil {
				err = c.inPod(tc.roots, podUID)
			}
			switch {
			case tc.err == "" && err != nil:
				t.Error(err)
			case tc.err != "" && err == nil:
				t.Error("matches")
			case tc.err != "" && !strings.Contains(err.Error(), tc.err):
				t.Errorf("%q, want something with %q", err, tc.err)
			}
		})
	}
	c, err := parseCgroups("0::/kubepods/pod/c\n")
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"x", "../" + podUID, strings.ToUpper(podUID), podUID + "/c"} {
		if err := c.inPod(podRoots{}, bad); err == nil || !strings.Contains(err.Error(), "metadata.uid") {
			t.Errorf("%q as a UID: %v", bad, err)
		}
	}
}

func FuzzPod(f *testing.F) {
	f.Add("/kubepods/burstable/pod"+podUID+"/c", "/kubepods")
	f.Add("/kubepods.slice/kubepods-pod"+escaped+".slice/crio-1.scope", "/kubepods.slice")
	f.Add("/a-kubepods.slice/a-kubepods-besteffort.slice/a-kubepods-besteffort-pod"+escaped+".slice/x/kubepods/pod"+otherUID+"/c", "")
	f.Fuzz(func(t *testing.T, path, root string) {
		c, err := parseCgroups("0::" + path + "\n")
		if err != nil || len(c) != 1 {
			return
		}
		var roots podRoots
		if root != "" {
			roots.pods = map[string]string{"": root}
		}
		uid := roots.pod(c[0])
		if uid == "" {
			return
		}
		if !isPodUID(uid) || !strings.Contains(strings.ReplaceAll(path, "_", "-"), "pod"+uid) {
			t.Errorf("%q: %q", path, uid)
		}
		if root != "" && !strings.HasPrefix(path, root+"/") {
			t.Errorf("%q is not below %q, but %q", path, root, uid)
		}
		// What a container names below itself changes nothing.
		below := membership{"", path + "/kubepods/pod" + otherUID + "/c"}
		if got := roots.pod(below); got != uid {
			t.Errorf("%q: %q, but below %q", path, uid, got)
		}
		// A second hierarchy that says otherwise makes it fail.
		if err := append(c, membership{"cpu", "/elsewhere"}).inPod(roots, uid); err == nil {
			t.Errorf("%q matches with a conflict", path)
		}
	})
}

package attest

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
)

// cgroupVersions are the hierarchies that a kernel has, as nodes are set up.
// In a hybrid one version 2 has no controllers, and systemd keeps its units
// there and in name=systemd.
var cgroupVersions = map[string][]string{
	"v1":     {"name=systemd", "cpu,cpuacct", "memory", "pids", "devices", "freezer"},
	"v2":     {""},
	"hybrid": {"name=systemd", "cpu,cpuacct", "memory", "pids", "devices", "freezer", ""},
}

// layouts are where programs put a process of a pod of the kubelet, by class of
// service and the pod's UID.
var layouts = map[string]func(class, uid string) string{
	"containerd, cgroupfs": func(class, uid string) string { return cgroupfsPod(class, uid) + "/" + docker },
	"containerd, systemd":  func(class, uid string) string { return systemdPod(class, uid) + "/cri-containerd-" + docker + ".scope" },
	"CRI-O, systemd":       func(class, uid string) string { return systemdPod(class, uid) + "/crio-" + docker + ".scope" },
	"CRI-O, systemd, a cgroup in the scope": func(class, uid string) string {
		return systemdPod(class, uid) + "/crio-" + docker + ".scope/container"
	},
	"CRI-O, cgroupfs": func(class, uid string) string { return cgroupfsPod(class, uid) + "/crio-" + docker },
	"cgroupfs below a cgroup root": func(class, uid string) string {
		return "/node1" + cgroupfsPod(class, uid) + "/" + docker
	},
	"systemd below a cgroup root": func(class, uid string) string {
		return "/kubelet.slice/kubelet-kubepods.slice" + strings.ReplaceAll(strings.TrimPrefix(systemdPod(class, uid), "/kubepods.slice"), "kubepods", "kubelet-kubepods") + "/cri-containerd-" + docker + ".scope"
	},
}

func cgroupfsPod(class, uid string) string {
	if class != "" {
		class += "/"
	}
	return "/kubepods/" + class + "pod" + uid
}

func systemdPod(class, uid string) string {
	slice, name := "", "kubepods"
	if class != "" {
		name += "-" + class
		slice = "/" + name + ".slice"
	}
	return "/kubepods.slice" + slice + "/" + name + "-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
}

// cgroupFile writes /proc/<pid>/cgroup as the kernel does.
func cgroupFile(at map[string]string) string {
	var out strings.Builder
	for i, h := range slices.Backward(slices.Sorted(maps.Keys(at))) {
		if h == "" {
			i = 0
		}
		fmt.Fprintf(&out, "%d:%s:%s\n", i, h, at[h])
	}
	return out.String()
}

func everywhere(hierarchies []string, path string) map[string]string {
	out := map[string]string{}
	for _, h := range hierarchies {
		out[h] = path
	}
	return out
}

// judge reads a cgroup file, and has it judged.
func judge(t *testing.T, at map[string]string, by func(cgroups) error) error {
	t.Helper()
	c, err := parseCgroups(cgroupFile(at))
	if err != nil {
		t.Fatalf("%v:\n%s", err, cgroupFile(at))
	}
	return by(c)
}

// A pod is known in every version of cgroups, with every runtime and driver, to
// an agent that is a pod itself and to one that is not. Where one hierarchy, no
// matter which, says something else, be it another pod, the node, or what looks
// like the pod and is not, it is nobody.
func TestPodLayouts(t *testing.T) {
	for version, hierarchies := range cgroupVersions {
		for runtime, place := range layouts {
			for _, class := range []string{"", "burstable", "besteffort"} {
				t.Run(strings.Join([]string{version, runtime, class}, "/"), func(t *testing.T) {
					is := func(roots podRoots) func(cgroups) error {
						return func(c cgroups) error { return c.inPod(roots, podUID) }
					}
					agent, err := parseCgroups(cgroupFile(everywhere(hierarchies, place("besteffort", otherUID))))
					if err != nil {
						t.Fatal(err)
					}
					for who, roots := range map[string]podRoots{"a pod": podRootsOf(agent), "no pod": {}} {
						at := everywhere(hierarchies, place(class, podUID))
						if err := judge(t, at, is(roots)); err != nil {
							t.Errorf("the agent is %s: %v", who, err)
						}
						for _, odd := range hierarchies {
							for _, path := range []string{
								place(class, otherUID),
								"/system.slice/nginx.service",
								"/user.slice/user-1000.slice/user@1000.service" + place(class, podUID),
								"/kub", // cut short
							} {
								at[odd] = path
								if err := judge(t, at, is(roots)); err == nil {
									t.Errorf("the agent is %s: matches, although %q says %s", who, odd, path)
								} else if len(hierarchies) > 1 && !strings.Contains(err.Error(), "conflict") {
									t.Errorf("the agent is %s, %q says %s: %v; want a conflict", who, odd, path, err)
								}
							}
							at[odd] = place(class, podUID)
						}
						// A hierarchy that is not in use gives no place.
						if len(hierarchies) > 1 {
							at["freezer"] = "/"
							if err := judge(t, at, is(roots)); err != nil {
								t.Errorf("the agent is %s: with a hierarchy that is not in use: %v", who, err)
							}
						}
					}
				})
			}
		}
	}
}

// On a hybrid node where the runtime manages cgroups itself, processes of pods
// are in the runtime's unit in version 2. An agent that is a pod is there itself,
// and knows it by that. No other place will do, no other hierarchy, and nothing
// follows from that place alone.
func TestHybridBesidePods(t *testing.T) {
	const unit = "/system.slice/containerd.service"
	hierarchies := cgroupVersions["hybrid"]
	at := func(uid string) map[string]string {
		out := everywhere(hierarchies, cgroupfsPod("burstable", uid)+"/"+docker)
		out[""] = unit
		return out
	}
	own, err := parseCgroups(cgroupFile(at(otherUID)))
	if err != nil {
		t.Fatal(err)
	}
	roots := podRootsOf(own)
	for name, tc := range map[string]struct {
		at    map[string]string
		roots podRoots
		err   string // empty: is the pod
	}{
		"the pod":                      {at: at(podUID), roots: roots},
		"another pod":                  {at: at(otherUID), roots: roots, err: "want"},
		"the agent is no pod":          {at: at(podUID), err: "conflict"},
		"of another runtime":           {at: with(at(podUID), "", "/system.slice/crio.service"), roots: roots, err: "conflict"},
		"below the unit":               {at: with(at(podUID), "", unit+"/x"), roots: roots, err: "conflict"},
		"another hierarchy says so":    {at: with(at(podUID), "memory", unit), roots: roots, err: "conflict"},
		"the unit alone":               {at: map[string]string{"": unit}, roots: roots, err: "want"},
		"the runtime itself":           {at: everywhere(hierarchies, unit), roots: roots, err: "want"},
		"the pod in version 2 as well": {at: with(at(podUID), "", cgroupfsPod("burstable", podUID)+"/"+docker), roots: roots, err: "conflict"},
	} {
		t.Run(name, func(t *testing.T) {
			err := judge(t, tc.at, func(c cgroups) error { return c.inPod(tc.roots, podUID) })
			if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%v; want %q", err, tc.err)
			}
		})
	}
}

func with(at map[string]string, hierarchy, path string) map[string]string {
	at[hierarchy] = path
	return at
}

// A unit of systemd is known in every version of cgroups. Controllers that the
// unit does not use keep its processes in a slice above, or in the root.
func TestUnitLayouts(t *testing.T) {
	const unit = "nginx.service"
	is := func(c cgroups) error { return c.inUnit(unit) }
	for version, hierarchies := range cgroupVersions {
		for layout, place := range map[string]string{
			"system":         "/system.slice/" + unit,
			"slices":         "/shop.slice/shop-web.slice/" + unit,
			"a cgroup below": "/system.slice/" + unit + "/worker",
		} {
			t.Run(version+"/"+layout, func(t *testing.T) {
				at := everywhere(hierarchies, place)
				if err := judge(t, at, is); err != nil {
					t.Error(err)
				}
				for _, odd := range hierarchies {
					own := odd == "" || odd == "name=systemd"
					for _, path := range []string{"/", "/system.slice"} {
						at[odd] = path
						err := judge(t, at, is)
						// Only the manager's own hierarchies decide, and of two
						// that it has, the root of one says nothing.
						if may := !own || path == "/" && version == "hybrid"; may != (err == nil) {
							t.Errorf("%q says %s: %v", odd, path, err)
						}
					}
					for _, path := range []string{
						"/system.slice/redis.service",
						"/user.slice/user-1000.slice/user@1000.service/app.slice/" + unit,
						systemdPod("", podUID) + "/cri-containerd-" + docker + ".scope",
					} {
						at[odd] = path
						if err := judge(t, at, is); err == nil {
							t.Errorf("matches, although %q says %s", odd, path)
						} else if len(hierarchies) > 1 && version == "hybrid" && !strings.Contains(err.Error(), "conflict") {
							t.Errorf("%q says %s: %v; want a conflict", odd, path, err)
						}
					}
					at[odd] = place
				}
			})
		}
	}
}

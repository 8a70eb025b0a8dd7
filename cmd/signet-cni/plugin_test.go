package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/signet-mesh/signet/agent/cni"
	"github.com/signet-mesh/signet/agent/netns"
	"github.com/signet-mesh/signet/internal/cniconf"
	"github.com/signet-mesh/signet/internal/lab"
)

// The test binary under the plugin's name is the plugin.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == cniconf.Plugin {
		main()
		return
	}
	// With the race detector each call would end with a second's wait.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	lab.Main(m)
}

// debian is where Debian has the CNI's own plugins (containernetworking-plugins).
const debian = "/usr/lib/cni"

const (
	uidA = "0b8e7d0e-3f6c-4b0e-9a53-5a1f0a4c2f11"
	uidB = "7c1f2d3e-0000-4b0e-9a53-5a1f0a4c2f22"
)

// node is a node whose runtime uses real CNI plugins and the real library.
type node struct {
	t      *testing.T
	dir    string
	bin    string // the plugin
	socket string
	cni    *libcni.CNIConfig
	pins   *netns.Store

	mu      sync.Mutex
	verdict cni.Verdict // guarded by mu
	err     error       // guarded by mu
}

func newNode(t *testing.T) *node {
	t.Helper()
	if _, err := os.Stat(filepath.Join(debian, "host-local")); err != nil {
		t.Fatalf("%v; install the Debian package containernetworking-plugins", err)
	}
	n := &node{t: t, dir: t.TempDir(), verdict: cni.Enrolled}
	n.socket = filepath.Join(n.dir, "cni.sock")
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	n.bin = filepath.Join(n.dir, "bin", cniconf.Plugin)
	if err := errors.Join(os.Mkdir(filepath.Dir(n.bin), 0o755), os.Symlink(own, n.bin)); err != nil {
		t.Fatal(err)
	}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{filepath.Dir(n.bin), debian}, filepath.Join(n.dir, "cache"), nil)
	pins := filepath.Join(n.dir, "netns")
	if n.pins, err = netns.Open(pins, "/proc/1/ns/net"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		list, err := n.pins.List()
		if err != nil {
			t.Error(err)
		}
		for _, p := range list {
			if err := n.pins.Unpin(p.UID); err != nil {
				t.Error(err)
			}
		}
	})
	return n
}

func (n *node) set(v cni.Verdict, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.verdict, n.err = v, err
}

func (n *node) Enrolment(_, _, _ string) cni.Verdict {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.verdict
}

func (n *node) Hold(_ context.Context, uid, path string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.err != nil {
		return n.err
	}
	_, err := n.pins.Pin(uid, path)
	return err
}

func (n *node) Check(_ context.Context, uid, _ string) error {
	_, err := n.pins.Path(uid)
	return err
}

func (n *node) Release(_ context.Context, uid, path string) error {
	_, err := n.pins.UnpinIf(uid, path)
	return err
}

// agent serves until stop is called.
func (n *node) agent() (stop func()) {
	n.t.Helper()
	ctx, cancel := context.WithCancel(n.t.Context())
	s := cni.New(cni.Config{Socket: n.socket, OwnNamespace: "signet-system", Wait: 300 * time.Millisecond, Log: slog.New(slog.NewTextHandler(n.t.Output(), nil))}, n)
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Error(err)
		}
	})
	n.t.Cleanup(stop)
	return stop
}

// network is a chain of a real plugin and ours, made by the installer.
func (n *node) network(version, plugin, timeout string) *libcni.NetworkConfigList {
	n.t.Helper()
	conf := filepath.Join(n.dir, "net.d."+plugin+version)
	text := fmt.Sprintf(`{"cniVersion":%q,"name":"kc%s","plugins":[{"type":%q,"bridge":"kc0","ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.244.0.0/24"}]]}}]}`,
		version, plugin, plugin, filepath.Join(n.dir, "ipam"))
	if err := errors.Join(os.MkdirAll(conf, 0o755), os.WriteFile(filepath.Join(conf, "10-kc.conflist"), []byte(text), 0o600)); err != nil {
		n.t.Fatal(err)
	}
	i, err := cniconf.New(cniconf.Config{BinDir: filepath.Join(n.dir, "unused"), ConfDir: conf, Program: "/dev/null", Entry: cniconf.Entry{Socket: n.socket, OwnNamespace: "signet-system", Timeout: timeout}})
	if err != nil {
		n.t.Fatal(err)
	}
	if _, err := i.Install(); err != nil {
		n.t.Fatal(err)
	}
	list, err := libcni.ConfListFromFile(filepath.Join(conf, "10-kc-signet.conflist"))
	if err != nil {
		n.t.Fatal(err)
	}
	return list
}

var sandboxes int

// sandbox makes a network namespace, as a runtime does.
func (n *node) sandbox(namespace, uid string) *libcni.RuntimeConf {
	n.t.Helper()
	sandboxes++
	name := fmt.Sprintf("cni-%d", sandboxes)
	run := func(args ...string) error {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %v: %w: %s", args, err, out)
		}
		return nil
	}
	if err := run("netns", "add", name); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		if err := run("netns", "del", name); err != nil {
			n.t.Error(err)
		}
	})
	return &libcni.RuntimeConf{
		ContainerID: name, NetNS: "/run/netns/" + name, IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", namespace}, {"K8S_POD_NAME", "web-0"}, {"K8S_POD_INFRA_CONTAINER_ID", name}, {"K8S_POD_UID", uid}},
	}
}

func (n *node) addresses(rt *libcni.RuntimeConf) []netip.Addr {
	n.t.Helper()
	a, err := netns.Addresses(rt.NetNS)
	if err != nil {
		n.t.Fatal(err)
	}
	return a
}

// Chained after real plugins, in each version that those speak: the pod is
// held, the result of those before is passed on, CHECK looks, DEL releases.
func TestChain(t *testing.T) {
	n := newNode(t)
	n.agent()
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0"} {
		for _, plugin := range []string{"bridge", "ptp"} {
			t.Run(plugin+" "+version, func(t *testing.T) {
				net, rt := n.network(version, plugin, ""), n.sandbox("shop", uidA)
				begin := time.Now()
				r, err := n.cni.AddNetworkList(t.Context(), net, rt)
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("ADD took %s", time.Since(begin))
				got, err := current.NewResultFromResult(r)
				if err != nil {
					t.Fatal(err)
				}
				in := n.addresses(rt)
				if len(got.IPs) != 1 || len(in) != 1 || got.IPs[0].Address.IP.String() != in[0].String() || r.Version() != version {
					t.Errorf("result %+v, in the namespace %v", r, in)
				}
				if pin, err := n.pins.Get(uidA); err != nil || pin.Inode == 0 {
					t.Errorf("not pinned: %v", err)
				}
				if version != "0.3.1" { // has no CHECK
					if err := n.cni.CheckNetworkList(t.Context(), net, rt); err != nil {
						t.Error(err)
					}
					if err := n.pins.Unpin(uidA); err != nil {
						t.Fatal(err)
					}
					if err := n.cni.CheckNetworkList(t.Context(), net, rt); err == nil || !strings.Contains(err.Error(), "the pod is not captured") {
						t.Errorf("CHECK of a pod whose capture is gone: %v", err)
					}
					if _, err := n.pins.Pin(uidA, rt.NetNS); err != nil {
						t.Fatal(err)
					}
				}
				if err := n.cni.DelNetworkList(t.Context(), net, rt); err != nil {
					t.Error(err)
				}
				if _, err := n.pins.Path(uidA); !errors.Is(err, netns.ErrNotPinned) {
					t.Errorf("after DEL: %v", err)
				}
			})
		}
	}
}

// Defends: without the agent no pod starts, kubelet's event says why and what
// to do, and nothing of signet's is in the pod's namespace; the pod can be
// deleted all the same. With the agent back, the next try passes; and one
// that is away for a moment only is waited for.
func TestAgentAway(t *testing.T) {
	n := newNode(t)
	net, rt := n.network("1.0.0", "bridge", "1s"), n.sandbox("shop", uidA)
	begin := time.Now()
	_, err := n.cni.AddNetworkList(t.Context(), net, rt)
	want := "signet: the agent on this node does not answer on " + n.socket + "; the pod waits (is DaemonSet signet-agent running?)"
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Fatalf("ADD: %v; want %q", err, want)
	}
	t.Logf("after %s: %v", time.Since(begin), err)
	if out, err := exec.Command("ip", "netns", "exec", rt.ContainerID, "nft", "list", "ruleset").CombinedOutput(); err != nil || len(bytes.TrimSpace(out)) != 0 {
		t.Errorf("rules in the pod: %s, %v", out, err)
	}
	begin = time.Now()
	if err := n.cni.DelNetworkList(t.Context(), net, rt); err != nil {
		t.Errorf("DEL: %v", err)
	}
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("DEL took %s", took)
	}
	if a := n.addresses(rt); len(a) != 0 {
		t.Errorf("after DEL: %v", a)
	}

	net, rt = n.network("1.0.0", "bridge", "20s"), n.sandbox("shop", uidA)
	time.AfterFunc(time.Second, func() { n.agent() })
	if _, err := n.cni.AddNetworkList(t.Context(), net, rt); err != nil {
		t.Errorf("ADD with an agent that comes: %v", err)
	}
	if err := n.cni.DelNetworkList(t.Context(), net, rt); err != nil {
		t.Errorf("DEL: %v", err)
	}
}

// Defends: only a plain yes of the agent lets a pod start.
func TestVerdicts(t *testing.T) {
	n := newNode(t)
	n.agent()
	net := n.network("1.0.0", "bridge", "5s")
	broken := errors.New("nft: no such device")
	for _, tc := range []struct {
		name, namespace string
		verdict         cni.Verdict
		err             error
		want            string
	}{
		{"not enrolled", "shop", cni.NotEnrolled, broken, ""},
		{"excluded", "shop", cni.Excluded, broken, ""},
		{"never seen", "shop", cni.Unknown, nil, "the agent does not know this pod yet"},
		{"capture fails", "shop", cni.Enrolled, broken, "the pod cannot be captured yet: nft: no such device"},
		{"own namespace", "signet-system", cni.Unknown, broken, ""},
	} {
		n.set(tc.verdict, tc.err)
		rt := n.sandbox(tc.namespace, uidA)
		_, err := n.cni.AddNetworkList(t.Context(), net, rt)
		if (tc.want == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), "signet: "+tc.want)) {
			t.Errorf("%s: %v; want %q", tc.name, err, tc.want)
		}
		if err := n.cni.DelNetworkList(t.Context(), net, rt); err != nil {
			t.Errorf("%s: DEL: %v", tc.name, err)
		}
	}
}

// Defends: a node that boots: the release's own pods start with no agent.
func TestOwnNamespaceWithoutAgent(t *testing.T) {
	n := newNode(t)
	net, rt := n.network("1.0.0", "ptp", "1s"), n.sandbox("signet-system", uidA)
	if _, err := n.cni.AddNetworkList(t.Context(), net, rt); err != nil {
		t.Error(err)
	}
	if err := n.cni.DelNetworkList(t.Context(), net, rt); err != nil {
		t.Error(err)
	}
}

// Defends: the same namespace handed in for another pod.
func TestForgedNamespace(t *testing.T) {
	n := newNode(t)
	n.agent()
	net, rt := n.network("1.0.0", "bridge", "5s"), n.sandbox("shop", uidA)
	if _, err := n.cni.AddNetworkList(t.Context(), net, rt); err != nil {
		t.Fatal(err)
	}
	forged := *rt
	forged.IfName, forged.ContainerID = "eth1", rt.ContainerID+"x"
	forged.Args = slices.Clone(rt.Args)
	forged.Args[4][1] = uidB
	if _, err := n.cni.AddNetworkList(t.Context(), net, &forged); err == nil || !strings.Contains(err.Error(), "pinned for pod "+uidA) {
		t.Errorf("ADD for another pod: %v", err)
	}
	for _, r := range []*libcni.RuntimeConf{&forged, rt} {
		if err := n.cni.DelNetworkList(t.Context(), net, r); err != nil {
			t.Error(err)
		}
	}
}

// call runs the plugin by hand and returns its error, if it said one.
func (n *node) call(verb, netnsPath, args, stdin string) (string, *types.Error) {
	n.t.Helper()
	c := exec.CommandContext(n.t.Context(), n.bin)
	c.Env = append(os.Environ(), "CNI_COMMAND="+verb, "CNI_CONTAINERID=abc", "CNI_NETNS="+netnsPath, "CNI_IFNAME=eth0", "CNI_PATH="+debian, "CNI_ARGS="+args)
	c.Stdin = strings.NewReader(stdin)
	out, err := c.Output()
	if err == nil {
		return string(out), nil
	}
	var e types.Error
	if jerr := json.Unmarshal(out, &e); jerr != nil {
		n.t.Fatalf("%s: %v: %s", verb, err, out)
	}
	return "", &e
}

// Every verb of the newest version, and calls that are wrong. Defends:
// STATUS does not ask the agent (else a node without one is not ready, and
// the control plane cannot start there), and DEL never fails.
func TestVerbs(t *testing.T) {
	n := newNode(t)
	rt := n.sandbox("shop", uidA)
	const prev = `"prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","mtu":1400}],"ips":[{"address":"10.1.2.3/24","gateway":"10.1.2.1"}],"routes":[{"dst":"0.0.0.0/0","table":7}]}`
	conf := func(more string) string {
		return fmt.Sprintf(`{"cniVersion":"1.1.0","name":"kc","type":"signet-cni","socket":%q,"timeout":"1s","cni.dev/valid-attachments":[],%s}`, n.socket, more)
	}
	k8s := "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=" + uidA
	for _, tc := range []struct{ name, verb, args, conf, want string }{
		{"VERSION", "VERSION", "", `{"cniVersion":"1.1.0"}`, ""},
		{"STATUS", "STATUS", "", conf(prev), ""},
		{"GC", "GC", "", conf(prev), ""},
		{"DEL", "DEL", k8s, conf(prev), ""},
		{"DEL, nonsense", "DEL", "x", conf(`"timeout":7`), ""},
		{"DEL, no pod", "DEL", "", conf(prev), ""},
		{"ADD, agent away", "ADD", k8s, conf(prev), "does not answer"},
		{"CHECK, agent away", "CHECK", k8s, conf(prev), "does not answer"},
		{"STATUS, nonsense", "STATUS", "", conf(`"timeout":"soon"`), `timeout "soon": use a duration`},
		{"no UID", "ADD", strings.TrimSuffix(k8s, uidA), conf(prev), "K8S_POD_UID is missing"},
		{"two UIDs", "ADD", k8s + ";K8S_POD_UID=" + uidB, conf(prev), "K8S_POD_UID is there twice"},
		{"no Kubernetes", "ADD", "IgnoreUnknown=1", conf(prev), "about no pod of Kubernetes"},
		{"first in the chain", "ADD", k8s, conf(`"dns":{}`), "put its entry last"},
		{"socket", "ADD", k8s, conf(prev + `,"socket":"cni.sock"`), `socket "cni.sock": use an absolute path`},
		{"timeout", "ADD", k8s, conf(prev + `,"timeout":"10m"`), `timeout "10m": use a duration from 1s`},
	} {
		_, err := n.call(tc.verb, rt.NetNS, tc.args, tc.conf)
		if (tc.want == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %v; want %q", tc.name, err, tc.want)
		}
	}
	n.agent()
	out, err := n.call("ADD", rt.NetNS, k8s, conf(prev))
	if err != nil {
		t.Fatal(err)
	}
	var got, want map[string]any
	if err := errors.Join(json.Unmarshal([]byte(out), &got), json.Unmarshal([]byte("{"+prev+"}"), &want)); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got) != fmt.Sprint(want["prevResult"]) {
		t.Errorf("passed on: %v; want %v", got, want["prevResult"])
	}
	if _, err := n.call("DEL", "", k8s, conf(prev)); err != nil { // the namespace is gone already
		t.Error(err)
	}
}

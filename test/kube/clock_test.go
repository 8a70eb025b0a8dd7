//go:build long

package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// What the programs of this test have in package time. The kernel has one wall
// clock for all nodes of the cluster, a time namespace does not cover it, and Go
// asks the kernel without a library that could be put before: so the one function
// by which the program reads that clock reads another.
const (
	clockRead = "func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n"
	clockFile = `package time

import "syscall"

// clockOff is by how many seconds the clock is off: $TEST_CLOCK, where
// $TEST_CLOCK_NODE is empty or $NODE_NAME.
var clockOff = func() (n int64) {
	of, _ := syscall.Getenv("TEST_CLOCK_NODE")
	if node, _ := syscall.Getenv("NODE_NAME"); of != "" && of != node {
		return 0
	}
	value, _ := syscall.Getenv("TEST_CLOCK")
	for _, c := range value {
		if c >= '0' && c <= '9' {
			n = 10*n + int64(c-'0')
		}
	}
	if value != "" && value[0] == '-' {
		n = -n
	}
	return n
}()
`
)

// clockImages builds the images of the agent and the control plane with the real
// programs but for their clock, puts them on the nodes, and returns their tag.
func (b *bench) clockImages() string {
	b.Helper()
	dir := b.TempDir()
	root, err := exec.CommandContext(b.Context(), "go", "env", "GOROOT").Output()
	if err != nil {
		b.Fatal(err)
	}
	std := filepath.Join(strings.TrimSpace(string(root)), "src/time")
	source, err := os.ReadFile(filepath.Join(std, "time.go"))
	if err != nil {
		b.Fatal(err)
	}
	if !strings.Contains(string(source), clockRead) {
		b.Fatalf("%s: time.Now is not written as this test expects", std)
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{
		filepath.Join(std, "time.go"): filepath.Join(dir, "time.go"), filepath.Join(std, "testclock.go"): filepath.Join(dir, "testclock.go"),
	}})
	if err != nil {
		b.Fatal(err)
	}
	for name, text := range map[string]string{
		"time.go": strings.Replace(string(source), clockRead, clockRead+"\tsec += clockOff\n", 1), "testclock.go": clockFile, "overlay.json": string(overlay),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			b.Fatal(err)
		}
	}
	tag := b.version + "-clock"
	// The program that make has built; with the overlay it would be built anew.
	build := exec.CommandContext(b.Context(), ".cache/images/build", "-version", tag, "-envoy", "none", "-only", "signet-control,signet-agent",
		"-platforms", "linux/"+runtime.GOARCH, "-work", filepath.Join(dir, "work"), "-out", dir)
	build.Dir, build.Env = project, append(os.Environ(), "GOFLAGS=-overlay="+filepath.Join(dir, "overlay.json"))
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	for _, archive := range []string{"signet-control.tar", "signet-agent.tar"} {
		if err := b.cluster.LoadImage(b.Context(), filepath.Join(dir, archive)); err != nil {
			b.Fatal(err)
		}
	}
	return tag
}

// setClock starts a part of the release anew with a clock that is off by some
// seconds, on one node or, for "", all.
func (b *bench) setClock(component, tag, node string, seconds int) {
	b.Helper()
	b.replace(component, func() {
		patch := fmt.Sprintf(`{"spec":{"template":{"spec":{"containers":[{"name":%q,"image":"localhost/signet-%s:%s","env":[{"name":"TEST_CLOCK","value":"%d"},{"name":"TEST_CLOCK_NODE","value":%q}]}]}}}}`,
			component, component, tag, seconds, node)
		b.kubectl("-n", system, "patch", workloadOf(component), "--type=strategic", "-p", patch)
	})
}

// rightClock takes that back.
func (b *bench) rightClock(ctx context.Context, component string) error {
	patch := fmt.Sprintf(`{"spec":{"template":{"spec":{"containers":[{"name":%q,"image":"localhost/signet-%s:%s","env":[{"name":"TEST_CLOCK","$patch":"delete"},{"name":"TEST_CLOCK_NODE","$patch":"delete"}]}]}}}}`, component, component, b.version)
	for _, args := range [][]string{
		{"-n", system, "patch", workloadOf(component), "--type=strategic", "-p", patch},
		{"-n", system, "rollout", "status", workloadOf(component), "--timeout=2m"},
	} {
		if out, err := b.command(ctx, "kubectl", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("kubectl %q: %w: %s", args, err, out)
		}
	}
	return nil
}

// logHas reports whether a component's log has a text.
func (b *bench) logHas(component, text string) bool {
	out, err := b.try("-n", system, "logs", "-l", "app.kubernetes.io/component="+component, "-c", component, "--tail=-1")
	return err == nil && strings.Contains(out, text)
}

// clockEvents are the events of node1's clock: name -> message.
func (b *bench) clockEvents() map[string]string {
	b.Helper()
	list, err := b.client.CoreV1().Events(metav1.NamespaceDefault).List(b.Context(), metav1.ListOptions{})
	if err != nil {
		b.Fatal(err)
	}
	out := map[string]string{}
	for _, e := range list.Items {
		if e.InvolvedObject.Kind == "Node" && e.InvolvedObject.Name == "node1" && e.Reason == "ClockOff" {
			out[e.Name] = e.Message
		}
	}
	return out
}

// The clock of a node's agent, or of the control plane, is ten minutes off. What
// is allowed goes on by the certificates that are there, nobody else gets in, a
// new pod is in the mesh or waits, and it is said which clock is the reason: by
// an event of the node where reports get through, and otherwise by the log of
// who refuses the other's certificate. When the clock is right again, so is all.
func TestContradictionClock(t *testing.T) {
	b := open(t)
	began := time.Now()
	tag := b.clockImages()
	t.Logf("built and loaded in %s", time.Since(began).Round(time.Second))
	for _, is := range []struct {
		component, node string
		seconds         int
		event           string // of node1
		log             string // who says so instead
		text            string
	}{
		{"agent", "node1", 600, "ahead of the control plane's", "", ""},
		{"agent", "node1", -600, "behind the control plane's", "agent", "this node's clock"},
		{"control", "", 600, "behind the control plane's", "agent", "this node's clock"},
		{"control", "", -600, "ahead of the control plane's", "control", "this machine's clock"},
	} {
		what := fmt.Sprintf("the clock of %s %s is off by %d s", is.component, is.node, is.seconds)
		ok := t.Run(fmt.Sprintf("%s %d", is.component, is.seconds), func(t *testing.T) {
			b := &bench{T: t, env: b.env}
			f := b.field()
			t.Cleanup(func() {
				ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 3*time.Minute)
				defer cancel()
				if err := b.rightClock(ctx, is.component); err != nil {
					t.Error(err)
				}
			})
			off, before := time.Now(), b.clockEvents()
			b.setClock(is.component, tag, is.node, is.seconds)
			b.apply((&pod{namespace: f.in, name: "fresh", account: "fresh", node: "node1", args: []string{"serve"}}).yaml() + allow(f.in, "fresh", "client"))
			b.eventually(40*time.Second, func() string {
				if is.event != "" {
					for name, message := range b.clockEvents() {
						if _, old := before[name]; !old && strings.Contains(message, "10m0s "+is.event) {
							t.Logf("%s: event of node1 after %s: %s", what, time.Since(off).Round(time.Second), message)
							return ""
						}
					}
				}
				if is.log != "" && b.logHas(is.log, is.text) {
					t.Logf("%s: the log of %s says so after %s", what, is.log, time.Since(off).Round(time.Second))
					return ""
				}
				return "nobody says that a clock is off"
			})
			time.Sleep(5 * time.Second)
			t.Logf("%s: %s; the new pod: %s", what, b.statusOf(f.in), b.kubectl("-n", f.in, "get", "pod", "fresh", "-o", "jsonpath={.status.phase}"))
			b.closedTo(f, "fresh")
			f.undisturbed()
			if err := b.rightClock(t.Context(), is.component); err != nil {
				t.Fatal(err)
			}
			b.ready()
			right := time.Now()
			b.kubectl("-n", f.in, "wait", "pod", "fresh", "--for=condition=Ready", "--timeout=2m")
			b.waitStatus(f.in, "enforce: 5 of 5 pods enrolled")
			b.served(f.in, "far", b.ip(f.in, "fresh")+":8080", "fresh")
			t.Logf("all is in the mesh %s after the clock was right", time.Since(right).Round(time.Second))
			f.undisturbed()
		})
		if !ok {
			break
		}
	}
}

// closedTo makes sure that a pod serves nobody from outside, if it runs.
func (b *bench) closedTo(f *field, name string) {
	b.Helper()
	if ip := b.ip(f.in, name); ip != "" {
		for _, who := range [][2]string{{f.out, "stranger"}, {f.in, "denied"}} {
			if a := b.dial(who[0], who[1], ip+":8080"); a.OK {
				b.Errorf("%s reaches %s: %+v", who[1], name, a)
			}
		}
	}
}

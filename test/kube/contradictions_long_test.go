//go:build long

package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// An annotation with a value that is no mode, and a pod that opts out where it
// may not: the API server refuses both; where its admission policies are
// missing, the one is taken as enforce, and said so, and the other is not
// followed.
func TestContradictionAnnotations(t *testing.T) {
	b := open(t)
	f := b.field()
	odd := b.namespace("")
	sly := &pod{namespace: f.in, name: "sly", node: "node1", args: []string{"serve"}}
	slyDocument := strings.Replace(sly.yaml(), "metadata: {", "metadata: {annotations: {signet.dev/mesh: 'off'}, ", 1)
	b.eventually(20*time.Second, func() string { // it may be as young as the release
		out, err := b.try("annotate", "--overwrite", "namespace", odd, "signet.dev/mesh=enforced")
		if err == nil || !strings.Contains(out, `annotation signet.dev/mesh is "enforced"; use enforce, observe or off`) {
			return fmt.Sprintf("%v: %s", err, out)
		}
		return ""
	})
	b.apiRefuses(slyDocument, "a pod may opt out only where its namespace has the annotation")
	b.apiRefuses(strings.Replace(slyDocument, "'off'", "'observe'", 1), "on a pod can only be off")
	if out, err := b.try("annotate", "--overwrite", "namespace", odd, "signet.dev/status=enforce: 9 of 9 pods enrolled"); err == nil {
		t.Errorf("a status of somebody else: %s", out)
	}

	b.kubectl("delete", "validatingadmissionpolicybinding", "signet-namespaces", "signet-pods")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		if out, err := b.command(ctx, "kubectl", "apply", "-f", b.manifests).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	b.startPods(&pod{namespace: odd, name: "victim", node: "node1", args: []string{"serve"}})
	b.eventually(20*time.Second, func() string {
		if out, err := b.try("annotate", "--overwrite", "namespace", odd, "signet.dev/mesh=enforced"); err != nil {
			return out
		}
		return ""
	})
	b.waitStatus(odd, `enforce: 1 of 1 pods enrolled; "enforced" is no mode (enforce, observe or off) and is taken as enforce`)
	b.refused(f.out, "stranger", b.ip(odd, "victim")+":8080")

	b.apply(slyDocument)
	b.kubectl("-n", f.in, "wait", "pod", "sly", "--for=condition=Ready", "--timeout=2m")
	b.waitStatus(f.in, "enforce: 5 of 5 pods enrolled")
	b.refused(f.out, "stranger", b.ip(f.in, "sly")+":8080")
	b.kubectl("-n", f.in, "delete", "pod", "sly")
	f.intact()
}

// Overlaps: policies add up, and taking one away takes away what it alone
// granted; a quarantine wins over all policies, and stays while another one,
// that overlaps it, is deleted.
func TestContradictionOverlaps(t *testing.T) {
	b := open(t)
	f := b.field()
	denied := func(by string, port string) {
		t.Helper()
		b.refused(f.in, by, f.server+":"+port)
	}
	served := func(by string, port string) {
		t.Helper()
		b.served(f.in, by, f.server+":"+port, "server")
	}
	b.startPods(&pod{namespace: f.in, name: "late", account: "late", node: "node2", args: []string{"hold"}})
	// The account on one port, the whole namespace on another, and the same
	// again by another name.
	b.apply(policyOf(f.in, "one", `{target: {serviceAccount: server}, ports: [8080], from: [{serviceAccount: late}]}`) +
		policyOf(f.in, "two", `{ports: [8080, 8082], from: [{serviceAccount: late}]}`) +
		policyOf(f.in, "three", `{target: {serviceAccount: nobody}, from: [{namespace: `+f.in+`}]}`) +
		policyOf(f.out, "elsewhere", `{target: {serviceAccount: server}, from: [{serviceAccount: `+f.in+`/denied}]}`))
	served("late", "8080")
	denied("late", "8081")
	b.condition("allowpolicy", f.out, "elsewhere", "Accepted", "True") // for accounts of its own namespace
	b.kubectl("-n", f.in, "delete", "allowpolicy", "one")
	time.Sleep(2 * time.Second)
	served("late", "8080") // by the other
	b.kubectl("-n", f.in, "delete", "allowpolicy", "two")
	denied("late", "8080")

	quarantine := func(name, spec string) {
		t.Helper()
		b.apply(fmt.Sprintf("apiVersion: signet.dev/v1alpha1\nkind: Quarantine\nmetadata: {name: %s}\nspec: %s\n", name, spec))
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
			defer cancel()
			if out, err := b.command(ctx, "kubectl", "delete", "--ignore-not-found", "quarantine", name).CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	b.apply(policyOf(f.in, "four", `{target: {serviceAccount: server}, from: [{serviceAccount: late}]}`))
	served("late", "8080")
	quarantine("cut-account", `{reason: test, serviceAccounts: [`+f.in+`/late]}`)
	quarantine("cut-pattern", `{reason: test, identities: ["spiffe://`+trustDomain+`/ns/`+f.in+`/sa/late", "spiffe://`+trustDomain+`/ns/*/sa/late"]}`)
	denied("late", "8080")
	b.condition("quarantine", "", "cut-account", "Accepted", "True")
	b.condition("quarantine", "", "cut-pattern", "Accepted", "True")
	b.condition("allowpolicy", f.in, "four", "Accepted", "True")
	b.kubectl("delete", "quarantine", "cut-account")
	time.Sleep(3 * time.Second)
	denied("late", "8080")
	b.mode(f.in, "observe")
	time.Sleep(3 * time.Second)
	denied("late", "8080") // there too
	b.mode(f.in, "enforce")
	b.kubectl("delete", "quarantine", "cut-pattern")
	served("late", "8080")
	b.kubectl("-n", f.in, "delete", "pod", "late")
	b.waitStatus(f.in, "enforce: 4 of 4 pods enrolled")
	// In observe the others were let in, as it says; from here on they are not.
	f.began = time.Now().Add(time.Second)
	time.Sleep(4 * time.Second)
	f.closed()
}

// A MeshConfig of another trust domain: an edit is refused by the API server;
// one that was deleted and made again has a condition, and changes nothing. A
// control plane that starts with it does not serve, and says why.
func TestContradictionMeshConfig(t *testing.T) {
	b := open(t)
	f := b.field()
	const other = "apiVersion: signet.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\nspec: {trustDomain: other.example, svidTTL: 1h}\n"
	b.apiRefuses(other, "a trust domain cannot be edited")
	b.apiRefuses(strings.Replace(other, "name: mesh", "name: second", 1), "there is exactly one MeshConfig")
	restored := false
	restore := func() {
		if restored {
			return
		}
		restored = true
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 3*time.Minute)
		defer cancel()
		for _, args := range [][]string{
			{"delete", "--ignore-not-found", "meshconfig", "mesh"}, {"apply", "-f", b.manifests},
			{"-n", system, "delete", "pods", "-l", "app.kubernetes.io/name=signet-control"},
			{"-n", system, "rollout", "status", "deployment/signet-control", "--timeout=2m"},
		} {
			if out, err := b.command(ctx, "kubectl", args...).CombinedOutput(); err != nil {
				t.Errorf("kubectl %q: %v: %s", args, err, out)
			}
		}
	}
	t.Cleanup(restore)
	b.kubectl("delete", "meshconfig", "mesh")
	time.Sleep(2 * time.Second)
	b.apply(other)
	message := b.condition("meshconfig", "", "mesh", "Accepted", "False")
	if !strings.Contains(message, `the mesh runs as "mesh.example"; a trust domain cannot be edited`) {
		t.Errorf("condition: %q", message)
	}
	t.Logf("MeshConfig: Accepted=False: %s", message)
	b.served(f.in, "far", f.address, "server")

	b.kubectl("-n", system, "delete", "pods", "-l", "app.kubernetes.io/name=signet-control")
	began := time.Now()
	b.eventually(time.Minute, func() string {
		pods, err := b.client.CoreV1().Pods(system).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=signet-control"})
		if err != nil || len(pods.Items) != 1 || len(pods.Items[0].Status.ContainerStatuses) != 1 {
			return fmt.Sprintf("%v: control plane not restarted", err)
		}
		name, s := pods.Items[0].Name, pods.Items[0].Status.ContainerStatuses[0]
		if s.Ready {
			return "the control plane serves the other trust domain"
		}
		for _, args := range [][]string{{"logs", name}, {"logs", name, "--previous"}} {
			out, err := b.try(append([]string{"-n", system}, args...)...)
			if err == nil && strings.Contains(out, "other.example") && strings.Contains(out, "mesh.example") {
				t.Logf("a control plane that starts with it: %s", strings.TrimSpace(out))
				return ""
			}
		}
		return "the log does not say why it does not serve"
	})
	t.Logf("said after %s", time.Since(began).Round(time.Second))
	time.Sleep(5 * time.Second)
	b.served(f.in, "far", f.address, "server")
	b.refused(f.in, "denied", f.address)
	restore()
	b.ready()
	f.intact()
}

// Somebody flushes the node's own tables, which let the kubelet's probes in:
// they are there again in seconds, no pod becomes unready, and nobody else gets
// to a probed port.
func TestContradictionNodeTable(t *testing.T) {
	b := open(t)
	f := b.field()
	stop := f.storm(net.JoinHostPort(f.server, "8081"))
	for range 3 {
		began := time.Now()
		f.on("node1", "sh", "-c", "nft delete table inet signet; nft delete table bridge signet")
		f.eventually(5*time.Second, func() string {
			out, _ := f.cluster.Node("node1").Command(t.Context(), "nft", "list", "tables").CombinedOutput() // what it says is looked at
			if s := string(out); !strings.Contains(s, "table inet signet\n") || !strings.Contains(s, "table bridge signet\n") {
				return s
			}
			return ""
		})
		t.Logf("the node's tables were there again after %s", time.Since(began).Round(time.Millisecond))
		time.Sleep(time.Second)
	}
	if _, in := stop(); in > 0 {
		t.Errorf("%d connections from outside of the mesh were answered", in)
	}
	// A probe may fail while the tables are gone; one is no reason to be unready.
	since, err := time.Parse(time.RFC3339, f.kubectl("-n", f.in, "get", "pod", "server", "-o", "jsonpath={.status.conditions[?(@.type=='Ready')].lastTransitionTime}"))
	if err != nil || since.After(f.began) {
		t.Errorf("the pod became unready or ready at %s (%v), after %s", since, err, f.began)
	}
	f.kubectl("-n", f.in, "wait", "pod", "server", "--for=condition=Ready", "--timeout=5s")
	f.intact()
}

// The CNI overwrites its configuration, and somebody takes signet-cni out of
// it: it is the last of the chain again soon. A pod that starts in between is
// noticed, and taken in like one that ran before: what was open to it is cut.
func TestContradictionCNI(t *testing.T) {
	b := open(t)
	f := b.field()
	root, err := b.cluster.Node("node1").Root()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, "etc/cni/net.d")
	ours, theirs := filepath.Join(dir, "10-pods-signet.conflist"), filepath.Join(dir, "10-pods.conflist")
	original, err := os.ReadFile(theirs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(theirs, original, 0o644); err != nil {
			t.Error(err)
		}
	})
	last := func(file, holds string) {
		t.Helper()
		began := time.Now()
		b.eventually(5*time.Second, func() string {
			var conf struct {
				Plugins []struct {
					Type string `json:"type"`
				} `json:"plugins"`
			}
			text, err := os.ReadFile(file)
			if err != nil || json.Unmarshal(text, &conf) != nil || len(conf.Plugins) < 2 || conf.Plugins[len(conf.Plugins)-1].Type != "signet-cni" || !strings.Contains(string(text), holds) {
				return fmt.Sprintf("%s: signet-cni is not its last: %v %s", filepath.Base(file), err, text)
			}
			return ""
		})
		t.Logf("%s: signet-cni is the last after %s", filepath.Base(file), time.Since(began).Round(time.Millisecond))
	}
	write := func(file, text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	last(ours, "")
	write(theirs, strings.Replace(string(original), `"mtu": 1500`, `"mtu": 1400`, 1)) // its own update
	last(ours, `1400`)
	write(ours, string(original)) // over the copy
	last(ours, "1400")
	if err := os.Remove(ours); err != nil {
		t.Fatal(err)
	}
	last(ours, "1400")
	write(theirs, string(original))
	last(ours, "1500")
	first := filepath.Join(dir, "05-first.conflist") // another CNI takes over
	write(first, strings.Replace(string(original), `"name": "pods"`, `"name": "pods"`, 1))
	last(filepath.Join(dir, "05-first-signet.conflist"), "")
	if err := os.Remove(first); err != nil {
		t.Fatal(err)
	}
	last(ours, "")
	b.eventually(15*time.Second, func() string { // some CNIs remove their file before they write it
		if left, _ := filepath.Glob(dir + "/05-*"); len(left) > 0 { // the pattern is good
			return fmt.Sprintf("left behind: %q", left)
		}
		return ""
	})

	// Somebody keeps taking it out, faster than it can be put back.
	began := time.Now()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			_ = os.Remove(ours) // it may be gone already
			time.Sleep(2 * time.Millisecond)
		}
	})
	const slips = 6
	var pods []*pod
	for i := range slips {
		pods = append(pods, &pod{namespace: f.in, name: fmt.Sprintf("slip-%d", i), node: "node1", args: []string{"serve"}})
	}
	b.startPods(pods...)
	cancel()
	wg.Wait()
	last(ours, "")
	b.waitStatus(f.in, fmt.Sprintf("enforce: %d of %d pods enrolled", 4+slips, 4+slips))
	t.Logf("all are enrolled %s after their start", time.Since(began).Round(100*time.Millisecond))
	log := b.kubectl("-n", system, "logs", b.partOn("agent", "node1"), "-c", "agent", "--since-time="+began.Add(-time.Second).UTC().Format(time.RFC3339))
	past := 0
	for _, p := range pods {
		b.refused(f.out, "stranger", b.ip(f.in, p.name)+":8080")
		if strings.Contains(log, "found the network namespace of a running pod\" uid="+filepath.Base(b.pinned(f.in, p.name))) {
			past++
		}
	}
	t.Logf("%d of %d pods started past signet-cni and were found", past, slips)
	for _, p := range pods {
		b.kubectl("-n", f.in, "delete", "pod", p.name, "--wait=false")
	}
	f.intact()
}

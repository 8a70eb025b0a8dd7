package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// authority is what of `kubectl signet ca status -o json` these tests look at.
type authority struct {
	Stage string
	Roots []struct{ Fingerprint, Role string }
	Nodes []struct {
		Name, Waits   string
		Trusted, Used []string
	}
}

// The root is replaced under load, with two replicas of the control plane that
// share it: nothing fails, nothing breaks, every node ends up with the new root
// alone, and so does the Secret. Who may only look may not have it replaced.
func TestRootRotation(t *testing.T) {
	b := open(t)
	scale := func(ctx context.Context, replicas int) error {
		return b.command(ctx, "kubectl", "-n", system, "scale", "deployment/signet-control", fmt.Sprintf("--replicas=%d", replicas)).Run()
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		if err := scale(ctx, 1); err != nil {
			t.Error(err)
		}
	})
	if err := scale(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	b.kubectl("-n", system, "rollout", "status", "deployment/signet-control", "--timeout=2m")
	// The nodes' agents are spread over the replicas: one has to connect anew.
	b.kubectl("-n", system, "delete", "pod", b.partOn("agent", "node1"))
	b.ready()
	l := b.load()
	b.setTTL(20 * time.Second)
	b.eventually(time.Minute, func() string {
		for _, c := range b.certificates() {
			if c.Holder != "node" && c.NotAfter.Sub(c.NotBefore) > time.Minute {
				return c.Holder + " has a certificate of the longer life"
			}
		}
		return ""
	})
	l.steady(30 * time.Second)
	l.since = time.Now()

	operator := b.as(l.namespace, "operator", bound(l.namespace, "operator"))
	t.Cleanup(func() { b.unbind(l.namespace, "operator") })
	cmd := b.command(t.Context(), "kubectl", "signet", "ca", "rotate")
	cmd.Env = append(cmd.Env, "KUBECONFIG="+operator)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "rootNotBefore") {
		t.Errorf("who may only look replaces the root: %v\n%s", err, out)
	}
	ask := func(args ...string) (s authority) {
		t.Helper()
		out, err := b.command(t.Context(), "kubectl", append([]string{"signet", "ca"}, append(args, "-o", "json")...)...).Output()
		if err != nil {
			t.Fatalf("kubectl signet ca %q: %v\n%s", args, err, out)
		}
		if err := json.Unmarshal(out, &s); err != nil || len(s.Roots) == 0 {
			t.Fatalf("%v\n%s", err, out)
		}
		return s
	}
	before := ask("status")
	began := time.Now()
	after := ask("rotate")
	t.Logf("the root was replaced within %s", time.Since(began).Round(100*time.Millisecond))
	if after.Stage != "idle" || len(after.Roots) != 1 || after.Roots[0].Fingerprint == before.Roots[0].Fingerprint {
		t.Errorf("before %+v, after %+v", before, after)
	}
	b.eventually(20*time.Second, func() string { // whichever replica is asked
		s := ask("status")
		if s.Stage != "idle" || s.Roots[0] != after.Roots[0] || len(s.Nodes) != 2 {
			return fmt.Sprintf("%+v", s)
		}
		for _, n := range s.Nodes {
			if want := []string{after.Roots[0].Fingerprint}; fmt.Sprint(n.Trusted, n.Used) != fmt.Sprint(want, want) {
				return fmt.Sprintf("%+v", n)
			}
		}
		return ""
	})
	if keys := b.kubectl("-n", system, "get", "secret", "signet-ca", "-o", "go-template={{range $name, $_ := .data}}{{$name}} {{end}}"); keys != "root.crt root.key " {
		t.Errorf("the Secret has %s", keys)
	}
	l.judge("the root replaced")
	if got := b.statusOf(l.namespace); got != allThree {
		t.Errorf("the status says %q", got)
	}
	// A replica that starts now, and an agent, have the new root.
	b.roll("control")
	b.kubectl("-n", system, "delete", "pod", b.partOn("agent", "node2"))
	b.ready()
	b.waitStatus(l.namespace, allThree)
	l.judge("the control plane and an agent started again")
	if s := ask("status"); s.Roots[0] != after.Roots[0] {
		t.Errorf("after a restart %+v, before %+v", s.Roots, after.Roots)
	}
}

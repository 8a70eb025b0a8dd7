package kube

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// field is what must not change while something contradictory happens: a
// server that one caller may reach, and that another, outside of the mesh,
// hammers all the time.
type field struct {
	*bench
	in, out string // enrolled, and not
	began   time.Time
	server  string // its address
	// calls that must pass are by the pods near and far, in; those that must
	// not by the pod stranger, out.
	address string
}

// field makes it. Its end is checked by intact.
func (b *bench) field() *field {
	b.Helper()
	f := &field{bench: b, in: b.namespace("enforce"), out: b.namespace("")}
	f.address = "server." + f.in + ":8080"
	b.apply(service(f.in, "server", "server") + allow(f.in, "server", "client"))
	b.startPods(&pod{namespace: f.in, name: "server", account: "server", node: "node1", args: []string{"serve"},
		more: []string{"readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}"}})
	f.server = b.ip(f.in, "server")
	load := []string{"load", f.server + ":8080", "--rate", "50", "--conns", "2", "--echo", f.server + ":8081", "--want", "server"}
	b.startPods(
		&pod{namespace: f.in, name: "near", account: "client", node: "node1", args: load},
		&pod{namespace: f.in, name: "far", account: "client", node: "node2", args: load},
		&pod{namespace: f.in, name: "denied", account: "denied", node: "node2", args: load},
		&pod{namespace: f.out, name: "stranger", node: "node1", args: load},
	)
	b.waitStatus(f.in, "enforce: 4 of 4 pods enrolled")
	b.served(f.in, "near", f.address, "server")
	b.served(f.in, "far", f.address, "server")
	time.Sleep(2 * time.Second) // the loads' own starts
	f.began = time.Now()
	return f
}

// closed checks that nobody got in who may not, since the start.
func (f *field) closed() {
	f.Helper()
	for _, who := range [][2]string{{f.out, "stranger"}, {f.in, "denied"}} {
		_, c := f.loads(who[0], who[1], f.began)
		if c.OK+c.Wrong+c.Echoed > 0 || c.Failed == 0 {
			f.Errorf("%s got in: %+v", who[1], c)
		}
		f.Logf("%s: %d of %d calls got in", who[1], c.OK, c.OK+c.Failed)
	}
}

// intact checks that, and that who may was never refused or cut.
func (f *field) intact() {
	f.Helper()
	f.closed()
	for _, who := range []string{"near", "far"} {
		_, c := f.loads(f.in, who, f.began)
		if c.Failed+c.Wrong+c.StreamFailed+c.StreamWrong > 0 || c.OK == 0 || c.Streams != 2 {
			f.Errorf("%s was disturbed: %+v", who, c)
		}
		f.Logf("%s: %d calls passed, %d failed, %d streams live", who, c.OK, c.Failed, c.Streams)
	}
	f.waitStatus(f.in, "enforce: 4 of 4 pods enrolled")
}

// condition waits for a condition of an object, and returns its message.
func (b *bench) condition(kind, namespace, name, condition, status string) string {
	b.Helper()
	args := []string{"get", kind, name, "-o", `jsonpath={.metadata.generation} {.status.observedGeneration} {.status.conditions[?(@.type=="` + condition + `")].status} {.status.conditions[?(@.type=="` + condition + `")].message}`}
	if namespace != "" {
		args = append(args, "-n", namespace)
	}
	message := ""
	b.eventually(20*time.Second, func() string {
		out := b.kubectl(args...)
		parts := strings.SplitN(out, " ", 4)
		if len(parts) != 4 || parts[0] != parts[1] || parts[2] != status {
			return fmt.Sprintf("%s %s: %s is %q, want %s", kind, name, condition, out, status)
		}
		message = parts[3]
		return ""
	})
	return message
}

// apiRefuses checks that the API server refuses documents, with a text.
func (b *bench) apiRefuses(documents, why string) {
	b.Helper()
	out, err := b.tryApply(documents)
	if err == nil || !strings.Contains(out, why) {
		b.Errorf("kubectl apply: %v: %s\nwant a refusal with %q of:\n%s", err, out, why, documents)
	}
}

func policyOf(namespace, name, spec string) string {
	return fmt.Sprintf("apiVersion: signet.dev/v1alpha1\nkind: AllowPolicy\nmetadata: {name: %s, namespace: %s}\nspec: %s\n---\n", name, namespace, spec)
}

// Bad policies: what the API server refuses names the field, and what it has
// taken anyway (by an older CRD, whose rules were laxer) has a condition that
// names it, grants nothing of what is right beside it either, and leaves the
// policies beside it alone.
func TestContradictionPolicies(t *testing.T) {
	b := open(t)
	f := b.field()
	for spec, why := range map[string]string{
		`{target: {serviceAccount: server}}`:                                                                         "spec.from",
		`{target: {serviceAccount: server}, from: []}`:                                                               "spec.from",
		`{target: {serviceAccount: server}, from: [{}]}`:                                                             "set exactly one of",
		`{target: {serviceAccount: server}, from: [{serviceAccount: denied, namespace: x}]}`:                         "set exactly one of",
		`{target: {serviceAccount: other/server}, from: [{serviceAccount: denied}]}`:                                 "no slash and no wildcard",
		`{target: {serviceAccount: "*"}, from: [{serviceAccount: denied}]}`:                                          "no wildcard",
		`{target: {serviceAccount: server}, from: [{serviceAccount: "*"}]}`:                                          "no wildcard",
		`{target: {serviceAccount: server}, from: [{spiffeID: "*"}]}`:                                                "must start with spiffe://",
		`{target: {serviceAccount: server}, from: [{spiffeID: "spiffe://*/ns/x/sa/y"}]}`:                             "without a wildcard",
		`{target: {serviceAccount: server}, from: [{spiffeID: "spiffe://mesh.example/ns/x*/sa/y"}]}`:                 "a wildcard must be a whole segment",
		`{target: {serviceAccount: server}, ports: [15008], from: [{serviceAccount: denied}]}`:                       "belong to the mesh itself",
		`{target: {serviceAccount: server}, ports: [0], from: [{serviceAccount: denied}]}`:                           "spec.ports[0]",
		`{target: {serviceAccount: server}, ports: [8080], from: [{serviceAccount: denied}], action: deny}`:          "unknown field",
		`{target: {namespace: kube-system}, from: [{serviceAccount: denied}]}`:                                       "unknown field",
		`{target: {serviceAccount: server}, from: [{serviceAccount: "` + strings.Repeat("x", 400) + `"}]}`:           "serviceAccount",
		`{target: {serviceAccount: server}, ports: ["8080"], from: [{serviceAccount: denied}]}`:                      "ports",
		`{target: {serviceAccount: server}, from: [{spiffeID: "spiffe://mesh.example/ns/../sa/denied"}]}`:            "must not be . or ..",
		`{target: {serviceAccount: server}, from: [{spiffeID: "spiffe://mesh.example/ns/` + f.in + `/sa/denied/"}]}`: "path segment",
	} {
		b.apiRefuses(policyOf(f.in, "bad", spec), why)
	}

	// What only the mesh knows: who belongs to it. Such a policy grants nothing,
	// and not the rest of what it says either.
	foreign := map[string]string{
		"foreign":  `{target: {serviceAccount: server}, from: [{spiffeID: "spiffe://other.example/ns/` + f.in + `/sa/denied"}]}`,
		"foreign2": `{target: {serviceAccount: server}, from: [{serviceAccount: denied}, {spiffeID: "spiffe://other.example/ns/*/sa/*"}]}`,
	}
	for name, spec := range foreign {
		b.apply(policyOf(f.in, name, spec))
		message := b.condition("allowpolicy", f.in, name, "Accepted", "False")
		if !strings.HasPrefix(message, "grants nothing: spec.from[") || !strings.Contains(message, `].spiffeID: SPIFFE ID pattern "spiffe://other.example/`) ||
			!strings.Contains(message, `this mesh is "mesh.example", write spiffe://mesh.example/ns/`) {
			t.Errorf("AllowPolicy %s: %q names no field and no fix", name, message)
		}
		t.Logf("AllowPolicy %s: Accepted=False: %s", name, message)
	}

	// An older CRD: the same without its rules.
	b.laxer("allowpolicies.signet.dev")
	t.Cleanup(func() { // whatever fails, the real ones are there again
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		if out, err := b.command(ctx, "kubectl", "apply", "--server-side", "--force-conflicts", "-f", project+"/deploy/manifests/crds.yaml").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	bad := map[string][2]string{
		"two-callers":    {`{target: {serviceAccount: server}, from: [{serviceAccount: denied, namespace: ` + f.in + `}]}`, "spec.from[0]: has 2 fields set"},
		"wildcard":       {`{target: {serviceAccount: server}, from: [{serviceAccount: denied}, {spiffeID: "spiffe://mesh.example/ns/*x/sa/y"}]}`, "spec.from[1].spiffeID"},
		"mesh-port":      {`{target: {serviceAccount: server}, ports: [8080, 15006], from: [{serviceAccount: denied}]}`, "spec.ports[1]: port 15006 belongs to the mesh itself"},
		"foreign-target": {`{target: {serviceAccount: other/server}, from: [{serviceAccount: denied}]}`, "spec.target.serviceAccount"},
		"nobody":         {`{target: {serviceAccount: server}, from: [{}, {serviceAccount: denied}]}`, "spec.from[0]: has 0 fields set"},
	}
	var all strings.Builder
	for name, is := range bad {
		all.WriteString(policyOf(f.in, name, is[0]))
	}
	b.eventually(20*time.Second, func() string { // until the API server works with the older CRD
		if out, err := b.tryApply(all.String()); err != nil {
			return out
		}
		return ""
	})
	for name, is := range bad {
		message := b.condition("allowpolicy", f.in, name, "Accepted", "False")
		if !strings.HasPrefix(message, "grants nothing: ") || !strings.Contains(message, is[1]) {
			t.Errorf("AllowPolicy %s: %q, want %q in it", name, message, is[1])
		}
		t.Logf("AllowPolicy %s: Accepted=False: %s", name, message)
	}
	b.condition("allowpolicy", f.in, "server-callers", "Accepted", "True")
	b.refused(f.in, "denied", f.address)
	time.Sleep(3 * time.Second)
	f.intact()
}

// laxer puts a CRD in place without the rules in its schema.
func (b *bench) laxer(name string) {
	b.Helper()
	text, err := os.ReadFile(project + "/deploy/manifests/crds.yaml")
	if err != nil {
		b.Fatal(err)
	}
	for _, doc := range strings.Split(string(text), "\n---\n") {
		o := map[string]any{}
		if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
			b.Fatal(err)
		}
		if (&unstructured.Unstructured{Object: o}).GetName() != name {
			continue
		}
		lax, err := yaml.Marshal(withoutRules(o))
		if err != nil {
			b.Fatal(err)
		}
		cmd := b.command(b.Context(), "kubectl", "apply", "--server-side", "-f", "-")
		cmd.Stdin = strings.NewReader(string(lax))
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
		return
	}
	b.Fatalf("no CRD %s", name)
}

func withoutRules(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for _, key := range []string{"x-kubernetes-validations", "minItems", "minLength"} {
			delete(v, key)
		}
		for k := range v {
			v[k] = withoutRules(v[k])
		}
	case []any:
		for i := range v {
			v[i] = withoutRules(v[i])
		}
	}
	return v
}

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

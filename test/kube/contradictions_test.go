package kube

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

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

// intact checks that, that who may was never refused or cut, and that all are
// enrolled.
func (f *field) intact() {
	f.Helper()
	f.undisturbed()
	f.waitStatus(f.in, "enforce: 4 of 4 pods enrolled")
}

// undisturbed is the same without the last.
func (f *field) undisturbed() {
	f.Helper()
	f.closed()
	for _, who := range []string{"near", "far"} {
		_, c := f.loads(f.in, who, f.began)
		if c.Failed+c.Wrong+c.StreamFailed+c.StreamWrong > 0 || c.OK == 0 || c.Streams != 2 {
			f.Errorf("%s was disturbed: %+v", who, c)
		}
		f.Logf("%s: %d calls passed, %d failed, %d streams live", who, c.OK, c.Failed, c.Streams)
	}
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

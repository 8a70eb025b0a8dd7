package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// system is the release's namespace.
const system = "signet-system"

// bench is one test on the cluster, with the release installed.
type bench struct {
	*testing.T
	*env
	gone time.Time // when the last uninstall had ended all pods
}

// open gives a test the cluster with the whole release installed and ready.
func open(t *testing.T) *bench {
	t.Helper()
	e, err := start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{T: t, env: e}
	b.install()
	t.Cleanup(func() {
		if t.Failed() {
			b.report()
		}
	})
	return b
}

// install does what a user without Helm does; what is there already stays.
func (b *bench) install() {
	b.Helper()
	b.kubectl("apply", "--server-side", "-f", project+"/deploy/manifests/crds.yaml")
	b.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=1m")
	b.kubectl("apply", "-f", b.manifests)
	b.ready()
}

// ready waits until every part of the release is.
func (b *bench) ready() {
	b.Helper()
	for _, what := range []string{"deployment/signet-control", "daemonset/signet-agent"} {
		b.kubectl("-n", system, "rollout", "status", what, "--timeout=2m")
	}
	b.eventually(2*time.Minute, func() string { // an old proxy may still hold streams
		ready := 0
		for _, ok := range b.parts("proxy") {
			if ok {
				ready++
			}
		}
		if want := len(b.cluster.Nodes()); ready != want {
			return fmt.Sprintf("%d proxies are ready, want %d", ready, want)
		}
		return ""
	})
	b.kubectl("wait", "--for=condition=Accepted", "meshconfig/mesh", "--timeout=1m")
}

// command returns a program that sees kubectl, the plugin, and the cluster.
func (b *bench) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+b.cluster.Kubeconfig(), "NO_COLOR=1", "PATH="+b.bin+":"+b.cluster.Programs()+":"+os.Getenv("PATH"))
	if name == "kubectl" {
		cmd.Path, cmd.Err = b.cluster.Programs()+"/kubectl", nil
	}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// kubectl fails the test when kubectl fails.
func (b *bench) kubectl(args ...string) string {
	b.Helper()
	out, err := b.try(args...)
	if err != nil {
		b.Fatalf("kubectl %q: %v\n%s", args, err, out)
	}
	return out
}

func (b *bench) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(b.Context(), 5*time.Minute)
	defer cancel()
	out, err := b.command(ctx, "kubectl", args...).CombinedOutput()
	return string(out), err
}

// apply applies YAML documents.
func (b *bench) apply(documents string) {
	b.Helper()
	if out, err := b.tryApply(documents); err != nil {
		b.Fatalf("kubectl apply: %v\n%s\n%s", err, out, documents)
	}
}

func (b *bench) tryApply(documents string) (string, error) {
	cmd := b.command(b.Context(), "kubectl", "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(documents)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// report says what a person would look at first.
func (b *bench) report() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(b.Context()), time.Minute)
	defer cancel()
	for _, args := range [][]string{
		{"get", "pods", "-A", "-o", "wide"},
		{"get", "events", "-A", "--field-selector=type=Warning", "--sort-by=.lastTimestamp"},
		{"signet", "status"},
		{"-n", system, "logs", "-l", "app.kubernetes.io/part-of=signet", "--all-containers", "--prefix", "--tail=25"},
	} {
		out, err := b.command(ctx, "kubectl", args...).CombinedOutput()
		b.Logf("kubectl %q: %v\n%s", args, err, tail(out, 12<<10))
	}
}

func tail(out []byte, most int) []byte {
	if len(out) > most {
		out = append([]byte("..."), out[len(out)-most:]...)
	}
	return out
}

// eventually repeats a look until it finds nothing wrong.
func (b *bench) eventually(limit time.Duration, wrong func() string) {
	b.Helper()
	says := ""
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if says = wrong(); says == "" {
			return
		}
	}
	b.Fatalf("after %s: %s", limit, says)
}

var namespaces atomic.Int64

// namespace makes a namespace in a mode ("" is outside of the mesh), which is
// deleted when the test ends.
func (b *bench) namespace(mode string) string {
	b.Helper()
	name := fmt.Sprintf("t%d-%d", os.Getpid(), namespaces.Add(1))
	b.kubectl("create", "namespace", name)
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(b.Context()), 2*time.Minute)
		defer cancel()
		if out, err := b.command(ctx, "kubectl", "delete", "namespace", name, "--timeout=2m").CombinedOutput(); err != nil {
			b.Errorf("kubectl delete namespace %s: %v\n%s", name, err, out)
		}
	})
	if mode != "" {
		b.mode(name, mode)
	}
	b.eventually(10*time.Second, func() string { // made by a controller
		if out, err := b.try("-n", name, "get", "serviceaccount", "default"); err != nil {
			return out
		}
		return ""
	})
	return name
}

// mode annotates a namespace; "" removes the annotation.
func (b *bench) mode(namespace, mode string) {
	b.Helper()
	value := "signet.dev/mesh=" + mode
	if mode == "" {
		value = "signet.dev/mesh-"
	}
	b.kubectl("annotate", "--overwrite", "namespace", namespace, value)
}

// statusOf returns what a namespace's annotation says.
func (b *bench) statusOf(namespace string) string {
	b.Helper()
	ns, err := b.client.CoreV1().Namespaces().Get(b.Context(), namespace, metav1.GetOptions{})
	if err != nil {
		b.Fatal(err)
	}
	return ns.Annotations["signet.dev/status"]
}

// waitStatus waits until a namespace's annotation says something.
func (b *bench) waitStatus(namespace, want string) {
	b.Helper()
	b.eventually(time.Minute, func() string {
		if got := b.statusOf(namespace); got != want {
			return fmt.Sprintf("status of namespace %s is %q, want %q", namespace, got, want)
		}
		return ""
	})
}

// pod is one pod of the program testpod.
type pod struct {
	namespace, name string
	// node is its node's name; empty: any.
	node string
	// account is its service account, which is made too; empty: default.
	account string
	// args are testpod's.
	args []string
	// more is put into the container and spec into the pod, as YAML flow
	// fields such as `readinessProbe: {...}`, one on each line.
	more, spec []string
	// env is more of the container's environment, as YAML flow mappings.
	env []string
	// labels beside app, which is its name unless it is given.
	labels map[string]string
	// grace is for how many seconds it may end; 0: 1.
	grace int
}

// yaml is the pod's documents.
func (p *pod) yaml() string {
	var out strings.Builder
	account := p.account
	if account == "" {
		account = "default"
	} else {
		fmt.Fprintf(&out, "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: %s, namespace: %s}\n---\n", account, p.namespace)
	}
	labels := map[string]string{"app": p.name}
	for k, v := range p.labels {
		labels[k] = v
	}
	l, _ := json.Marshal(labels) // strings always can
	args, _ := json.Marshal(p.args)
	fmt.Fprintf(&out, "apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: %s, labels: %s}\nspec:\n", p.name, p.namespace, l)
	fmt.Fprintf(&out, "  serviceAccountName: %s\n  terminationGracePeriodSeconds: %d\n", account, max(p.grace, 1))
	if p.node != "" {
		fmt.Fprintf(&out, "  nodeName: %s\n", p.node)
	}
	for _, line := range p.spec {
		fmt.Fprintf(&out, "  %s\n", line)
	}
	fmt.Fprintf(&out, "  containers:\n    - name: main\n      image: signet.example/testpod:1\n      imagePullPolicy: Never\n      args: %s\n", args)
	env := append([]string{"{name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}"}, p.env...)
	fmt.Fprintf(&out, "      env: [%s]\n", strings.Join(env, ", "))
	for _, line := range p.more {
		fmt.Fprintf(&out, "      %s\n", line)
	}
	out.WriteString("---\n")
	return out.String()
}

// service is the documents of a Service of testpod's three ports, for pods
// with a label app.
func service(namespace, name, app string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: %s, namespace: %s}
spec:
  selector: {app: %s}
  ports:
    - {name: http, port: 8080}
    - {name: echo, port: 8081}
    - {name: grpc, port: 8082}
---
`, name, namespace, app)
}

// allow is a policy: callers ("account" or "namespace/account") may reach the
// account on every port.
func allow(namespace, account string, callers ...string) string {
	var from strings.Builder
	for _, c := range callers {
		fmt.Fprintf(&from, "    - serviceAccount: %s\n", c)
	}
	return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: AllowPolicy
metadata: {name: %s-callers, namespace: %s}
spec:
  target: {serviceAccount: %s}
  from:
%s---
`, account, namespace, account, from.String())
}

// start applies pods and waits until all are ready.
func (b *bench) startPods(pods ...*pod) {
	b.Helper()
	var all strings.Builder
	for _, p := range pods {
		all.WriteString(p.yaml())
	}
	b.apply(all.String())
	for _, p := range pods {
		b.kubectl("-n", p.namespace, "wait", "pod", p.name, "--for=condition=Ready", "--timeout=2m")
	}
}

// ip returns a pod's address.
func (b *bench) ip(namespace, name string) string {
	b.Helper()
	p, err := b.client.CoreV1().Pods(namespace).Get(b.Context(), name, metav1.GetOptions{})
	if err != nil {
		b.Fatal(err)
	}
	return p.Status.PodIP
}

// answer is what testpod dial prints.
type answer struct {
	OK    bool    `json:"ok"`
	ID    string  `json:"id"`
	Error string  `json:"error"`
	MS    float64 `json:"ms"`
}

// dial has a pod call an address once, and returns what it says.
func (b *bench) dial(namespace, name, address string) answer {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	cmd := b.command(ctx, "kubectl", "-n", namespace, "exec", name, "--", "/usr/bin/testpod", "dial", address, "--timeout=5s")
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	var a answer
	if jerr := json.Unmarshal(out, &a); jerr != nil {
		b.Fatalf("testpod dial in %s/%s: %v: %v\n%s%s", namespace, name, err, jerr, out, said.String())
	}
	return a
}

// served waits until a call is answered by a pod with a name.
func (b *bench) served(namespace, name, address, by string) {
	b.Helper()
	b.eventually(20*time.Second, func() string {
		if a := b.dial(namespace, name, address); !a.OK || a.ID != by {
			return fmt.Sprintf("%s/%s calls %s: %+v, want an answer by %q", namespace, name, address, a, by)
		}
		return ""
	})
}

// refused waits until a call is refused.
func (b *bench) refused(namespace, name, address string) {
	b.Helper()
	b.eventually(20*time.Second, func() string {
		if a := b.dial(namespace, name, address); a.OK {
			return fmt.Sprintf("%s/%s calls %s: %+v, want a refusal", namespace, name, address, a)
		}
		return ""
	})
}

// counts are what testpod load prints each second, and at its end.
type counts struct {
	Summary      bool           `json:"summary"`
	At           time.Time      `json:"at"`
	OK           int            `json:"ok"`
	Failed       int            `json:"failed"`
	Wrong        int            `json:"wrong"`
	Streams      int            `json:"streams"`
	Echoed       int            `json:"echoed"`
	StreamFailed int            `json:"streamFailed"`
	StreamWrong  int            `json:"streamWrong"`
	Skipped      int            `json:"skipped"`
	MaxMS        float64        `json:"maxMs"`
	Errors       map[string]int `json:"errors"`
}

// loads returns the seconds that a pod with testpod load has printed since an
// instant, and their sum.
func (b *bench) loads(namespace, name string, since time.Time) (each []counts, total counts) {
	b.Helper()
	out := b.kubectl("-n", namespace, "logs", name, "-c", "main")
	total.Errors = map[string]int{}
	dec := json.NewDecoder(strings.NewReader(out))
	for dec.More() {
		var c counts
		if err := dec.Decode(&c); err != nil {
			b.Fatalf("logs of %s/%s: %v\n%s", namespace, name, err, out)
		}
		if c.Summary || c.At.Before(since) {
			continue
		}
		each = append(each, c)
		total.OK += c.OK
		total.Failed += c.Failed
		total.Wrong += c.Wrong
		total.Echoed += c.Echoed
		total.StreamFailed += c.StreamFailed
		total.StreamWrong += c.StreamWrong
		total.Skipped += c.Skipped
		total.Streams = c.Streams
		total.MaxMS = max(total.MaxMS, c.MaxMS)
		for text, n := range c.Errors {
			total.Errors[text] += n
		}
	}
	return each, total
}

// end is one end of an audit record.
type end struct {
	ID       string `json:"id"`
	Workload string `json:"workload"`
	Address  string `json:"address"`
	Via      string `json:"via"`
}

// record is what of an audit record tests look at.
type record struct {
	ID          string    `json:"id"`
	Node        string    `json:"node"`
	Side        string    `json:"side"`
	Start       time.Time `json:"start"`
	End         time.Time `json:"end"`
	Source      end       `json:"source"`
	Destination end       `json:"destination"`
	Verdict     string    `json:"verdict"`
	Reason      string    `json:"reason"`
	Policy      string    `json:"policy"`
	Transport   string    `json:"transport"`
	Ended       string    `json:"ended"`
}

// audit asks every node for its records. A node that is slow is asked again.
func (b *bench) audit(args ...string) []record {
	b.Helper()
	for range 5 {
		if records, missing := b.auditOnce(args...); missing == "" {
			return records
		}
		time.Sleep(2 * time.Second)
	}
	records, missing := b.auditOnce(args...)
	if missing != "" {
		b.Fatalf("kubectl signet audit %q: missing %s", args, missing)
	}
	return records
}

// auditOnce also says which nodes did not answer, or that the control plane did not.
func (b *bench) auditOnce(args ...string) (records []record, missing string) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	cmd := b.command(ctx, "kubectl", append([]string{"signet", "audit", "-o", "json", "--limit=0"}, args...)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		b.Fatal(err)
	}
	var doc struct {
		Records []record `json:"records"`
		Missing []struct{ Node, Error string }
	}
	if exit != nil && len(out) == 0 { // the control plane is away
		return nil, said.String()
	}
	if err := json.Unmarshal(out, &doc); err != nil {
		b.Fatalf("kubectl signet audit %q: %v: %v\n%s\n%s", args, exit, err, said.String(), tail(out, 4096))
	}
	if len(doc.Missing) > 0 {
		missing = fmt.Sprintf("%+v", doc.Missing)
	}
	return doc.Records, missing
}

// id is the SPIFFE ID of a service account.
func id(namespace, account string) string {
	return "spiffe://" + trustDomain + "/ns/" + namespace + "/sa/" + account
}

// exitCode is a command's, 0 if it succeeded, -1 if it did not run.
func exitCode(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	return -1
}

package kube

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	controllers "github.com/signet-mesh/signet/test/certmanager"
)

// companyCA is a CA that cert-manager makes and keeps, and a ClusterIssuer of it.
const companyCA = `
apiVersion: v1
kind: Namespace
metadata: {name: cert-manager}
---
apiVersion: cert-manager.io/v1
kind: ClusterIssuer
metadata: {name: itself}
spec: {selfSigned: {}}
---
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {name: company, namespace: cert-manager}
spec:
  commonName: company
  isCA: true
  secretName: company
  privateKey: {algorithm: ECDSA, size: 256, rotationPolicy: Always}
  issuerRef: {name: itself, kind: ClusterIssuer}
---
apiVersion: cert-manager.io/v1
kind: ClusterIssuer
metadata: {name: company}
spec: {ca: {secretName: company}}
`

// above is what of `kubectl signet ca status -o json` is said of cert-manager.
type above struct {
	authority
	Upstream struct{ Name, Reason, Message string }
}

func (b *bench) above() (s above) {
	b.Helper()
	out, err := b.command(b.Context(), "kubectl", "signet", "ca", "status", "-o", "json").Output()
	if err != nil {
		return s // a control plane that is being replaced
	}
	if err := json.Unmarshal(out, &s); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	return s
}

// settled waits until one root signs alone, which is another than those, and all
// nodes trust and use it alone.
func (b *bench) settled(was ...string) above {
	b.Helper()
	var s above
	b.eventually(4*time.Minute, func() string {
		if s = b.above(); s.Stage != "idle" || len(s.Roots) != 1 || len(s.Nodes) != 2 || s.Upstream.Reason != "Ready" {
			return fmt.Sprintf("%+v", s)
		}
		root := s.Roots[0].Fingerprint
		if strings.Contains(fmt.Sprint(was), root) {
			return "the root is still " + root
		}
		for _, n := range s.Nodes {
			if want := []string{root}; fmt.Sprint(n.Trusted, n.Used) != fmt.Sprint(want, want) {
				return fmt.Sprintf("%+v", n)
			}
		}
		return ""
	})
	return s
}

// below is a release that has its authority from cert-manager in a mode.
func (b *bench) below(mode string) string {
	b.Helper()
	helm := exec.CommandContext(b.Context(), "go", "tool", "-modfile=test/tools/helm/go.mod", "helm", "template", "signet", "deploy/chart/signet", "--namespace", system,
		"--set", "trustDomain="+trustDomain+",namespace.create=true,mesh.svidTTL=20s",
		"--set-string", "image.tag="+b.version, // which may be all digits
		"--set", "certManager.enabled=true,certManager.issuerRef.name=company,certManager.mode="+mode)
	helm.Dir = project
	helm.Stderr = b.Output()
	manifests, err := helm.Output()
	if err != nil {
		b.Fatal(err)
	}
	return string(manifests)
}

// A running mesh gets its authority from cert-manager, whose real controllers run; the
// CA of the issuer is replaced; cert-manager goes and comes back; then it signs each
// workload's certificate, see perWorkload. Calls under load do not fail at any time,
// though cert-manager switches at once.
func TestCertManager(t *testing.T) {
	b := open(t)
	config, err := clientcmd.BuildConfigFromFlags("", b.cluster.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	controllers.Install(t, config)
	running := controllers.Start(t, config)
	b.apply(companyCA)
	b.kubectl("wait", "--for=condition=Ready", "clusterissuer/company", "--timeout=2m")

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
	own := b.ca("status")

	// A mesh does not go back to a root of its own, so the next test gets another. A
	// proxy with open connections would keep the release from going.
	defer func() {
		b.kubectl("-n", l.namespace, "delete", "pods", "--all", "--wait", "--grace-period=1")
		b.uninstall()
		b.install()
	}()
	began := time.Now()
	b.apply(b.below("intermediate"))
	b.ready()
	first := b.settled(own.Roots[0].Fingerprint)
	t.Logf("cert-manager's root was the mesh's alone within %s", time.Since(began).Round(time.Second))
	if first.Upstream.Name != "ClusterIssuer company" {
		t.Errorf("%+v", first.Upstream)
	}
	if keys := b.kubectl("-n", system, "get", "secret", "signet-ca", "-o", "go-template={{range $name, $_ := .data}}{{$name}} {{end}}"); keys != "below-root.crt below-root.key root.crt " {
		t.Errorf("the Secret has %s", keys)
	}
	l.judge("cert-manager made the authority above")
	if got := b.kubectl("get", "meshconfig", "mesh", "-o", `jsonpath={.status.conditions[?(@.type=="Authority")].status} {.status.conditions[?(@.type=="Authority")].reason} {.status.conditions[?(@.type=="Accepted")].status}`); got != "True Ready True" {
		t.Errorf("the condition says %q", got)
	}

	// cert-manager is gone, and its CA too; an operator wants another root.
	running.Stop()
	b.kubectl("-n", "cert-manager", "delete", "secret", "company")
	b.kubectl("patch", "meshconfig", "mesh", "--type=merge", "-p", fmt.Sprintf(`{"spec":{"rootNotBefore":%q}}`, time.Now().UTC().Format(time.RFC3339)))
	b.eventually(time.Minute, func() string {
		if got := b.kubectl("get", "meshconfig", "mesh", "-o", `jsonpath={.status.conditions[?(@.type=="Authority")].status} {.status.conditions[?(@.type=="Authority")].reason}`); got != "True Pending" {
			return got
		}
		return ""
	})
	b.roll("control") // what signs is in the Secret
	b.startPods(&pod{namespace: l.namespace, name: "late", account: "client", node: "node2", args: []string{"serve"}})
	b.served(l.namespace, "late", "server."+l.namespace+":8080", "server")
	l.judge("without cert-manager, and the control plane started again")

	// It is back, with another CA.
	running = controllers.Start(t, config)
	began = time.Now()
	second := b.settled(first.Roots[0].Fingerprint)
	t.Logf("the issuer's next root was the mesh's alone within %s", time.Since(began).Round(time.Second))
	l.judge("the issuer's CA replaced")
	if out := b.kubectl("signet", "check"); !strings.Contains(out, "SIG0520") {
		t.Errorf("signet check says nothing of it:\n%s", out)
	}
	t.Logf("roots: own %.16s, then %.16s, then %.16s", own.Roots[0].Fingerprint, first.Roots[0].Fingerprint, second.Roots[0].Fingerprint)

	l.perWorkload(config, running)
}

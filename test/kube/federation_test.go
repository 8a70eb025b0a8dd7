package kube

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/cluster"
	"github.com/signet-mesh/signet/test/harness"
)

const (
	partnerDomain = "partner.example"
	partnerApp    = "spiffe://" + partnerDomain + "/ns/shop/sa/app"
	partnerPort   = "8451"
)

// startPartner starts a mesh of another trust domain, by `signet up`, in a node's
// network namespace: on a machine that the cluster's nodes and pods reach. Its only
// workload is the test's own process.
func (b *bench) startPartner(on *cluster.Node) (m *harness.Mesh, source *workloadapi.X509Source) {
	b.Helper()
	if err := harness.Build(false); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(harness.RemoveBuilt)
	exe, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	path, err := on.NetNS()
	if err != nil {
		b.Fatal(err)
	}
	documents := harness.ConfigOf(partnerDomain, "2m") + harness.Namespace("shop", "enforce") + harness.Program("shop", "app", os.Geteuid(), exe)
	if err := lab.In(path, func() error {
		m = harness.Start(b.T, harness.Options{
			Lab: &lab.Lab{}, Node: "p1", NoWait: true, Documents: map[string]string{"mesh.yaml": documents},
			Args: []string{"--bundle-listen", net.JoinHostPort(on.Addr().String(), partnerPort), "--bundle-refresh-hint", "1s"},
		})
		return nil
	}); err != nil {
		b.Fatal(err)
	}
	m.Eventually(time.Minute, "the partner's agent to answer", func() error {
		_, err := os.Stat(filepath.Join(m.RunDir, "api", "agent.sock"))
		return err
	})
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	if source, err = workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+filepath.Join(m.RunDir, "api", "agent.sock")))); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { source.Close() })
	return m, source
}

// shown returns the bundle that an endpoint shows, asked from a node.
func (b *bench) shown(from *cluster.Node, address string) string {
	b.Helper()
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, DialContext: from.DialContext,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // an operator carries the first bundle over in another way
	}}
	var text string
	b.eventually(30*time.Second, func() string {
		req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, "https://"+address+"/bundle", nil)
		if err != nil {
			return err.Error()
		}
		resp, err := client.Do(req)
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			return fmt.Sprintf("%s: %s %v: %s", address, resp.Status, err, body)
		}
		text = string(body)
		return ""
	})
	return text
}

// federate is a Federation document.
func federate(domain, address, bundle string) string {
	return harness.Federation(domain, "https://"+address+"/bundle", "spiffe://"+domain+"/signet/bundle", bundle)
}

// showBundle has two replicas of the control plane show the bundle, as the chart's
// values federation.spiffe.enabled and control.replicas do, and returns where.
func (b *bench) showBundle() (address string) {
	b.Helper()
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(b.Context()), 3*time.Minute)
		defer cancel()
		for _, args := range [][]string{
			{"apply", "-f", b.manifests}, {"-n", system, "delete", "service", "signet-federation", "--ignore-not-found"},
			{"-n", system, "rollout", "status", "deployment/signet-control", "--timeout=2m"},
		} {
			if out, err := b.command(ctx, "kubectl", args...).CombinedOutput(); err != nil {
				b.Errorf("kubectl %q: %v\n%s", args, err, out)
			}
		}
	})
	b.apply(`apiVersion: v1
kind: Service
metadata: {name: signet-federation, namespace: ` + system + `}
spec:
  selector: {app.kubernetes.io/name: signet-control, app.kubernetes.io/part-of: signet}
  ports: [{name: spiffe, port: 8443}]
`)
	b.replace("control", func() {
		b.kubectl("-n", system, "patch", "deployment", "signet-control", "--type=json", "-p", `[
			{"op":"replace","path":"/spec/replicas","value":2},
			{"op":"add","path":"/spec/template/spec/containers/0/args/-","value":"--bundle-listen=:8443"},
			{"op":"add","path":"/spec/template/spec/containers/0/args/-","value":"--bundle-refresh-hint=1s"}]`)
	})
	b.kubectl("-n", system, "rollout", "status", "deployment/signet-control", "--timeout=2m") // the second one
	s, err := b.client.CoreV1().Services(system).Get(b.Context(), "signet-federation", metav1.GetOptions{})
	if err != nil {
		b.Fatal(err)
	}
	return net.JoinHostPort(s.Spec.ClusterIP, "8443")
}

// sequences returns the number that each replica shows, for the same keys.
func (b *bench) sequences(from *cluster.Node) (out []int) {
	b.Helper()
	for _, ip := range b.controlAddrs() {
		var doc struct {
			Sequence int `json:"spiffe_sequence"`
		}
		if err := json.Unmarshal([]byte(b.shown(from, net.JoinHostPort(ip, "8443"))), &doc); err != nil {
			b.Fatal(err)
		}
		out = append(out, doc.Sequence)
	}
	return out
}

// federation waits until the status of the partner's Federation has words in it.
func (b *bench) federation(words ...string) {
	b.Helper()
	b.eventually(30*time.Second, func() string {
		got := b.kubectl("get", "federation", partnerDomain, "-o", `jsonpath={range .status.conditions[*]}{.type}={.status} {.message}; {end}`)
		for _, w := range words {
			if !strings.Contains(got, w) {
				return fmt.Sprintf("the Federation's status says %q, want %q", got, w)
			}
		}
		return ""
	})
}

// A cluster and a mesh on a machine are federated, each by the other's bundle
// endpoint. A go-spiffe client of the other mesh calls a captured pod: what decides
// is a policy of the cluster that names the other trust domain. The other mesh
// replaces its root and the client goes on; then it is switched off and the control
// plane replaced, both replicas, and who was believed is believed still, by the copy
// that is in the Federation's status. Without the Federation it is nobody.
//
// What it defends: that policies of a cluster take a foreign trust domain only while
// it is federated (documents.compile), that what was fetched is kept (bundleCopy), and
// that replicas show one number (Published).
func TestFederationInCluster(t *testing.T) {
	b := open(t)
	node1, node2 := b.cluster.Node("node1"), b.cluster.Node("node2")
	ns := b.namespace("enforce")
	b.startPods(&pod{namespace: ns, name: "server", account: "server", node: "node1", args: []string{"serve"}})
	b.waitStatus(ns, "enforce: 1 of 1 pods enrolled")
	server := b.ip(ns, "server")
	endpoint := b.showBundle()
	if n := b.sequences(node1); len(n) != 2 || n[0] != n[1] || n[0] < 1 {
		t.Errorf("the replicas show the numbers %v", n)
	}
	partner, source := b.startPartner(node1)

	// What calls, and what it gets.
	serverID := spiffeid.RequireFromString(id(ns, "server"))
	live := func() *tls.Config {
		return tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(serverID))
	}
	policy := strings.ReplaceAll(fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: AllowPolicy
metadata: {name: partner, namespace: NS}
spec: {target: {serviceAccount: server}, ports: [8080], from: [{spiffeID: %q}]}
`, partnerApp), "NS", ns)
	calls := func(what string, config func() *tls.Config, want string) {
		t.Helper()
		b.eventually(30*time.Second, func() string {
			by, err := b.tunnelledBy(node2, server, config())
			switch got := "refused"; {
			case err == nil && by == "server":
				got = "served"
				fallthrough
			default:
				if err != nil && strings.Contains(err.Error(), "403") {
					got = "denied"
				}
				if got != want {
					return fmt.Sprintf("%s: %s (%q, %v), want %s", what, got, by, err, want)
				}
			}
			return ""
		})
	}
	stranger := func() *tls.Config { // does not look who answers
		svid, err := source.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		return with(svid.Certificates, svid.PrivateKey)
	}

	// Nobody yet: not to the proxy, and not to policies.
	calls("before any Federation", stranger, "refused")
	b.apply(policy)
	b.eventually(20*time.Second, func() string {
		if got := b.kubectl("-n", ns, "get", "allowpolicy", "partner", "-o", `jsonpath={.status.conditions[?(@.type=="Accepted")].message}`); !strings.Contains(got, "add a Federation") {
			return "the policy's status says " + got
		}
		return ""
	})
	b.kubectl("-n", ns, "delete", "allowpolicy", "partner")

	// Federated both ways: allowed by nobody, then by a policy.
	partnerBundle := b.shown(node1, net.JoinHostPort(node1.Addr().String(), partnerPort))
	printed, err := b.command(t.Context(), "kubectl", "signet", "ca", "bundle", "-o", "spiffe").Output()
	if err != nil {
		t.Fatal(err)
	}
	if shown := b.shown(node1, endpoint); string(printed) != shown+"\n" {
		t.Errorf("the endpoint shows\n%s\nand the command prints\n%s", shown, printed)
	}
	partner.Edit("federation.yaml", federate(trustDomain, endpoint, string(printed)))
	b.apply(federate(partnerDomain, net.JoinHostPort(node1.Addr().String(), partnerPort), partnerBundle))
	b.federation("Accepted=True valid", "Fetched=True bundle ")
	partner.Eventually(30*time.Second, "the partner to know the cluster's bundle", func() error {
		_, err := source.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString(trustDomain))
		return err
	})
	calls("without a policy", live, "denied")
	b.apply(policy)
	calls("under a policy", live, "served")
	b.kubectl("-n", ns, "delete", "allowpolicy", "partner")
	calls("when the policy is gone", live, "denied")
	b.apply(policy)
	calls("under the policy again", live, "served")

	// The partner's root is replaced.
	old := x509bundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString(partnerDomain), parseRoots(t, partnerBundle))
	if _, err := partner.Client.RotateRoot(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	n := 0
	partner.Eventually(time.Minute, "the partner's next root to sign", func() error {
		if by, err := b.tunnelledBy(node2, server, live()); err != nil || by != "server" {
			t.Fatalf("call %d while the partner replaces its root: %q, %v", n, by, err)
		}
		n++
		s, err := partner.Client.Authority(t.Context())
		if err != nil || s.Stage != adminv1.RotationRetiring {
			return errors.Join(err, fmt.Errorf("it is %s, and waits for %q", s.Stage, s.Waits))
		}
		svid, err := source.GetX509SVID()
		if err != nil {
			return err
		}
		if below(svid.Certificates, old) {
			return errors.New("its client has a certificate of the former root")
		}
		return nil
	})
	t.Logf("%d calls while the partner replaced its root, none failed", n)

	// It is switched off, and the control plane replaced.
	svid, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	last := func() *tls.Config { return with(svid.Certificates, svid.PrivateKey) }
	calls("by its last certificate", last, "served")
	before := b.sequences(node1)
	partner.Stop()
	b.roll("control")
	b.federation("Accepted=True", "Fetched=False what was fetched before stays believed")
	time.Sleep(3 * time.Second) // the new replicas' word has reached the node
	calls("while the partner is switched off", last, "served")
	if after := b.sequences(node1); len(after) != 2 || slices.Max(after) != slices.Max(before) || after[0] != after[1] {
		t.Errorf("the replicas showed the numbers %v, and after they were replaced %v", before, after)
	}

	b.kubectl("delete", "federation", partnerDomain)
	calls("when the Federation is gone", last, "refused")
}

// with presents a certificate, and does not look who answers.
func with(chain []*x509.Certificate, key any) *tls.Config {
	c := tls.Certificate{PrivateKey: key}
	for _, cert := range chain {
		c.Certificate = append(c.Certificate, cert.Raw)
	}
	return &tls.Config{Certificates: []tls.Certificate{c}, MinVersion: tls.VersionTLS13, InsecureSkipVerify: true} //nolint:gosec // who answers is not what is tested
}

// parseRoots reads the roots of a bundle document.
func parseRoots(t *testing.T, document string) (roots []*x509.Certificate) {
	t.Helper()
	var set struct {
		Keys []struct {
			Use string
			X5c [][]byte
		}
	}
	if err := json.Unmarshal([]byte(document), &set); err != nil {
		t.Fatal(err)
	}
	for _, k := range set.Keys {
		for _, der := range k.X5c {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			roots = append(roots, c)
		}
	}
	if len(roots) == 0 {
		t.Fatalf("no roots in %s", document)
	}
	return roots
}

// below reports whether a chain ends at one of a bundle's roots.
func below(chain []*x509.Certificate, bundle *x509bundle.Bundle) bool {
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range bundle.X509Authorities() {
		roots.AddCert(c)
	}
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err == nil
}

package kube

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	controllers "github.com/signet-mesh/signet/test/certmanager"
	"github.com/signet-mesh/signet/test/cluster"
)

// perWorkload goes on in mode per-workload, with real agents and pods under load. Each
// workload's certificate is the issuer's own, nodes' are not; it is renewed; a serial
// number that cert-manager gave leads from connections to whom the certificate was
// issued for, and has it refused. While cert-manager is gone, those that are there go
// on, and a new one is in no mesh until it is back.
func (l *loaded) perWorkload(config *rest.Config, running *controllers.Controllers) {
	l.Helper()
	b, ns := l.bench, l.namespace
	defer func() {
		if b.Failed() { // before the release is removed
			out, err := b.try("signet", "certs", "-o", "json")
			b.Logf("%v\n%s", err, out)
			b.report()
		}
	}()
	began := time.Now()
	b.apply(allow(ns, "server", "client", "fresh"))
	b.replace("control", func() { b.apply(b.below("per-workload")) })
	node1, node2 := b.cluster.Node("node1"), b.cluster.Node("node2")
	leaf := func(node *cluster.Node, account string) *x509.Certificate {
		cert, _ := b.copied(node, id(ns, account))
		leaf, err := x509.ParseCertificate(cert.Certificate[0])
		if err != nil {
			b.Fatal(err)
		}
		return leaf
	}
	b.eventually(40*time.Second, func() string {
		for _, c := range []*x509.Certificate{leaf(node1, "server"), leaf(node1, "client"), leaf(node2, "client")} {
			if c.Issuer.CommonName != "company" {
				return fmt.Sprintf("%s still has a certificate of %s", c.URIs[0], c.Issuer)
			}
		}
		return ""
	})
	b.Logf("each certificate was cert-manager's within %s", time.Since(began).Round(time.Second))

	// What is shown on the wire.
	server := b.ip(ns, "server")
	client, serial := b.copied(node2, id(ns, "client"))
	var shown []*x509.Certificate
	by, err := b.tunnelledBy(node2, server, &tls.Config{
		Certificates: []tls.Certificate{*client}, MinVersion: tls.VersionTLS13,
		InsecureSkipVerify: true, //nolint:gosec // it is looked at below
		VerifyConnection:   func(s tls.ConnectionState) error { shown = s.PeerCertificates; return nil },
	})
	if err != nil || by != "server" || len(shown) != 1 || shown[0].Issuer.CommonName != "company" || len(shown[0].URIs) != 1 || shown[0].URIs[0].String() != id(ns, "server") {
		b.Fatalf("the server's tunnel shows %d certificates, %q answers, %v", len(shown), by, err)
	}
	issuer := hex.EncodeToString(shown[0].AuthorityKeyId)
	for _, c := range b.certificates() {
		if (c.Issuer == issuer) == (c.Holder == "node") {
			b.Errorf("the certificate of %s is of %s; cert-manager is %s", c.Holder, c.Issuer, issuer)
		}
	}
	b.eventually(20*time.Second, func() string {
		if leaf(node1, "server").SerialNumber.Cmp(shown[0].SerialNumber) == 0 {
			return "the server's certificate is not renewed"
		}
		return ""
	})
	l.judge("each certificate by cert-manager, and renewed")

	var found struct {
		Issued struct{ Serial, ID, Workload, Node, Outcome string }
		shownIn
	}
	b.eventually(20*time.Second, func() string { // records come in batches
		out, err := b.command(b.Context(), "kubectl", "signet", "audit", "--serial", serial, "--side", "destination", "--limit=5", "-o", "json").Output()
		if err == nil {
			err = json.Unmarshal(out, &found)
		}
		if err != nil || len(found.Records) == 0 {
			return fmt.Sprintf("%d records of %s, %v\n%s", len(found.Records), serial, err, out)
		}
		return ""
	})
	if i := found.Issued; i.Serial != serial || i.ID != id(ns, "client") || i.Node != "node2" || !strings.HasPrefix(i.Workload, ns+"/") || i.Outcome != "issued" {
		b.Errorf("of %s the log says %+v", serial, i)
	}
	for _, r := range found.Records {
		if r.Source.Serial != serial || r.Source.ID != id(ns, "client") || r.Destination.ID != id(ns, "server") || r.Verdict != "allowed" {
			b.Errorf("shown in %+v", r)
		}
	}

	// It is copied, and revoked.
	stolen, serial := b.copied(node2, id(ns, "client"))
	if by, err := b.tunnelled(node1, server, stolen); err != nil || by != "server" {
		b.Fatalf("before the revocation the copy must be of use: %q, %v", by, err)
	}
	began = time.Now()
	if list := b.revoked("revoke", "--serial", serial, "--reason", "copied from a disk"); len(list.Certificates) != 1 || list.Certificates[0].ID != id(ns, "client") || !list.Certificates[0].Refused || list.Nodes != 2 {
		b.Errorf("revoked: %+v", list)
	}
	b.eventually(revokedWithin-time.Since(began), func() string {
		if by, err := b.tunnelled(node1, server, stolen); err == nil {
			return "the copy is of use: " + by
		}
		return ""
	})
	b.eventually(10*time.Second, func() string {
		if now := leaf(node2, "client"); hex.EncodeToString(now.SerialNumber.Bytes()) == serial || now.Issuer.CommonName != "company" {
			return fmt.Sprintf("the workload has %x of %s", now.SerialNumber, now.Issuer)
		}
		return ""
	})
	b.Logf("the workload had another certificate %s after the revocation", time.Since(began).Round(100*time.Millisecond))
	l.steady(20 * time.Second)
	_, near := l.loads(ns, "near", began)
	_, far := l.loads(ns, "far", began)
	b.Logf("new connections meanwhile: far %d, %d failed, %d streams ended; near %d, %d failed", far.OK+far.Failed, far.Failed, far.StreamFailed, near.OK+near.Failed, near.Failed)
	// Those that were asked for as the old tunnels ended are in them.
	if far.Failed > far.OK/20 || near.Failed+near.StreamFailed+near.Wrong > 0 {
		b.Errorf("far %+v, near %+v", far, near)
	}

	// cert-manager is gone. Those that are there have half of a life to go at least.
	b.kubectl("patch", "meshconfig", "mesh", "--type=merge", "-p", `{"spec":{"svidTTL":"2m"}}`)
	b.eventually(30*time.Second, func() string {
		for _, c := range b.certificates() {
			if c.Holder != "node" && c.NotAfter.Sub(c.NotBefore) < time.Minute {
				return fmt.Sprintf("%+v is of the shorter life", c)
			}
		}
		return ""
	})
	l.since = time.Now()
	running.Stop()
	condition := func(want string) {
		b.Helper()
		b.eventually(50*time.Second, func() string {
			if got := b.kubectl("get", "meshconfig", "mesh", "-o", `jsonpath={range .status.conditions[?(@.type=="Authority")]}{.status} {.reason}: {.message}{end}`); !strings.HasPrefix(got, want) {
				return got
			}
			return ""
		})
	}
	began = time.Now()
	fresh := &pod{namespace: ns, name: "fresh", account: "fresh", node: "node2", args: []string{"serve"}}
	b.apply(fresh.yaml())
	condition("False Pending: workloads' certificates do not come: CertificateRequest signet-system/signet-workload-")
	b.Logf("the condition told it after %s", time.Since(began).Round(time.Second))
	if p, err := b.client.CoreV1().Pods(ns).Get(b.Context(), "fresh", metav1.GetOptions{}); err != nil || p.Status.Phase != corev1.PodPending || b.statusOf(ns) != "enforce: 4 of 5 pods enrolled" {
		b.Errorf("without a certificate the new pod is %s, and its namespace %q: %v", p.Status.Phase, b.statusOf(ns), err)
	}
	b.eventually(30*time.Second, func() string {
		if events := b.kubectl("-n", ns, "get", "events", "--field-selector=involvedObject.name=fresh"); !strings.Contains(events, "there is no certificate yet: ") || !strings.Contains(events, "waits for approval") {
			return "no event says why the new pod waits:\n" + events
		}
		return ""
	})
	l.judge("without cert-manager")
	controllers.Start(b.T, config)
	began = time.Now()
	b.kubectl("-n", ns, "wait", "pod", "fresh", "--for=condition=Ready", "--timeout=1m")
	b.served(ns, "fresh", "server."+ns+":8080", "server")
	b.Logf("a new pod was served %s after cert-manager was back", time.Since(began).Round(100*time.Millisecond))
	condition("True Ready: ")
	l.judge("cert-manager is back")
}

// shownIn is where a certificate was shown, as `kubectl signet audit -o json` has it.
type shownIn struct {
	Records []struct {
		Source, Destination struct{ ID, Serial string }
		Verdict             string
	}
}

package kube

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/test/cluster"
	"github.com/signet-mesh/signet/xds"
)

// thief has copied a node's certificate and key, and sits on another node.
type thief struct {
	*bench
	cert   tls.Certificate
	bundle *x509bundle.Bundle
	seat   *cluster.Node
	tries  int // attempts made
	won    int // attempts that got something
}

// steal takes what an agent keeps on its node's disk.
func (b *bench) steal(from, seat *cluster.Node) *thief {
	b.Helper()
	dir := filepath.Join(from.Disk(), "var/lib/signet/agent")
	t := &thief{bench: b, seat: seat}
	var err error
	if t.cert, err = tls.LoadX509KeyPair(filepath.Join(dir, "node.pem"), filepath.Join(dir, "node.pem")); err != nil {
		b.Fatal(err)
	}
	if t.bundle, err = x509bundle.Load(spiffeid.RequireTrustDomainFromString(trustDomain), filepath.Join(dir, "bundle.pem")); err != nil {
		b.Fatal(err)
	}
	return t
}

// tls is the client's side of a connection to the control plane.
func (t *thief) tls() *tls.Config {
	t.Helper()
	c, err := caserver.ClientTLS(caserver.ClientConfig{
		TrustDomain: t.bundle.TrustDomain(), Bundle: t.bundle,
		Certificate: func() (*tls.Certificate, error) { return &t.cert, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// dial connects to the control plane's port for nodes.
func (t *thief) dial() *grpc.ClientConn {
	t.Helper()
	s, err := t.client.CoreV1().Services(system).Get(t.Context(), "signet-control", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return t.dialTo(net.JoinHostPort(s.Spec.ClusterIP, "9443"))
}

// refused counts an attempt, which must end in an error.
func (t *thief) refused(what string, err error) {
	t.Helper()
	t.tries++
	if err == nil {
		t.won++
		t.Errorf("%s: got what it asked for", what)
	} else if t.tries%20 == 1 {
		t.Logf("attempt %d: %s: %v", t.tries, what, err)
	}
}

// A node's certificate that was stolen gets nothing of pods of another node: no
// certificate, no state, no listener or route or key, no record. It defends what
// the control plane and the agents decide by the certificate alone.
func TestStolenNodeCertificate(t *testing.T) {
	b := open(t)
	ns := b.namespace("enforce")
	b.startPods(
		&pod{namespace: ns, name: "mine", account: "mine", node: "node1", args: []string{"serve"}},
		&pod{namespace: ns, name: "theirs", account: "theirs", node: "node2", args: []string{"serve"}},
	)
	b.apply(allow(ns, "theirs", "mine"))
	b.waitStatus(ns, "enforce: 2 of 2 pods enrolled")
	uid := func(name string) string {
		return strings.TrimSpace(b.kubectl("-n", ns, "get", "pod", name, "-o", "jsonpath={.metadata.uid}"))
	}
	node1, node2 := b.cluster.Node("node1"), b.cluster.Node("node2")
	th := b.steal(node1, node2)
	if got := th.cert.Leaf.URIs[0].String(); got != "spiffe://"+trustDomain+"/signet/node/node1" {
		t.Fatalf("stole the certificate of %s", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	conn := th.dial()
	node := nodev1.NewNodeClient(conn)

	// The control: what is node1's own is given.
	mine, theirs, theirUID := ns+"/mine", ns+"/theirs", uid("theirs")
	got, err := node.Issue(ctx, &nodev1.IssueRequest{Workload: mine, Uid: uid("mine"), Csr: csr(t, id(ns, "mine"))})
	if err != nil {
		t.Fatalf("the stolen certificate is not good at all: %v", err)
	}
	if leaf, err := x509.ParseCertificate(got.GetChain()[0]); err != nil || leaf.URIs[0].String() != id(ns, "mine") {
		t.Fatalf("%v %v", leaf.URIs, err)
	}

	// By certificate requests.
	for _, workload := range []string{theirs, theirs + "/", "./" + theirs, strings.ToUpper(theirs), ns + "/*", "*", "", "signet-system/signet-control", "/" + theirs, theirs + "\x00"} {
		for _, u := range []string{theirUID, uid("mine"), ""} {
			_, err := node.Issue(ctx, &nodev1.IssueRequest{Workload: workload, Uid: u, Csr: csr(t, "")})
			th.refused(fmt.Sprintf("issue for %q with uid %q", workload, u), err)
		}
	}
	for _, ids := range [][]string{
		{id(ns, "theirs")},
		{id(ns, "mine"), id(ns, "theirs")},
		{id(ns, "theirs"), id(ns, "mine")},
		{"spiffe://" + trustDomain + "/signet/node/node2"},
		{"spiffe://" + trustDomain + "/signet/control"},
		{"spiffe://" + trustDomain},
		{"spiffe://" + trustDomain + "/ns/" + ns + "/sa/mine/../theirs"},
		{"spiffe://other.example/ns/" + ns + "/sa/mine"},
		{"https://" + trustDomain + "/ns/" + ns + "/sa/mine"},
	} {
		_, err := node.Issue(ctx, &nodev1.IssueRequest{Workload: mine, Uid: uid("mine"), Csr: csr(t, ids...)})
		th.refused(fmt.Sprintf("issue for the own workload, asking for %q", ids), err)
	}
	_, err = node.Issue(ctx, &nodev1.IssueRequest{Workload: mine, Uid: theirUID, Csr: csr(t, "")})
	th.refused("issue for the own workload with the other's uid", err)
	for _, ids := range [][]string{{id(ns, "theirs")}, {"spiffe://" + trustDomain + "/signet/node/node2"}, {"spiffe://" + trustDomain + "/signet/control"}, nil} {
		// A renewal looks at the key of the request only; what counts is whose
		// certificate comes.
		svid, err := node.Renew(ctx, &nodev1.RenewRequest{Csr: csr(t, ids...)})
		if err == nil {
			leaf, perr := x509.ParseCertificate(svid.GetChain()[0])
			if perr == nil && leaf.URIs[0].String() == "spiffe://"+trustDomain+"/signet/node/node1" && !leaf.IsCA {
				err = errors.New("it is node1's own again")
			}
		}
		th.refused(fmt.Sprintf("renew as %q", ids), err)
	}

	// By joining again: with what is no token, with the agent's own token that
	// was spent, and with a token of the account that is bound to no pod.
	spent := spentToken(t, node1)
	free := strings.TrimSpace(b.kubectl("-n", system, "create", "token", "signet-agent", "--audience=signet-control"))
	bare := nodev1.NewNodeClient(conn)
	// An agent that found a certificate on its disk has not used its token yet;
	// it makes a certificate of its own node, once.
	if svid, err := bare.Join(ctx, &nodev1.JoinRequest{Token: spent, Csr: csr(t, "")}); err == nil {
		leaf, err := x509.ParseCertificate(svid.GetChain()[0])
		if err != nil || leaf.URIs[0].String() != "spiffe://"+trustDomain+"/signet/node/node1" {
			t.Errorf("the agent's token of node1 makes %v, %v", leaf.URIs, err)
		}
	}
	for _, token := range []string{"", "x", spent, spent, spent + " ", free, free} {
		_, err := bare.Join(ctx, &nodev1.JoinRequest{Token: token, Csr: csr(t, "")})
		th.refused("join", err)
	}

	// By the state of the node: only its own workloads are in it.
	for _, revision := range []string{"", "node2", theirUID} {
		wctx, stop := context.WithTimeout(ctx, 5*time.Second)
		stream, err := node.Watch(wctx, &nodev1.WatchRequest{Revision: revision})
		if err != nil {
			t.Fatal(err)
		}
		state, err := stream.Recv()
		stop()
		if err != nil {
			t.Fatal(err)
		}
		err = errors.New("only its own")
		for _, w := range state.GetWorkloads() {
			if w.GetName() != "mine" {
				err = nil
			}
		}
		for _, p := range state.GetPolicies() {
			if p.GetTargetServiceAccount() == "theirs" {
				err = nil
			}
		}
		th.refused("watch", err)
	}

	// By xDS: node identifiers, wildcards and names. A destination is what any
	// caller may know: address and identity. What is in a proxy of its own is
	// not: listeners, routes (policies) and keys.
	for _, claimed := range []string{"node2", "node1", "", "*", "signet-control", "node2/" + theirUID} {
		for _, typeURL := range []string{xds.TypeListener, xds.TypeRoute, xds.TypeSecret} {
			for _, names := range [][]string{{"*"}, nil, {"in|" + theirs, "out|" + theirs, theirs, id(ns, "theirs"), "ROOTCA"}} {
				th.refused(fmt.Sprintf("%s as %q, %q", typeURL[strings.LastIndex(typeURL, ".")+1:], claimed, names), th.subscribe(ctx, conn, claimed, typeURL, names))
			}
		}
	}

	// By the operator's ports: of the agents, and of the control plane, which is
	// on loopback in its pod.
	pods, err := b.client.CoreV1().Pods(system).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=control"})
	if err != nil || len(pods.Items) == 0 {
		t.Fatal(err)
	}
	for _, address := range []string{
		netip.AddrPortFrom(node1.Addr(), 9445).String(), netip.AddrPortFrom(node2.Addr(), 9445).String(),
		net.JoinHostPort(pods.Items[0].Status.PodIP, "9441"), net.JoinHostPort(pods.Items[0].Status.PodIP, "9443"),
	} {
		for _, path := range []string{"/v1/audit", "/v1/status", "/v1/mesh/audit", "/v1/certificates"} {
			th.refused("https://"+address+path, th.get(ctx, "https://"+address+path))
		}
	}

	// By saying of the other node's pods that they are not in the mesh.
	if _, err := node.Report(ctx, &nodev1.ReportRequest{Revision: "x", Workloads: []*nodev1.WorkloadReport{{Workload: theirs, Uid: theirUID, Problem: "stolen"}}}); err != nil {
		t.Logf("report: %v", err)
	}
	time.Sleep(2 * time.Second)
	th.refused("report on the other node's pod", func() error {
		// Of its own node, the thief can say what it likes: a finding is no fault.
		if s, _ := b.try("signet", "status"); strings.Contains(s, "stolen") {
			return nil
		}
		return errors.New("it is not believed")
	}())
	t.Logf("%d attempts with a stolen certificate, %d got anything", th.tries, th.won)
	if th.tries < 100 {
		t.Errorf("%d attempts, want at least 100", th.tries)
	}
	logs := b.kubectl("-n", system, "logs", "-l", "app.kubernetes.io/component=control", "--tail=-1")
	if n := strings.Count(logs, "node=node1"); !strings.Contains(logs, "is not on node") || n < 30 {
		t.Errorf("the control plane's log has %d lines about node1, and none why it was refused", n)
	}
}

// subscribe asks for resources, and returns nil when one comes.
func (t *thief) subscribe(ctx context.Context, conn *grpc.ClientConn, claimed, typeURL string, names []string) error {
	ctx, cancel := context.WithTimeout(ctx, 250*time.Millisecond)
	defer cancel()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{
		Node: &corev3.Node{Id: claimed, Cluster: claimed}, TypeUrl: typeURL, ResourceNamesSubscribe: names,
	}); err != nil {
		return err
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		if len(resp.GetResources()) > 0 {
			return nil
		}
	}
}

// get asks an HTTPS server that may be anybody of the mesh.
func (t *thief) get(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	c := &http.Client{Transport: &http.Transport{
		DialContext: t.seat.DialContext,
		TLSClientConfig: &tls.Config{
			InsecureSkipVerify: true, // a thief does not care who answers
			Certificates:       []tls.Certificate{t.cert},
		},
	}}
	defer c.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

// spentToken is the token that node1's agent joined with, or its successor
// that kubelet wrote, as it is in the agent's container.
func spentToken(t *testing.T, n *cluster.Node) string {
	t.Helper()
	found, err := n.Command(t.Context(), "sh", "-c", "cat /var/lib/kubelet/pods/*/volumes/kubernetes.io~projected/join/token").Output()
	if err != nil || len(found) == 0 {
		t.Fatalf("no join token on %s: %v", n.Name(), err)
	}
	return strings.TrimSpace(string(found))
}

// csr makes a certificate request with a key of its own that asks for URIs. One
// of none but "" has no names at all.
func csr(t *testing.T, uris ...string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.CertificateRequest{}
	for _, u := range uris {
		if u == "" {
			continue
		}
		parsed, err := url.Parse(u)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, parsed)
	}
	// It asks to be an authority too, every time.
	if len(uris) > 1 {
		value, err := asn1.Marshal(struct{ CA bool }{true})
		if err != nil {
			t.Fatal(err)
		}
		template.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: value}}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

package kube

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/agent/audit"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/test/cluster"
	"github.com/signet-mesh/signet/test/harness"
)

// revokedWithin is how soon nobody takes a revoked certificate any more; docs/identity.md.
const revokedWithin = 5 * time.Second

// copied is what somebody who reads a node's disk has: a workload's certificate
// and key.
func (b *bench) copied(node *cluster.Node, id string) (cert *tls.Certificate, serial string) {
	b.Helper()
	cert, serial, err := harness.Held(filepath.Join(node.Disk(), "var/lib/signet/agent"), id)
	if err != nil {
		b.Fatal(err)
	}
	return cert, serial
}

// tunnelled calls a pod's port through a tunnel of its own from a node, and returns
// the name of the pod that answers.
func (b *bench) tunnelled(seat *cluster.Node, ip string, cert *tls.Certificate) (string, error) {
	return b.tunnelledBy(seat, ip, &tls.Config{
		Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS13,
		InsecureSkipVerify: true, //nolint:gosec // who answers is not what is tested
	})
}

func (b *bench) tunnelledBy(seat *cluster.Node, ip string, config *tls.Config) (string, error) {
	ctx, cancel := context.WithTimeout(b.Context(), 10*time.Second)
	defer cancel()
	raw, err := seat.DialContext(ctx, "tcp", net.JoinHostPort(ip, "15008"))
	if err != nil {
		return "", err
	}
	defer raw.Close()
	config.NextProtos = []string{"h2"}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		return "", err
	}
	c, err := (&http2.Transport{}).NewClientConn(conn) //nolint:staticcheck // speaks CONNECT over a connection made here
	if err != nil {
		return "", err
	}
	to := net.JoinHostPort(ip, "8080")
	resp, err := c.RoundTrip((&http.Request{
		Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: to}, Host: to, Header: http.Header{}, ContentLength: -1,
		Body: io.NopCloser(strings.NewReader("GET /id HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")),
	}).WithContext(ctx))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s %s", resp.Status, resp.Header.Get("x-signet-reason"))
	}
	got, err := io.ReadAll(resp.Body)
	_, body, _ := strings.Cut(string(got), "\r\n\r\n")
	return strings.TrimSpace(body), err
}

// revocations is what of `kubectl signet ca revoked -o json` the test looks at.
type revocations struct {
	Acting, Nodes int
	Certificates  []struct {
		Serial, ID, Reason string
		Refused            bool
	}
}

func (b *bench) revoked(args ...string) (list revocations) {
	b.Helper()
	cmd := b.command(b.Context(), "kubectl", append([]string{"signet", "ca"}, append(args, "-o", "json")...)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err == nil {
		err = json.Unmarshal(out, &list)
	}
	if err != nil {
		b.Fatalf("kubectl signet ca %q: %v\n%s%s", args, err, out, said.String())
	}
	return list
}

// A workload's certificate and key are copied from its node and used on another,
// until the certificate is revoked with kubectl, by somebody whom the API server
// lets edit the MeshConfig and nobody else: then the copy is refused at once, and
// the workload, and its namesake on the other node, go on. Each node is connected
// to another replica of the control plane. It outlives a restart of both. A node's
// certificate that is revoked is good for nothing at either, and the node comes back
// with its agent's next token. Of a server's the callers' nodes hear as well.
//
// What it defends: that each replica takes the list from the MeshConfig
// (internal/kube/revoked.go, control.set), also when it starts, and that nodes keep
// whose certificates were (agent/issued.go).
func TestRevokeInCluster(t *testing.T) {
	b := open(t)
	b.twoReplicas()
	l := b.load()
	node1, node2 := b.cluster.Node("node1"), b.cluster.Node("node2")
	server := b.ip(l.namespace, "server")
	stolen, serial := b.copied(node2, id(l.namespace, "client"))
	if by, err := b.tunnelled(node1, server, stolen); err != nil || by != "server" {
		t.Fatalf("before the revocation the copy must be of use: %q, %v", by, err)
	}

	operator := b.as(l.namespace, "operator", bound(l.namespace, "operator"))
	t.Cleanup(func() { b.unbind(l.namespace, "operator") })
	cmd := b.command(t.Context(), "kubectl", "signet", "ca", "revoke", "--serial", serial, "--reason", "test")
	cmd.Env = append(cmd.Env, "KUBECONFIG="+operator)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "spec.revoked") {
		t.Errorf("who may only look revokes: %v\n%s", err, out)
	}
	for _, bad := range [][]string{{"--serial", "deadbeef"}, {"--serial", "wrong"}, {"--id", id(l.namespace, "nobody")}} {
		if out, err := b.try(append([]string{"signet", "ca", "revoke", "--reason", "test"}, bad...)...); err == nil {
			t.Errorf("kubectl signet ca revoke %q is taken:\n%s", bad, out)
		}
	}
	if list := b.revoked("revoked"); len(list.Certificates) != 0 {
		t.Fatalf("after bad input: %+v", list)
	}

	began := time.Now()
	ended := make(chan time.Duration, 1)
	go func() { // the first call that is refused
		for time.Since(began) < 2*revokedWithin {
			if _, err := b.tunnelled(node1, server, stolen); err != nil {
				ended <- time.Since(began)
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		close(ended)
	}()
	list := b.revoked("revoke", "--serial", strings.ToUpper(serial), "--reason", "copied from a disk")
	took := time.Since(began)
	at, refused := <-ended
	t.Logf("the copy was refused %s after the command began, which returned after %s", at.Round(10*time.Millisecond), took.Round(10*time.Millisecond))
	if !refused || at > revokedWithin {
		t.Errorf("the copy is of use for longer than %s", revokedWithin)
	}
	if len(list.Certificates) != 1 || list.Certificates[0].Serial != serial || list.Certificates[0].ID != id(l.namespace, "client") ||
		!list.Certificates[0].Refused || list.Acting != 2 || list.Nodes != 2 {
		t.Errorf("the command answers %+v", list)
	}
	gone := func(when string) {
		t.Helper()
		for range 100 {
			if by, err := b.tunnelled(node1, server, stolen); err == nil {
				t.Fatalf("%s the copy is of use: %q", when, by)
			}
		}
	}
	gone("after the revocation")
	if _, now := b.copied(node2, id(l.namespace, "client")); now == serial {
		t.Error("the workload has the revoked certificate still")
	}
	time.Sleep(2 * time.Second)
	_, far := l.loads(l.namespace, "far", began)
	_, near := l.loads(l.namespace, "near", began)
	t.Logf("new connections meanwhile: far %d, %d failed, %d streams ended; near %d, %d failed", far.OK+far.Failed, far.Failed, far.StreamFailed, near.OK+near.Failed, near.Failed)
	// Those that were asked for as the old tunnels ended are in them.
	if far.OK == 0 || far.Failed > far.OK/20 || near.OK == 0 || near.Failed+near.StreamFailed+near.Wrong > 0 {
		t.Errorf("far %+v, near %+v", far, near)
	}
	b.eventually(20*time.Second, func() string {
		got := b.kubectl("get", "meshconfig", "mesh", "-o", `jsonpath={.status.conditions[?(@.type=="Programmed")].status} {.status.programmedNodes} of {.status.nodes}`)
		if got != "True 2 of 2" {
			return "the MeshConfig's status says " + got
		}
		return ""
	})
	b.roll("control")
	gone("after both replicas were replaced")
	if list := b.revoked("revoked"); len(list.Certificates) != 1 || list.Certificates[0].Reason != "copied from a disk" {
		t.Errorf("after both replicas were replaced: %+v", list)
	}
	b.rememberedByNode(serial, id(l.namespace, "client"), "node2")

	// A node's own.
	th := b.steal(node2, node1)
	renew := func(conn *grpc.ClientConn) error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := nodev1.NewNodeClient(conn).Renew(ctx, &nodev1.RenewRequest{Csr: csr(t)})
		return err
	}
	replicas := b.controlAddrs()
	if len(replicas) != 2 {
		t.Fatalf("replicas at %q", replicas)
	}
	var conns []*grpc.ClientConn
	for i, ip := range replicas {
		conns = append(conns, th.dialTo(net.JoinHostPort(ip, "9443")))
		if err := renew(conns[i]); err != nil {
			t.Fatalf("before the revocation the stolen certificate must be good: %v", err)
		}
	}
	began = time.Now()
	b.revoked("revoke", "--serial", fmt.Sprintf("%x", th.cert.Leaf.SerialNumber.Bytes()), "--reason", "node2 was opened")
	t.Logf("a node's certificate was revoked everywhere within %s", time.Since(began).Round(10*time.Millisecond))
	for i, conn := range conns {
		if err := renew(conn); err == nil || !strings.Contains(err.Error(), "revoked") {
			t.Errorf("replica %d takes a node's certificate that is revoked: %v", i, err)
		}
	}
	if os.Getenv("SIGNET_TEST_LONG") == "1" {
		b.waitForToken(node2, th.cert.Leaf)
	} else {
		b.kubectl("-n", system, "delete", "pod", b.partOn("agent", "node2"))
	}
	b.ready()
	b.waitStatus(l.namespace, allThree)
	if now := b.steal(node2, node1); now.cert.Leaf.SerialNumber.Cmp(th.cert.Leaf.SerialNumber) == 0 {
		t.Error("the node has the revoked certificate still")
	}
	unrevoke := func() { b.kubectl("patch", "meshconfig", "mesh", "--type=merge", "-p", `{"spec":{"revoked":null}}`) }
	unrevoke()
	// No replica has it in its log any more, and nobody holds it.
	if list := b.revoked("revoke", "--serial", serial, "--reason", "again"); len(list.Certificates) != 1 || list.Certificates[0].ID != id(l.namespace, "client") {
		t.Errorf("revoked again: %+v", list)
	}
	unrevoke()
	l.serverRevoked(node1)
	unrevoke()
}

// serverRevoked revokes the certificate of the server that is called: what leads to it
// ends at the callers, on the server's node and on the other, who go on with the next.
func (l *loaded) serverRevoked(on *cluster.Node) {
	l.Helper()
	l.steady(time.Minute)
	_, serial := l.copied(on, id(l.namespace, "server"))
	began := time.Now()
	l.revoked("revoke", "--serial", serial, "--reason", "copied too")
	l.steady(time.Minute)
	l.eventually(20*time.Second, func() string {
		out, err := l.command(l.Context(), "kubectl", "signet", "audit", "--serial", serial, "--side", "source", "--limit=0", "-o", "json").Output()
		var found struct{ Records []audit.Record }
		if err == nil {
			err = json.Unmarshal(out, &found)
		}
		ended := map[string]int{}
		for _, r := range found.Records {
			if r.Destination.Serial == serial && r.Ended == "revoked" && strings.Contains(r.Reason, authz.ServerRevoked+": copied too") {
				ended[r.Node]++
			}
		}
		if err != nil || ended["node1"] == 0 || ended["node2"] == 0 {
			return fmt.Sprintf("of %d connections with the server's certificate were ended %v, %v", len(found.Records), ended, err)
		}
		l.Logf("%v connections with the server's certificate were ended", ended)
		return ""
	})
	for _, name := range []string{"far", "near"} {
		// Those that were asked for as the old tunnels ended are in them.
		if _, sum := l.loads(l.namespace, name, began); sum.OK == 0 || sum.Failed > sum.OK/20 || sum.Wrong > 0 {
			l.Errorf("%s while the server's certificate was revoked: %+v", name, sum)
		} else {
			l.Logf("%s meanwhile: %d new connections, %d failed, %d streams ended", name, sum.OK+sum.Failed, sum.Failed, sum.StreamFailed)
		}
	}
}

// waitForToken waits until a node whose certificate was revoked has another, by the
// token that kubelet writes when the one before is four fifths of its life old.
func (b *bench) waitForToken(node *cluster.Node, revoked *x509.Certificate) {
	b.Helper()
	began := time.Now()
	path := filepath.Join(node.Disk(), "var/lib/signet/agent/node.pem")
	b.eventually(12*time.Minute, func() string {
		if now, err := tls.LoadX509KeyPair(path, path); err != nil || now.Leaf.Equal(revoked) {
			return fmt.Sprintf("%s has not joined again: %v", node.Name(), err)
		}
		return ""
	})
	b.Logf("%s joined again by itself %s after its certificate was revoked", node.Name(), time.Since(began).Round(time.Second))
}

// rememberedByNode: whose a certificate was, the audit of its node says when no replica
// of the control plane knows it any more.
func (b *bench) rememberedByNode(serial, whose, node string) {
	b.Helper()
	var found struct {
		Issued struct{ Serial, ID, Workload, Node, Outcome, Evidence string }
	}
	out, err := b.command(b.Context(), "kubectl", "signet", "audit", "--serial", serial, "--limit=1", "-o", "json").Output()
	if err == nil {
		err = json.Unmarshal(out, &found)
	}
	if i := found.Issued; err != nil || i.Serial != serial || i.ID != whose || i.Node != node || i.Workload == "" || i.Outcome != "issued" || i.Evidence != "node" {
		b.Errorf("of %s is known %+v, %v\n%s", serial, i, err, out)
	}
}

// controlAddrs are the addresses of the control plane's replicas, but for those that
// end.
func (b *bench) controlAddrs() (ips []string) {
	b.Helper()
	pods, err := b.client.CoreV1().Pods(system).List(b.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=control"})
	if err != nil {
		b.Fatal(err)
	}
	for i := range pods.Items {
		if p := &pods.Items[i]; p.DeletionTimestamp == nil && p.Status.PodIP != "" {
			ips = append(ips, p.Status.PodIP)
		}
	}
	return ips
}

// dialTo connects to one replica of the control plane.
func (t *thief) dialTo(address string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(t.tls())),
		grpc.WithContextDialer(func(ctx context.Context, to string) (net.Conn, error) { return t.seat.DialContext(ctx, "tcp", to) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

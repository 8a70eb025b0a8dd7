package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

// spoken reports whether a server's proxy speaks to whoever shows a certificate: it
// answers a client's preface of HTTP/2 with its settings.
// The client's clock stands still: it keeps sessions with a server whose
// certificate has expired too.
func spoken(t *testing.T, pod *lab.Pod, to string, cert *tls.Certificate, sessions tls.ClientSessionCache, clock time.Time) (speaks, resumed bool) {
	t.Helper()
	raw, err := pod.Dial(t.Context(), "tcp", net.JoinHostPort(to, "15008"))
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if err := raw.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, &tls.Config{
		Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13,
		ServerName: "server", ClientSessionCache: sessions, Time: func() time.Time { return clock },
		InsecureSkipVerify: true, //nolint:gosec // who answers is not what is tested
	})
	_, _ = conn.Write([]byte(http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00")) // and no settings
	n, err := conn.Read(make([]byte, 1))
	if err, ok := err.(net.Error); ok && err.Timeout() {
		t.Fatal("the proxy neither speaks nor refuses")
	}
	return n > 0, conn.ConnectionState().DidResume
}

// TestExpiredIsNotRevived: a client that keeps TLS sessions is not spoken to once
// its certificate has expired, in 1,000 tries.
//
// What it defends: that tunnels are opened without resumption, in which nobody looks
// at a certificate.
func TestExpiredIsNotRevived(t *testing.T) {
	pods, documents := revokeBase("enforce")
	pods["thief"] = "10.88.0.20"
	documents["mesh.yaml"] = harness.Config("6s") + documents["mesh.yaml"][len(harness.Config("1h")):]
	documents["policies.yaml"] = grants(true)
	m := harness.Start(t, harness.Options{Pods: pods, Documents: documents})
	cert, _ := copied(t, m, idWeb)
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	// The server's proxy gets no other certificate either: that would end its
	// sessions for another reason.
	agent := m.Pid("agent")
	if err := syscall.Kill(agent, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(agent, syscall.SIGCONT) })
	sessions := tls.NewLRUClientSessionCache(0)
	before, clock := 0, time.Now()
	for time.Until(leaf.NotAfter) > 500*time.Millisecond {
		if speaks, _ := spoken(t, m.Pod("thief"), pods["server"], cert, sessions, clock); speaks {
			before++
		}
		time.Sleep(50 * time.Millisecond)
	}
	if before == 0 {
		t.Fatal("before it expired the certificate must be of use, or the test shows nothing")
	}
	time.Sleep(time.Until(leaf.NotAfter.Add(1500 * time.Millisecond)))
	for n := range 1000 {
		if speaks, resumed := spoken(t, m.Pod("thief"), pods["server"], cert, sessions, clock); speaks || resumed {
			t.Fatalf("try %d after the certificate had expired: spoken to %v, session resumed %v", n+1, speaks, resumed)
		}
	}
	t.Logf("%d connections before the certificate expired, none of 1000 after", before)
}

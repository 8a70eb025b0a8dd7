package hostile

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/authz"
)

// openTunnel opens a tunnel from a stranger who holds a certificate, and returns it
// and its own address.
func openTunnel(t *testing.T, cert *tls.Certificate) (conn http.RoundTripper, from string) {
	t.Helper()
	local := &net.TCPAddr{Port: int(nextPort.Add(1))}
	raw, err := (&net.Dialer{LocalAddr: local}).DialContext(t.Context(), "tcp", net.JoinHostPort(shopAddr, "15008"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	shown := tls.Client(raw, &tls.Config{
		Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"},
		InsecureSkipVerify: true, //nolint:gosec // who answers is not what is tested
	})
	if conn, err = (&http2.Transport{}).NewClientConn(shown); err != nil { //nolint:staticcheck // one connection, and no other when it ends
		t.Fatal(err)
	}
	return conn, raw.LocalAddr().String()
}

// stream is a connection in a tunnel.
type stream struct {
	in  *io.PipeWriter
	out io.ReadCloser
}

// connect asks for a connection in a tunnel; of one that is refused the error is
// what the answer says.
func connect(ctx context.Context, conn http.RoundTripper) (*stream, error) {
	authority := fmt.Sprintf("%s:%d", shopAddr, portNamed)
	r, w := io.Pipe()
	resp, err := conn.RoundTrip((&http.Request{
		Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: authority}, Host: authority,
		Header: http.Header{}, Body: r, ContentLength: -1,
	}).WithContext(ctx))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("status %d: %s", resp.StatusCode, resp.Header.Get("x-signet-reason"))
	}
	s := &stream{w, resp.Body}
	return s, s.ping()
}

func (s *stream) ping() error {
	if _, err := s.in.Write([]byte{42}); err != nil {
		return err
	}
	_, err := io.ReadFull(s.out, make([]byte, 1))
	return err
}

func (s *stream) close() {
	s.in.Close()
	s.out.Close()
}

// TestExpiredInATunnel: a caller whose certificate expires while its tunnel is open
// is refused every further connection in it; the connection that is open in it stays,
// and other certificates are as good as before. The proxy's timers have no part in it:
// by them the tunnel is young.
//
// What it defends: the rule ahead of the policies that compares the end of a
// certificate with the wall clock (package xds, expiry.go).
func TestExpiredInATunnel(t *testing.T) {
	p := newPKI(time.Now())
	n := startNode(t, p)
	ends := time.Now().Add(6 * time.Second).Truncate(time.Second)
	show := func(to []byte) *tls.Certificate {
		return &tls.Certificate{Certificate: [][]byte{p.leaf(p.intermediate, idWeb, func(c *cert) { c.to = to }), p.intermediate.der}, PrivateKey: p.keys.p256}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, from := openTunnel(t, show(stamp(ends)))
	other, _ := openTunnel(t, show(tlv(0x18, []byte("99991231235959Z"))))
	long, err := connect(ctx, conn)
	if err != nil {
		t.Fatal(err)
	}
	defer long.close()
	before := 0
	for time.Until(ends) > 500*time.Millisecond {
		s, err := connect(ctx, conn)
		if err != nil && time.Now().Before(ends) {
			t.Fatalf("%s before the certificate expires: %v", time.Until(ends), err)
		} else if err != nil {
			break // the machine is slow
		}
		s.close()
		before++
		time.Sleep(100 * time.Millisecond)
	}
	time.Sleep(time.Until(ends.Add(1100 * time.Millisecond)))
	for range 100 {
		if s, err := connect(ctx, conn); err == nil {
			s.close()
			t.Fatalf("%s after the certificate expired a connection is let in", time.Since(ends))
		} else if want := "status 403: " + authz.CallerExpired; err.Error() != want {
			t.Fatalf("a connection after the certificate expired: %v, want %s", err, want)
		}
	}
	if err := long.ping(); err != nil {
		t.Errorf("the connection that was open: %v", err)
	}
	if s, err := connect(ctx, other); err != nil {
		t.Errorf("by a certificate that has not expired: %v", err)
	} else {
		s.close()
	}
	verdicts := map[audit.Verdict]int{}
	for deadline := time.Now().Add(10 * time.Second); verdicts[audit.Denied] < 100 && time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		clear(verdicts)
		for _, r := range n.readLog(t)[from] {
			verdicts[r.Verdict]++
			if r.Verdict == audit.Denied && r.Reason != authz.CallerExpired {
				t.Fatalf("the audit says %q", r.Reason)
			}
		}
	}
	t.Logf("%d connections before the certificate expired, none of 100 after; in the audit: %v", before, verdicts)
	if before == 0 || verdicts[audit.Denied] != 100 {
		t.Errorf("of 100 refusals the audit has %v", verdicts)
	}
}

// TestCallersTimers: a caller's proxy opens a new tunnel when the one it has was open
// for two fifths of a certificate's life, although the other end never tells it to.
// The connection that is open in the old one stays.
//
// What it defends: that how long a tunnel takes connections is counted at both ends
// (tunnelCluster in package xds). The timers of the one that it leads to stand still
// while its machine is suspended.
func TestCallersTimers(t *testing.T) {
	p := newPKI(time.Now())
	n := (&node{pki: p, ttl: 10 * time.Second}).start(t)
	e := &endpoint{cert: &tls.Certificate{Certificate: [][]byte{p.leaf(p.intermediate, idWeb), p.intermediate.der}, PrivateKey: p.keys.p256}}
	e.start(t, n.lab.Pod("remote"))
	began := time.Now()
	long, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(t.Context(), "tcp", net.JoinHostPort(openAddr, "15001"))
	if err != nil {
		t.Fatal(err)
	}
	defer long.Close()
	ping := func() error {
		_ = long.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := long.Write([]byte{42}); err != nil {
			return err
		}
		_, err := io.ReadFull(long, make([]byte, 1))
		return err
	}
	if err := ping(); err != nil {
		t.Fatal(err)
	}
	calls := func(until time.Duration) (n int) {
		for time.Since(began) < until {
			if _, err := callOnce(); err != nil {
				t.Fatalf("a call %s after the first: %v", time.Since(began), err)
			}
			n++
			time.Sleep(20 * time.Millisecond)
		}
		return n
	}
	young := calls(3 * time.Second)
	if got := e.handshakes(); got > 2 { // one for each of the proxy's threads
		t.Fatalf("%d tunnels were opened for %d calls in 3 s", got, young)
	}
	first := e.handshakes()
	old := calls(6 * time.Second)
	if got := e.handshakes(); got <= first {
		t.Errorf("after 6 s calls still go by the %d tunnels of the beginning", got)
	}
	if err := ping(); err != nil {
		t.Errorf("the connection that was open: %v", err)
	}
	t.Logf("%d calls by %d tunnels in 3 s, %d more and %d tunnels by 6 s", young, first, old, e.handshakes())
}

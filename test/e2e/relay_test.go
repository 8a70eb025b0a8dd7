package e2e

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

// tunnel is a client of a pod's tunnel port that is no proxy of the mesh, but
// has a certificate that one could have.
type tunnel struct {
	conn *http2.ClientConn //nolint:staticcheck // speaks CONNECT over a connection made here
	own  string            // its address
}

// openTunnel opens one from inside a pod, until the test ends.
func openTunnel(t *testing.T, pod *lab.Pod, to string, cert *tls.Certificate) *tunnel {
	t.Helper()
	raw, err := pod.Dial(t.Context(), "tcp", net.JoinHostPort(to, "15008"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	conn := tls.Client(raw, &tls.Config{
		Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13,
		InsecureSkipVerify: true, //nolint:gosec // who answers is not what is tested
	})
	if err := conn.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	c, err := (&http2.Transport{}).NewClientConn(conn) //nolint:staticcheck // see tunnel
	if err != nil {
		t.Fatal(err)
	}
	return &tunnel{conn: c, own: raw.LocalAddr().String()}
}

// ask sends one request with an authority. On success it says hello to who
// is there and returns what came back.
func (u *tunnel) ask(ctx context.Context, method, authority string, header http.Header) (status int, reason, got string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req := (&http.Request{
		Method: method, URL: &url.URL{Scheme: "https", Host: authority}, Host: authority, Header: header,
	}).WithContext(ctx)
	if method == http.MethodConnect {
		req.Body, req.ContentLength = io.NopCloser(strings.NewReader("hello")), -1
	} else {
		req.URL.Path = "/"
	}
	resp, err := u.conn.RoundTrip(req)
	if err != nil {
		return 0, "", "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK {
		err = nil // the status is the answer
	}
	return resp.StatusCode, resp.Header.Get("x-signet-reason"), string(b), err
}

// TestNoOpenRelay: a caller who may reach every port of a workload can have the
// workload's proxy dial that workload and nothing else: not another pod, not
// what listens on the pod's loopback only, and not the proxy itself. The proxy
// dials from inside the pod, past its capture rules, so whoever it dialled for
// a caller would see a trusted neighbour.
//
// What it defends: that a permission names the workload's own addresses
// (authorities, in package xds), that the proxy's own ports and odd spellings
// of a port are refused before the policies are asked (applicationPort), and
// that a route admits CONNECT only.
func TestNoOpenRelay(t *testing.T) {
	m := plainMesh(t)
	var server, watched, loopback, victims atomic.Int64
	serve(t, m.Pod("server"), "10.88.0.12:8080", greet(&server))
	serve(t, m.Pod("watched"), "10.88.0.13:8080", greet(&watched))
	serve(t, m.Pod("client"), ":8080", greet(&victims))
	serve(t, m.Pod("legacy"), ":8080", greet(&victims))
	for _, name := range []string{"server", "watched"} {
		serve(t, m.Pod(name), "127.0.0.1:9999", greet(&loopback))
		serve(t, m.Pod(name), "127.0.0.1:8080", greet(&loopback))
	}
	onNode, err := net.Listen("tcp", net.JoinHostPort(m.Lab.Gateway().String(), "8080"))
	if err != nil {
		t.Fatal(err)
	}
	defer onNode.Close()
	go func() {
		for {
			c, err := onNode.Accept()
			if err != nil {
				return
			}
			victims.Add(1)
			c.Close()
		}
	}()
	cert := stolenForge(t, m).sign(t, nil, idClient)

	for _, target := range []struct {
		name, addr string
		reached    *atomic.Int64
	}{{"server", "10.88.0.12", &server}, {"watched", "10.88.0.13", &watched}} {
		t.Run(target.name, func(t *testing.T) {
			u := openTunnel(t, m.Pod("stranger"), target.addr, cert)
			good := func() {
				t.Helper()
				before := target.reached.Load()
				status, _, got, err := u.ask(t.Context(), http.MethodConnect, target.addr+":8080", http.Header{})
				if status != http.StatusOK || got != greeting+"hello" || err != nil || target.reached.Load() != before+1 {
					t.Fatalf("the workload's own address: %d, %q, %v", status, got, err)
				}
			}
			good()
			before, answered := target.reached.Load(), 0
			for _, authority := range []string{
				"10.88.0.10:8080",                // another workload
				"10.88.0.21:8080",                // a pod outside the mesh
				"10.88.0.1:8080",                 // the node
				"127.0.0.1:9999",                 // the pod's loopback
				"127.0.0.1:8080",                 //
				"localhost:8080",                 //
				"0.0.0.0:9999",                   // the same by another name
				"0:9999",                         //
				"[::1]:9999",                     //
				"[::ffff:127.0.0.1]:9999",        //
				"127.1:9999",                     //
				target.addr + ":15001",           // the proxy's own ports
				target.addr + ":15006",           //
				target.addr + ":15008",           //
				target.addr + ":015008",          //
				target.addr + ":08080",           // a spelling that nobody else reads
				target.addr + ":+8080",           //
				"127.0.0.1:15001",                //
				"127.0.0.1:15006",                //
				"127.0.0.1:15008",                //
				target.addr,                      // no port
				target.addr + ":",                //
				target.addr + ":0",               //
				target.addr + ":65536",           //
				target.addr + ":8080:9999",       //
				target.addr + ":8080,10.88.0.21", //
				target.addr + "0:8080",           // only begins with the address
				target.addr + ".example:8080",    //
			} {
				status, reason, got, err := u.ask(t.Context(), http.MethodConnect, authority, http.Header{})
				t.Logf("CONNECT %s: %d, %s, %v", authority, status, reason, err)
				if status != 0 { // the proxy has read it
					answered++
				}
				if status == http.StatusOK || strings.Contains(got, greeting) {
					t.Errorf("CONNECT %s: %d, %q; want it refused", authority, status, got)
				}
			}
			// A request that is no CONNECT is not for the proxy either.
			for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodOptions} {
				if status, _, got, _ := u.ask(t.Context(), method, target.addr+":8080", http.Header{}); status == http.StatusOK {
					t.Errorf("%s: %d, %q; want it refused", method, status, got)
				}
			}
			if n := target.reached.Load() - before; n != 0 {
				t.Errorf("the workload was reached %d times by requests for something else", n)
			}
			// Headers by which a proxy can be told another address.
			for _, name := range []string{"x-envoy-original-dst-host", "x-forwarded-host", "x-envoy-original-url", "forwarded", "x-envoy-upstream-alt-stat-name"} {
				before := target.reached.Load()
				status, _, got, err := u.ask(t.Context(), http.MethodConnect, target.addr+":8080", http.Header{name: {"10.88.0.21:8080"}})
				if status == http.StatusOK && target.reached.Load() != before+1 {
					t.Errorf("with %s: %d, %q, %v, from somewhere else", name, status, got, err)
				}
			}
			good() // in the same tunnel: nothing of all that has ended it
			recordedRelays(t, m, target.name, target.addr+":8080", answered)
		})
	}
	if loopback.Load() != 0 || victims.Load() != 0 {
		t.Errorf("what listens on loopback was reached %d times, other pods and the node %d times", loopback.Load(), victims.Load())
	}
}

// recordedRelays: no record of a workload's proxy tells of an admitted
// connection to somewhere else, and the refusals are there.
func recordedRelays(t *testing.T, m *harness.Mesh, workload, own string, refusals int) {
	t.Helper()
	said := map[string]int{}
	m.Eventually(15*time.Second, "the records of the refusals", func() error {
		clear(said)
		n := 0
		for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Destination}) {
			if !strings.HasSuffix(r.Destination.Workload, "/"+workload) || r.Destination.Address == own {
				continue
			}
			n++
			said[fmt.Sprintf("%s: %s", r.Verdict, r.Reason)]++
			if r.Verdict != audit.Denied && r.Verdict != audit.Failed {
				t.Fatalf("the audit has %s to %s: %s", r.Verdict, r.Destination.Address, r.Reason)
			}
		}
		if n < refusals {
			return fmt.Errorf("%d of %d", n, refusals)
		}
		return nil
	})
	for s, n := range said {
		t.Logf("audit, %d times: %s", n, s)
	}
}

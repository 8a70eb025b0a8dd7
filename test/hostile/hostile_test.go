package hostile

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/authz"
)

func pkcs8(key *ecdsa.PrivateKey) []byte { return must(x509.MarshalPKCS8PrivateKey(key)) }

// workers is how many tunnels are opened at a time.
const workers = 8

// dialAll opens a tunnel for each of the cases.
func (n *node) dialAll(t *testing.T, cases []testCase, addr string, port int) []tunnel {
	t.Helper()
	out := make([]tunnel, len(cases))
	next := make(chan int)
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for i := range next {
				out[i] = dial(t.Context(), cases[i].present(&n.keys), addr, port)
			}
		})
	}
	for i := range cases {
		next <- i
	}
	close(next)
	all.Wait()
	return out
}

// streams are the lines about what came through a handshake.
func streams(lines []audit.Record) (out []audit.Record) {
	for _, r := range lines {
		if !strings.HasPrefix(r.ID, "handshake-") {
			out = append(out, r)
		}
	}
	return out
}

// proxyVerdict is what the proxy did, and whom its audit line names.
func proxyVerdict(t *testing.T, c *testCase, tun tunnel, lines []audit.Record) verdict {
	t.Helper()
	if tun.err != nil {
		why := []string{tun.err.Error()}
		for _, r := range lines {
			why = append(why, "audit: "+r.Reason)
			if r.Verdict == audit.Allowed || r.Verdict == audit.Observed {
				t.Errorf("%s: no byte came through, and the audit says %s", c, r.Verdict)
			}
			if r.Source.ID != "" {
				t.Errorf("%s: refused, and the audit says that %q called", c, r.Source.ID)
			}
		}
		return verdict{why: strings.Join(why, "; ")}
	}
	lines = streams(lines)
	if len(lines) != 1 || lines[0].Source.ID == "" {
		t.Errorf("%s: a byte came through, and the audit has %d lines %v", c, len(lines), lines)
		return verdict{id: "?"}
	}
	return verdict{id: lines[0].Source.ID}
}

// word is a verdict in the words of docs/hostile.md.
func (c *testCase) word(v verdict) string {
	switch {
	case v.id == "":
		return refuses
	case len(c.chain) > 0 && bytes.Contains(c.chain[0], uri(v.id)) && (!c.good || v.id == c.id):
		return accepts
	}
	return rewrites
}

// TestCertificates shows every certificate of the corpus to this project's
// programs, to go-spiffe, and in a real handshake to a real proxy that has the
// configuration of a node. All three must refuse the hostile ones and accept the
// good ones, as the identity that is written in them; where they do not,
// docs/hostile.md says so, and why.
//
// It defends the proxy's validation context (package xds) and the checks beyond
// go-spiffe's (package x509check): without one of them, cases change sides.
func TestCertificates(t *testing.T) {
	c := makeCorpus(t, hour())
	n := startNode(t, c.pki)
	bundle := c.bundle()
	tunnels := n.dialAll(t, c.cases, openAddr, portNamed)
	lines := n.records(t, tunnels)
	var found []disagreement
	var admitted []testCase
	for i := range c.cases {
		tc := &c.cases[i]
		ours, theirs := project(tc, c.pki), goSpiffe(tc, bundle)
		proxy := proxyVerdict(t, tc, tunnels[i], lines[tunnels[i].from])
		want := strings.Repeat(refuses+" ", 2) + refuses
		if tc.good {
			want = strings.ReplaceAll(want, refuses, accepts)
		}
		if got := three(tc, ours, theirs, proxy); got != want {
			found = append(found, disagreement{tc.String(), got, details(ours, theirs, proxy)})
		}
		if ours.id != "" { // the strictest of Go's judges
			if ours != theirs {
				t.Errorf("%s: this project %s, go-spiffe %s", tc, ours, theirs)
			}
			if v := goSpiffeSource(tc); v != ours {
				t.Errorf("%s: this project %s, go-spiffe, as of its own %s", tc, ours, v)
			}
		}
		if proxy.id != "" {
			// What policies compare and the audit keeps is a SPIFFE ID as written.
			if id, err := spiffeid.FromString(proxy.id); err != nil || id.String() != proxy.id || id.TrustDomain().Name() != trustDomain || id.Path() == "" || tc.word(proxy) != accepts {
				t.Errorf("%s: the proxy took it for %q, which is not its one identity in the mesh: %v", tc, proxy.id, err)
			}
			tc := *tc
			tc.id = proxy.id
			admitted = append(admitted, tc)
		}
	}
	hold(t, readRows(t, "Certificates", 3), found)
	t.Logf("%d certificates; on %d not all three say the same, or what is wanted", len(c.cases), len(found))
	n.testPolicies(t, admitted)
}

// testPolicies: whoever gets a tunnel gets no further with it than the policies
// say of the identity as Go parses it. A name that begins like another's, or
// that a pattern nearly matches, opens nothing.
func (n *node) testPolicies(t *testing.T, admitted []testCase) {
	for _, port := range []uint16{portNamed, portSet} {
		tunnels := n.dialAll(t, admitted, shopAddr, int(port))
		lines := n.records(t, tunnels)
		allowed := 0
		for i := range admitted {
			c := &admitted[i]
			d := n.view.Model.Decide(authz.Request{From: spiffeid.RequireFromString(c.id), Target: authz.Target{Namespace: "shop", ServiceAccount: "server"}, Port: port})
			if got := tunnels[i].err == nil; got != (d.Verdict == authz.Allow) {
				t.Errorf("%s, port %d: the model says %s of %s, the proxy says %v", c, port, d.Verdict, c.id, tunnels[i].err)
			}
			for _, r := range streams(lines[tunnels[i].from]) {
				if r.Source.ID != c.id || (r.Verdict == audit.Allowed) != (d.Verdict == authz.Allow) {
					t.Errorf("%s, port %d: the audit says %s, %q", c, port, r.Verdict, r.Source.ID)
				}
			}
			if d.Verdict == authz.Allow {
				allowed++
			}
		}
		if allowed == 0 || allowed == len(admitted) {
			t.Errorf("port %d: %d of %d may pass; this shows nothing", port, allowed, len(admitted))
		}
	}
}

// TestGuards: every place where this project's programs take a peer's
// certificate says what x509check says, and takes nobody but the one that it
// wants.
func TestGuards(t *testing.T) {
	c := makeCorpus(t, hour())
	all := append(guards(t, c.pki), guard{name: "the control plane for nodes", config: controlPlane(t, c.pki)})
	taken := make([]int, len(all))
	for i := range c.cases {
		tc := &c.cases[i]
		certs, err := parse(tc.chain)
		if err != nil || !proves(tc, certs[0]) {
			continue // TLS does not come so far; see TestHandshakes
		}
		want := project(tc, c.pki)
		for j, g := range all {
			err := g.config.VerifyConnection(tls.ConnectionState{PeerCertificates: certs})
			if ok := want.id != "" && (g.only.IsZero() || g.only.String() == want.id); ok != (err == nil) {
				t.Errorf("%s: %s says %v; x509check %s", tc, g.name, err, want)
			}
			if err == nil {
				taken[j]++
			}
		}
	}
	for j, g := range all {
		if taken[j] == 0 {
			t.Errorf("%s took nobody; this shows nothing", g.name)
		}
	}
}

// TestHandshakes: the same with real handshakes, for a part of the corpus:
// whoever does not have the key, or has a certificate that cannot be read, does
// not come so far as to be judged.
func TestHandshakes(t *testing.T) {
	c := makeCorpus(t, hour())
	accepted, refused := 0, 0
	server := controlPlane(t, c.pki)
	for i := range c.cases {
		tc := &c.cases[i]
		if i%20 != 0 && tc.family != "without its key" && tc.family != "public key" {
			continue
		}
		want := project(tc, c.pki)
		err := handshake(t.Context(), server, tc.present(&c.keys))
		if (err == nil) != (want.id != "") {
			t.Errorf("%s: the handshake: %v; x509check %s", tc, err, want)
		}
		if err == nil {
			accepted++
		} else {
			refused++
		}
	}
	t.Logf("%d handshakes ended well, %d did not", accepted, refused)
	if accepted == 0 || refused < 100 {
		t.Error("this shows little")
	}
}

// handshake returns the server's error.
func handshake(ctx context.Context, server *tls.Config, cert *tls.Certificate) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	var client sync.WaitGroup
	defer client.Wait()
	client.Go(func() {
		b, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return
		}
		defer b.Close()
		conn := tls.Client(b, &tls.Config{
			MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, CurvePreferences: []tls.CurveID{tls.X25519},
			InsecureSkipVerify:   true, //nolint:gosec // a stranger trusts anyone
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
		})
		if conn.HandshakeContext(ctx) == nil {
			_, _ = conn.Read(make([]byte, 1)) // until the server is done
		}
	})
	a, err := l.Accept()
	if err != nil {
		return err
	}
	defer a.Close()
	return tls.Server(a, server).HandshakeContext(ctx)
}

package hostile

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/lab"
)

// endpoint is a tunnel server that is no proxy: it shows whatever certificate it
// is told to, and echoes.
type endpoint struct {
	mu      sync.Mutex
	cert    *tls.Certificate  // guarded by mu
	offered int               // guarded by mu; handshakes that began
	conns   map[net.Conn]bool // guarded by mu; those that are open
}

func (e *endpoint) start(t *testing.T, pod *lab.Pod) {
	t.Helper()
	l, err := pod.Listen("tcp", ":15008")
	if err != nil {
		t.Fatal(err)
	}
	e.conns = map[net.Conn]bool{}
	server := &http.Server{
		Handler: http.HandlerFunc(echoStream), ErrorLog: log.New(io.Discard, "", 0), ReadHeaderTimeout: 10 * time.Second,
		TLSConfig: &tls.Config{
			MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ClientAuth: tls.RequireAnyClientCert,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				e.mu.Lock()
				defer e.mu.Unlock()
				e.offered++
				return e.cert, nil
			},
		},
		ConnState: func(c net.Conn, s http.ConnState) {
			e.mu.Lock()
			defer e.mu.Unlock()
			if s == http.StateClosed || s == http.StateHijacked {
				delete(e.conns, c)
			} else {
				e.conns[c] = true
			}
		},
	}
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		_ = server.Close()
		<-served
	})
}

func echoStream(w http.ResponseWriter, r *http.Request) {
	w.WriteHeader(http.StatusOK)
	rc := http.NewResponseController(w)
	_ = rc.EnableFullDuplex()
	_ = rc.Flush()
	b := make([]byte, 64)
	for {
		n, err := r.Body.Read(b)
		if n > 0 {
			_, _ = w.Write(b[:n])
			_ = rc.Flush()
		}
		if err != nil {
			return
		}
	}
}

// become ends what is open and shows another certificate from now on.
func (e *endpoint) become(cert *tls.Certificate) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.cert = cert
	for c := range e.conns {
		c.Close()
	}
}

func (e *endpoint) handshakes() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.offered
}

// call dials the proxy's outbound port, behind which is the remote workload, and
// has a byte echoed. It tries again if the proxy used a tunnel that was closed.
func call(e *endpoint) tunnel {
	for range 50 {
		before := e.handshakes()
		var out tunnel
		out.from, out.err = callOnce()
		if e.handshakes() > before {
			return out
		}
		time.Sleep(5 * time.Millisecond)
	}
	return tunnel{err: fmt.Errorf("the proxy began no handshake")}
}

func callOnce() (from string, err error) {
	local := &net.TCPAddr{Port: int(nextPort.Add(1))}
	c, err := (&net.Dialer{LocalAddr: local, Timeout: 10 * time.Second}).Dial("tcp", net.JoinHostPort(openAddr, "15001"))
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Write([]byte{42}); err != nil {
		return c.LocalAddr().String(), err
	}
	b := make([]byte, 1)
	_, err = io.ReadFull(c, b)
	return c.LocalAddr().String(), err
}

// TestServers is the reverse, for a part of the corpus: what answers at a
// workload's address shows a hostile certificate to the real proxy, which wants
// the workload's identity and no other. This project's verdict is that of a
// connection that wants the same.
//
// It defends the expected identity of each tunnel, which takes the place of the
// form of names that callers must have, and the purpose serverAuth.
func TestServers(t *testing.T) {
	c := makeCorpus(t, hour())
	n := startNode(t, c.pki)
	e := &endpoint{}
	e.start(t, n.lab.Pod("remote"))
	var sample []testCase
	for i, tc := range c.cases {
		if i%12 == 0 || strings.HasPrefix(tc.family, "good") || tc.family != "spelling" && tc.family != "stray" && tc.family != "encoding" && tc.family != "key usage" && tc.family != "authority as leaf" {
			sample = append(sample, tc)
		}
	}
	tunnels := make([]tunnel, len(sample))
	for i := range sample {
		e.become(sample[i].present(&n.keys))
		tunnels[i] = call(e)
	}
	lines := n.records(t, tunnels)
	var found []disagreement
	good := 0
	for i := range sample {
		tc := &sample[i]
		ours := project(tc, c.pki)
		if ours.id != idWeb {
			ours = verdict{why: "wants " + idWeb + ", but " + ours.String()}
		}
		theirs := verdict{why: fmt.Sprint(tunnels[i].err)}
		if tunnels[i].err == nil {
			theirs = verdict{id: idWeb}
		}
		for _, r := range lines[tunnels[i].from] {
			switch {
			case r.Side != audit.Source:
			case theirs.id != "" && r.Destination.ID != idWeb && !bytes.Contains(tc.chain[0], uri(r.Destination.ID)):
				t.Errorf("%s: the audit says that %q was called", tc, r.Destination.ID)
			case theirs.id == "" && (r.Verdict != audit.Failed || r.Destination.ID != ""):
				t.Errorf("%s: refused; the audit says %s, %q, %s", tc, r.Verdict, r.Destination.ID, r.Reason)
			}
		}
		want := refuses + " " + refuses
		if tc.good && tc.id == idWeb {
			want = accepts + " " + accepts
			good++
		}
		if got := three(tc, ours, theirs); got != want {
			found = append(found, disagreement{tc.String(), got, details(ours, theirs)})
		}
	}
	hold(t, readRows(t, "Servers", 2), found)
	t.Logf("%d certificates, %d of them good", len(sample), good)
}

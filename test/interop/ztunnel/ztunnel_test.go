//go:build interop

package ztunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/control"
	"github.com/signet-mesh/signet/test/harness"
	"github.com/signet-mesh/signet/test/ztunnel"
)

// The pods. Two of each kind of client, of which one is allowed.
var (
	client     = workload("shop", "client", "10.88.0.10")
	other      = workload("shop", "other", "10.88.0.11")
	server     = workload("shop", "server", "10.88.0.12")
	ztClient   = workload("ambient", "zt-client", "10.88.0.20")
	ztOther    = workload("ambient", "zt-other", "10.88.0.21")
	ztServer   = workload("ambient", "zt-server", "10.88.0.22")
	ours       = []ztunnel.Workload{client, other, server}
	theirs     = []ztunnel.Workload{ztClient, ztOther, ztServer}
	everything = append(append([]ztunnel.Workload{}, ours...), theirs...)
)

const port = 8080

func workload(namespace, name, addr string) ztunnel.Workload {
	return ztunnel.Workload{Namespace: namespace, Name: name, ServiceAccount: name, Addr: netip.MustParseAddr(addr)}
}

// documents describe the mesh. The ztunnels' pods belong to another node, whose
// proxy is none of ours; that they are in the mesh is why connections to them
// leave through a tunnel.
func documents() string {
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: signet.dev/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {trustDomain: %s, svidTTL: 1h}
---
`, ztunnel.TrustDomain)
	b.WriteString(harness.Namespace("shop", "enforce") + harness.Namespace("ambient", "enforce"))
	for _, w := range ours {
		b.WriteString(harness.Workload(w.Namespace, w.Name, w.Addr.String()))
	}
	for _, w := range theirs {
		fmt.Fprintf(&b, `apiVersion: signet.dev/v1alpha1
kind: WorkloadEntry
metadata: {name: %[2]s, namespace: %[1]s}
spec: {serviceAccount: %[2]s, node: zt, capture: {networkNamespace: %[2]s, addresses: [%[3]s]}}
---
`, w.Namespace, w.Name, w.Addr)
	}
	b.WriteString(harness.Allow("shop", "allow-ztunnel", "server", []int{port}, "ambient/zt-client"))
	return b.String()
}

// world is both meshes at work, and what the applications in them saw.
type world struct {
	*harness.Mesh
	log harness.Output // of the ztunnels

	// accepted counts connections that reached an application, by pod.
	accepted map[string]*atomic.Int64
}

func start(t *testing.T) *world {
	t.Helper()
	program := os.Getenv(envProgram)
	root, err := ztunnel.ReadRoot(program)
	if err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir: socket paths have a small maximum length.
	dir, err := os.MkdirTemp("", "interop-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := root.Install(control.AuthorityDir(filepath.Join(dir, "state"))); err != nil {
		t.Fatal(err)
	}
	w := &world{accepted: map[string]*atomic.Int64{}}
	pods := map[string]string{}
	for _, p := range everything {
		pods[p.Name] = p.Addr.String()
	}
	w.Mesh = harness.Start(t, harness.Options{Dir: dir, Pods: pods, Documents: map[string]string{"mesh.yaml": documents()}})

	config := filepath.Join(dir, "ztunnel.yaml")
	err = ztunnel.WriteConfig(config, everything, []ztunnel.Allow{{
		Namespace: "ambient", Name: "allow-client", From: []ztunnel.Workload{client},
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of the ztunnels:\n%s", w.log.String())
		}
	})
	for _, z := range theirs {
		p, err := ztunnel.Start(t.Context(), program, w.Pod(z.Name), z, config, &w.log)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.Stop)
	}
	for _, s := range []ztunnel.Workload{server, ztServer} {
		w.accepted[s.Name] = w.greet(t, s.Name)
	}
	return w
}

const greeting = "ready\n"

// greet runs a server in a pod that speaks first and then sends back what it
// gets: one for which a refusal has to come before any contact. It returns the
// count of the connections that reach it.
func (w *world) greet(t *testing.T, pod string) *atomic.Int64 {
	t.Helper()
	l, err := w.Pod(pod).Listen("tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		t.Fatal(err)
	}
	var accepted atomic.Int64
	var all sync.WaitGroup
	t.Cleanup(func() { _ = l.Close(); all.Wait() })
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			all.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(30 * time.Second))
				if _, err := io.WriteString(c, greeting); err == nil {
					_, _ = io.Copy(c, c)
				}
			})
		}
	})
	return &accepted
}

// call dials from one pod to the server in another, sends text, ends its side
// and returns everything that comes back.
func (w *world) call(t *testing.T, from, to ztunnel.Workload, text string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := w.Pod(from.Name).Dial(ctx, "tcp", netip.AddrPortFrom(to.Addr, port).String())
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	_, werr := io.WriteString(c, text)
	if werr == nil {
		werr = c.(*net.TCPConn).CloseWrite()
	}
	got, rerr := io.ReadAll(c)
	return string(got), errors.Join(werr, rerr)
}

// calls is how many connections each direction makes, so that pooled tunnels
// are used again, and payload is more than any flow control window between.
const calls = 20

var payload = strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB

// TestBothDirections: each program's allowed client reaches the other's server
// with the identities that both proved, and each refuses the client that its
// own policy does not name, before the application is contacted. It fails when
// the wire of either side changes, when this mesh trusts an address instead of
// a certificate, or when a refusal is not told to the client.
func TestBothDirections(t *testing.T) {
	w := start(t)
	for _, c := range []struct {
		name     string
		from, to ztunnel.Workload
		allowed  bool
	}{
		{"ztunnel to this mesh", ztClient, server, true},
		{"ztunnel to this mesh, denied by this mesh", ztOther, server, false},
		{"this mesh to ztunnel", client, ztServer, true},
		{"this mesh to ztunnel, denied by ztunnel", other, ztServer, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := w.accepted[c.to.Name].Load()
			for i := range calls {
				text := payload
				if i > 0 {
					text = fmt.Sprintf("call %d", i)
				}
				got, err := w.call(t, c.from, c.to, text)
				switch {
				case c.allowed && (err != nil || got != greeting+text):
					t.Fatalf("call %d: got %d bytes, %v; want %d", i, len(got), err, len(greeting)+len(text))
				case !c.allowed && (got != "" || errors.Is(err, os.ErrDeadlineExceeded)):
					t.Fatalf("call %d: a denied client got %q, %v; want nothing and an end", i, got, err)
				}
			}
			want := int64(0)
			if c.allowed {
				want = calls
			}
			if n := w.accepted[c.to.Name].Load() - before; n != want {
				t.Errorf("the application saw %d connections, want %d", n, want)
			}
			w.audited(t, c.from, c.to, c.allowed)
		})
	}
}

// audited checks the records of this mesh's side of the calls.
func (w *world) audited(t *testing.T, from, to ztunnel.Workload, allowed bool) {
	t.Helper()
	side, verdict := audit.Source, audit.Denied
	if to == server {
		side = audit.Destination
	}
	if allowed {
		verdict = audit.Allowed
	}
	var records []audit.Record
	w.Eventually(10*time.Second, "the audit records", func() error {
		records = w.Records(adminclient.AuditQuery{From: from.ID(), To: to.ID()})
		if len(records) != calls {
			all := w.Records(adminclient.AuditQuery{From: from.ID()})
			return fmt.Errorf("%d records, want %d; all of the caller's: %+v", len(records), calls, all[:min(len(all), 2)])
		}
		for _, r := range records {
			if r.End.IsZero() {
				return fmt.Errorf("record %d is still open", r.Seq)
			}
		}
		return nil
	})
	sent := uint64(0)
	for _, r := range records {
		if r.Side != side || r.Verdict != verdict || r.Transport != "mtls" || r.Reason == "" {
			t.Errorf("record %+v; want side %s, verdict %s with a reason, mtls", r, side, verdict)
		}
		if r.Source.ID != from.ID() || r.Destination.ID != to.ID() {
			t.Errorf("record names %s and %s, want %s and %s", r.Source.ID, r.Destination.ID, from.ID(), to.ID())
		}
		if allowed && (r.TLS == nil || r.TLS.Version != "TLSv1.3" || r.TLS.Group == "") {
			t.Errorf("record has TLS %+v, want TLS 1.3", r.TLS)
		}
		sent += r.BytesSent
	}
	if allowed && sent < uint64(len(payload)) {
		t.Errorf("%d bytes in the records, sent more than %d", sent, len(payload))
	}
	t.Logf("%s -> %s: %d records: %s, %s, TLS %+v", from.Name, to.Name, len(records), records[0].Verdict, records[0].Reason, records[0].TLS)
}

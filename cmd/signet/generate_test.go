package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/manifest"
	"github.com/signet-mesh/signet/internal/output"
)

func seen(node, caller, target string, port, minutes int, verdict audit.Verdict) audit.Record {
	at := testNow.Add(-time.Duration(minutes) * time.Minute)
	r := audit.Record{
		ID: fmt.Sprintf("%s-%s-%s-%d-%d", node, caller, target, port, minutes), Node: node, Side: audit.Destination, Start: at, End: at.Add(time.Second),
		Source: audit.Party{ID: caller, Address: "10.0.0.2:40000"}, Destination: audit.Party{ID: target, Workload: "w", Address: fmt.Sprintf("10.0.0.3:%d", port)},
		Verdict: verdict, Transport: "mtls", Reason: "r",
	}
	if !strings.HasPrefix(caller, "spiffe://") {
		r.Source, r.Transport = audit.Party{Address: caller}, "plaintext"
	}
	return r
}

var generated = []audit.Record{
	seen("n1", id("shop/web"), id("pay/ledger"), 8443, 50, audit.Allowed),
	seen("n1", id("shop/web"), id("pay/ledger"), 8443, 40, audit.Observed),
	seen("n2", id("ops/job"), id("pay/ledger"), 8443, 30, audit.Observed),
	seen("n2", id("ops/job"), id("pay/ledger"), 9090, 20, audit.Observed),
	seen("n2", "10.0.0.9:5555", id("pay/ledger"), 8443, 10, audit.Observed),
	seen("n2", id("shop/web"), id("ops/job"), 22, 5, audit.Denied),
}

func observe(records []audit.Record) *observations {
	o := newObservations()
	for _, r := range records {
		o.add(r)
	}
	return o
}

func yamlOf(t *testing.T, records []audit.Record) string {
	t.Helper()
	b, err := newGenerateDoc(observe(records), testNow.Add(-time.Hour), nil).YAML()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Defends least privilege: what is generated is read back as the control plane
// reads it, and the same code that decides for the proxies is asked about every
// caller, target and port there could be. It admits what was seen, and nothing
// else: two callers of one target at different ports do not get each other's.
func TestGeneratedPoliciesAdmitExactlyWhatWasSeen(t *testing.T) {
	var ids []string
	for _, ns := range []string{"shop", "pay", "ops"} {
		for _, sa := range []string{"web", "a", "a-80", "a.80", strings.Repeat("l", 63) + "." + strings.Repeat("m", 63)} {
			ids = append(ids, id(ns+"/"+sa))
		}
	}
	foreign := []string{"spiffe://other.example/ns/shop/sa/web", "spiffe://other.example/some/path", "spiffe://mesh.example/signet/node/n1"}
	ports := []int{80, 443, 8443, 65535, 1}
	td := spiffeid.RequireTrustDomainFromString("mesh.example")
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 1))
		type pair struct {
			caller, target string
			port           int
		}
		want := map[pair]bool{}
		var records []audit.Record
		for range r.IntN(60) {
			p := pair{append(slices.Clone(ids), foreign...)[r.IntN(len(ids)+len(foreign))], ids[r.IntN(len(ids))], ports[r.IntN(len(ports))]}
			verdict := []audit.Verdict{audit.Allowed, audit.Observed, audit.Denied, audit.Failed}[r.IntN(4)]
			records = append(records, seen("n1", p.caller, p.target, p.port, r.IntN(60), verdict))
			if (verdict == audit.Allowed || verdict == audit.Observed) && !slices.Contains(foreign, p.caller) {
				want[p] = true
			}
			// What proves nothing counts for nothing.
			records = append(records, seen("n1", "10.0.0.9:1", p.target, p.port, 1, audit.Observed))
			source := seen("n1", p.caller, p.target, 7777, 1, audit.Allowed)
			source.Side = audit.Source
			records = append(records, source)
		}
		text := yamlOf(t, records)
		r.Shuffle(len(records), func(i, j int) { records[i], records[j] = records[j], records[i] })
		if again := yamlOf(t, records); again != text {
			t.Fatalf("seed %d: the order of records shows:\n%s\n%s", seed, text, again)
		}
		file := filepath.Join(t.TempDir(), "p.yaml")
		var mesh strings.Builder
		mesh.WriteString("apiVersion: signet.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\nspec: {trustDomain: mesh.example}\n")
		for _, ns := range []string{"shop", "pay", "ops"} {
			fmt.Fprintf(&mesh, "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: %s}\n", ns)
		}
		if err := os.WriteFile(file, []byte(mesh.String()+"---\n"+text), 0o600); err != nil {
			t.Fatal(err)
		}
		if found := manifest.Check([]string{file}); len(found) > 0 {
			t.Fatalf("seed %d: %v\n%s", seed, found, text)
		}
		m, err := manifest.Load(file, "n1")
		if err != nil {
			t.Fatal(err)
		}
		model, faults := authz.Compile(td, m.Policies)
		if len(faults) > 0 {
			t.Fatalf("seed %d: %v", seed, faults)
		}
		for _, caller := range append(slices.Clone(ids), foreign...) {
			for _, target := range ids {
				of, _ := workloadOf(spiffeid.RequireFromString(target))
				for _, port := range append(slices.Clone(ports), 7777) {
					d := model.Decide(authz.Request{From: spiffeid.RequireFromString(caller), Target: of, Port: uint16(port)})
					if got := d.Verdict == authz.Allow; got != want[pair{caller, target, port}] {
						t.Fatalf("seed %d: %s -> %s:%d: %s, seen: %t\n%s", seed, caller, target, port, d.Verdict, !got, text)
					}
				}
			}
		}
	}
}

// Lists longer than what the API server takes are split, and stay exact.
func TestGeneratedListsAreBounded(t *testing.T) {
	var records []audit.Record
	for i := range 300 {
		records = append(records, seen("n1", id(fmt.Sprintf("shop/c%d", i)), id("pay/wide"), 80, 1, audit.Allowed), seen("n1", id("shop/web"), id("pay/deep"), 1000+i, 1, audit.Allowed))
	}
	names := map[string]bool{}
	for _, p := range observe(records).policies() {
		if len(p.From) > maxFrom || len(p.Ports) > maxPorts || len(p.Name) > 63 || names[p.Name] {
			t.Errorf("%s: %d callers, %d ports", p.Name, len(p.From), len(p.Ports))
		}
		names[p.Name] = true
	}
	if len(names) != 4 {
		t.Errorf("%d policies, want 4", len(names))
	}
}

// Addresses and names in comments come from other machines; none may end its
// line and become a part of a policy.
func TestGeneratedCommentsStayComments(t *testing.T) {
	evil := seen("n1", "10.0.0.9:1\n---\nkind: AllowPolicy", id("pay/ledger"), 80, 1, audit.Observed)
	evil.Destination.ID, evil.Destination.Workload = "", "pay/x\nspec: {}\u2028"
	d := newGenerateDoc(observe([]audit.Record{evil}), testNow, nil)
	d.Missing = append(d.Missing, struct {
		Node  string `json:"node"`
		Error string `json:"error"`
	}{"n2", "bad\nkind: AllowPolicy"})
	b, err := d.YAML()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if !strings.HasPrefix(line, "# ") {
			t.Errorf("line %q", line)
		}
	}
	var _ output.YAMLDocument = d
}

package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/adminclient"
)

// testNow is the time in every test.
var testNow = time.Date(2026, 11, 23, 9, 30, 0, 0, time.UTC)

func TestMain(m *testing.M) {
	version = "v1.2.3"
	testscript.Main(m, map[string]func(){"signet": func() {
		a := &app{in: os.Stdin, out: os.Stdout, err: os.Stderr, getenv: os.Getenv, now: func() time.Time { return testNow }}
		os.Exit(a.run(context.Background(), os.Args[1:]))
	}})
}

// TestScripts runs the program as its users do; the scripts hold its output.
// With UPDATE_GOLDEN=1 they are rewritten.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		UpdateScripts:       os.Getenv("UPDATE_GOLDEN") != "",
		Setup: func(env *testscript.Env) error {
			env.Setenv("ESCAPE", "\x1b[2J")
			env.Setenv("SIGNET_RUN_DIR", filepath.Join(env.WorkDir, "run"))
			env.Setenv("SIGNET_STATE_DIR", filepath.Join(env.WorkDir, "state"))
			return os.Mkdir(filepath.Join(env.WorkDir, "run"), 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// mesh well|ill: serve a mesh in the run directory.
			"mesh": func(ts *testscript.TestScript, _ bool, args []string) {
				stop, err := meshes[args[0]].serve(ts.Getenv("SIGNET_RUN_DIR"))
				ts.Check(err)
				ts.Defer(stop)
			},
			// cluster bare|poor|well|ill: start an API server, and write the file
			// kubeconfig.
			"cluster": func(ts *testscript.TestScript, _ bool, args []string) {
				_, _, stop, err := startCluster(ts.MkAbs("."), args[0])
				ts.Defer(stop)
				ts.Check(err)
			},
			// code N command...: run it and expect the exit code.
			"code": func(ts *testscript.TestScript, _ bool, args []string) {
				err := ts.Exec(args[1], args[2:]...)
				got := "0"
				if err != nil {
					got = strings.TrimPrefix(err.Error(), "exit status ")
				}
				if got != args[0] {
					ts.Fatalf("exit code %s (%v), want %s", got, err, args[0])
				}
			},
		},
	})
}

// fakeMesh answers on the admin sockets with what it holds; a nil status
// leaves that part's socket out.
type fakeMesh struct {
	control      *adminv1.ControlStatus
	agent        *adminv1.AgentStatus
	certificates []adminv1.Certificate
	records      []audit.Record
	verification adminv1.AuditVerification
	explanation  adminv1.Explanation
	authority    adminv1.AuthorityStatus
	rotating     []adminv1.AuthorityStatus // what is answered, in turn, once a rotation was asked for
}

func (m *fakeMesh) serve(dir string) (stop func(), err error) {
	answer := func(v any) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(v) }
	}
	var stops []func()
	stop = func() {
		for _, s := range stops {
			s()
		}
	}
	listen := func(socket string, mux *http.ServeMux) error {
		l, err := net.Listen("unix", filepath.Join(dir, socket))
		if err != nil {
			return err
		}
		s := &http.Server{Handler: mux, ReadHeaderTimeout: time.Second}
		done := make(chan struct{})
		go func() { defer close(done); _ = s.Serve(l) }()
		stops = append(stops, func() { _ = s.Close(); <-done })
		return nil
	}
	if m.agent != nil {
		mux := http.NewServeMux()
		mux.HandleFunc("GET /v1/status", answer(m.agent))
		mux.HandleFunc("GET /v1/certificates", answer(m.certificates))
		mux.HandleFunc("GET /v1/audit/verify", answer(m.verification))
		mux.HandleFunc("GET /v1/audit", func(w http.ResponseWriter, r *http.Request) {
			for _, rec := range m.records {
				if serial := r.URL.Query().Get("serial"); serial != "" && serial != rec.Source.Serial && serial != rec.Destination.Serial {
					continue
				}
				v := r.URL.Query().Get("verdict")
				if v == "" && (rec.Verdict != audit.Issued || r.URL.Query().Get("serial") != "") || slices.Contains(strings.Split(v, ","), string(rec.Verdict)) {
					_ = json.NewEncoder(w).Encode(rec)
				}
			}
		})
		if err := listen(adminclient.AgentSocket, mux); err != nil {
			return stop, err
		}
	}
	if m.control != nil {
		mux := http.NewServeMux()
		mux.HandleFunc("GET /v1/status", answer(m.control))
		authority := make(chan []adminv1.AuthorityStatus, 1)
		authority <- []adminv1.AuthorityStatus{m.authority}
		mux.HandleFunc("GET /v1/ca", func(w http.ResponseWriter, r *http.Request) {
			next := <-authority
			answer(next[0])(w, r)
			authority <- next[min(1, len(next)-1):]
		})
		mux.HandleFunc("GET /v1/ca/bundle", func(w http.ResponseWriter, r *http.Request) {
			switch r.FormValue("trust-domain") {
			case "", "mesh.example":
				answer(adminv1.TrustBundle{TrustDomain: "mesh.example", Document: testBundle})(w, r)
			case "revoked.example":
				answer(adminv1.TrustBundle{TrustDomain: "revoked.example", Document: json.RawMessage(`{"keys":[]}`)})(w, r)
			case "garbled.example":
				answer(adminv1.TrustBundle{TrustDomain: "garbled.example", Document: json.RawMessage(`{"keys":[{"use":"x509-svid","x5c":["AAAA"]}]}`)})(w, r)
			case "another.example":
				answer(adminv1.TrustBundle{TrustDomain: "mesh.example", Document: testBundle})(w, r)
			default:
				w.WriteHeader(http.StatusBadRequest)
				answer(map[string]string{"error": "trust-domain: the mesh knows no bundle of it"})(w, r)
			}
		})
		mux.HandleFunc("GET /v1/ca/issued", func(w http.ResponseWriter, r *http.Request) {
			if strings.TrimLeft(r.FormValue("serial"), "0") != "a" {
				answer(adminv1.Issuance{})(w, r)
				return
			}
			answer(adminv1.Issuance{
				Found: true, Serial: "0a", ID: id("shop/checkout"), Node: "n1", Workload: "shop/checkout-1", Outcome: "issued",
				At: testNow.Add(-time.Hour), NotBefore: testNow.Add(-time.Hour), NotAfter: testNow.Add(time.Hour),
			})(w, r)
		})
		mux.HandleFunc("POST /v1/ca/rotate", func(w http.ResponseWriter, r *http.Request) {
			<-authority
			authority <- append(slices.Clone(m.rotating), m.authority)
			answer(m.authority)(w, r)
		})
		mux.HandleFunc("POST /v1/ca/abandon", answer(m.authority))
		mux.HandleFunc("POST /v1/ca/distrust", answer(m.authority))
		revoked := answer(adminv1.Revocations{Certificates: []adminv1.RevokedCertificate{{Serial: "0a", ID: id("shop/checkout"), Reason: "lost"}}})
		mux.HandleFunc("GET /v1/ca/revoked", revoked)
		mux.HandleFunc("POST /v1/ca/revoke", revoked)
		mux.HandleFunc("GET /v1/ca/refused", answer(adminv1.Refusals{Refused: []adminv1.Refused{
			{First: testNow.Add(-time.Hour), Last: testNow, Count: 7, Call: "Issue", Node: "n1", Workload: "pay/ledger-1", From: "10.0.0.9", Why: "node", Reason: `workload "pay/ledger-1" is not on node "n1"`},
			{First: testNow, Last: testNow, Count: 1, Call: "TLS", Why: "certificate", Reason: "no\x1b[2J"},
		}}))
		mux.HandleFunc("GET /v1/explain", func(w http.ResponseWriter, r *http.Request) {
			e := m.explanation
			e.From, e.To = r.URL.Query().Get("from"), r.URL.Query().Get("to")
			answer(e)(w, r)
		})
		if err := listen(adminclient.ControlSocket, mux); err != nil {
			return stop, err
		}
	}
	return stop, nil
}

//go:embed testdata/bundle.json
var testBundle json.RawMessage

func id(short string) string {
	ns, sa, _ := strings.Cut(short, "/")
	return "spiffe://mesh.example/ns/" + ns + "/sa/" + sa
}

var testUID uint32 = 1000

var testRecords = []audit.Record{
	{
		Seq: 1, ID: "c-1", Node: "n1", Side: audit.Source, Start: testNow.Add(-time.Minute), End: testNow.Add(-59500 * time.Millisecond),
		Source:      audit.Party{ID: id("shop/checkout"), Workload: "shop/checkout-1", Address: "10.0.0.2:41000", Serial: "0a"},
		Destination: audit.Party{ID: id("pay/ledger"), Address: "10.0.0.3:8443", Serial: "0b"},
		Verdict:     audit.Allowed, Reason: "allowed by pay/allow-checkout", Policy: "pay/allow-checkout", Revision: "00112233445566ff",
		Transport: "mtls", TLS: &audit.TLS{Version: "TLSv1.3", Cipher: "TLS_AES_128_GCM_SHA256", Group: "X25519MLKEM768"}, BytesSent: 120, BytesReceived: 4096,
	},
	{
		Seq: 2, ID: "c-2", Node: "n1", Side: audit.Destination, Start: testNow.Add(-30 * time.Second), End: testNow.Add(-30 * time.Second),
		Source: audit.Party{Address: "10.0.0.9:5555"}, Destination: audit.Party{ID: id("pay/ledger"), Workload: "pay/ledger-1", Address: "10.0.0.3:8443"},
		Verdict: audit.Denied, Reason: "default deny: came without\x1b[2J a tunnel", Transport: "plaintext",
	},
	{
		Seq: 3, ID: "c-3", Node: "n1", Side: audit.Source, Start: testNow.Add(-10 * time.Second),
		Source: audit.Party{ID: id("shop/web")}, Destination: audit.Party{Address: "192.0.2.7:443"},
		Verdict: audit.Observed, Reason: "outside the mesh", Transport: "plaintext",
	},
	{
		Seq: 4, ID: "refused:r:1", Node: "n1", Start: testNow.Add(-5 * time.Second), End: testNow.Add(-time.Second), Verdict: audit.Refused,
		Reason: "no workload's attest rules match", Refusal: &audit.Refusal{Kind: "stranger", Call: "FetchX509SVID", PID: 4242, UID: &testUID, Executable: "/usr/bin/curl\x1b[2J", Count: 12},
	},
	{
		Seq: 5, ID: "refused:r:2", Node: "n1", Start: testNow.Add(-5 * time.Second), End: testNow.Add(-5 * time.Second), Verdict: audit.Refused,
		Reason: "it is not an identity of the calling process", Source: audit.Party{Workload: "shop/web-1"},
		Refusal: &audit.Refusal{Kind: "not-its-own", Call: "FetchJWTSVID", ID: id("pay/ledger"), PID: 7, UID: &testUID, PodUID: "0b8d5a2e-6c1f-4f3e-9c55-2f0a6a4f1d77", Count: 1},
	},
	{
		Seq: 6, ID: "refused:r:3", Node: "n1", Start: testNow.Add(-4 * time.Second), End: testNow, Verdict: audit.Refused,
		Reason: "PermissionDenied: no", Source: audit.Party{Workload: "shop/web-1"}, Refusal: &audit.Refusal{Kind: "control-plane", Call: "Issue", Count: 3, Several: true},
	},
	{
		Seq: 7, ID: "issued:0c", Node: "n1", Start: testNow.Add(-3 * time.Second), End: testNow.Add(-3 * time.Second), Verdict: audit.Issued,
		Source:   audit.Party{ID: id("shop/web"), Workload: "shop/web-1", Serial: "0c"},
		Issuance: &audit.Issuance{Kind: audit.KindX509, NotBefore: testNow.Add(-time.Minute), NotAfter: testNow.Add(time.Hour), Issuer: "ab12"},
	},
	{
		Seq: 8, ID: "issued:0d", Node: "n1", Start: testNow.Add(-2 * time.Second), End: testNow.Add(-2 * time.Second), Verdict: audit.Issued,
		Source:   audit.Party{ID: id("shop/web"), Workload: "shop/web-1", Serial: "0d"},
		Issuance: &audit.Issuance{Kind: audit.KindJWT, NotAfter: testNow.Add(5 * time.Minute), Audience: []string{"bank\x1b[2J"}},
	},
	{
		Seq: 9, ID: "issued:0e", Node: "n1", Start: testNow.Add(-time.Second), End: testNow.Add(-time.Second), Verdict: audit.Issued,
		Source:   audit.Party{ID: "spiffe://mesh.example/signet/node/n1", Serial: "0e"},
		Issuance: &audit.Issuance{Kind: audit.KindX509, NotBefore: testNow.Add(-time.Minute), NotAfter: testNow.Add(24 * time.Hour), Issuer: "ab12"},
	},
}

// authorityAt is an authority at a stage of a rotation; waits is what node n1 says.
func authorityAt(stage adminv1.RotationStage, waits string) adminv1.AuthorityStatus {
	old, next := strings.Repeat("0a", 32), strings.Repeat("0b", 32)
	signs := adminv1.RootStatus{Fingerprint: old, Role: "signs", NotBefore: testNow.Add(-time.Hour), NotAfter: testNow.Add(time.Hour)}
	s := adminv1.AuthorityStatus{
		TrustDomain: "mesh.example", Stage: stage, Roots: []adminv1.RootStatus{signs}, Due: testNow.Add(20 * time.Minute),
		Nodes: []adminv1.NodeRoots{{Name: "n1", Trusted: []string{old}, Used: []string{old}, Waits: waits}},
	}
	if stage == adminv1.RotationPublishing {
		s.Roots = append(s.Roots, adminv1.RootStatus{Fingerprint: next, Role: "next", NotBefore: testNow, NotAfter: testNow.Add(2 * time.Hour)})
	}
	return s
}

// meshes are one that is well and one that has everything wrong with it.
var meshes = map[string]*fakeMesh{
	"well": {
		control: &adminv1.ControlStatus{
			TrustDomain: "mesh.example", Revision: "00112233445566ff", Since: testNow.Add(-time.Hour), Policies: 2,
			Nodes: []adminv1.NodeStatus{{Name: "n1", Connected: true, Revision: "00112233445566ff", Since: testNow.Add(-time.Hour)}},
		},
		agent: &adminv1.AgentStatus{
			Node: "n1", ControlConnected: true, ProxyConnected: true, Revision: "00112233445566ff",
			Workloads: []adminv1.WorkloadStatus{
				{Workload: "pay/ledger-1", ID: id("pay/ledger"), Mode: "enforce", Captured: true, Connections: 2},
				{Workload: "shop/batch", ID: id("shop/batch"), Mode: "observe"},
			},
			Audit: adminv1.AuditStatus{Records: 3, Open: 1},
		},
		certificates: []adminv1.Certificate{
			{Holder: "node", ID: "spiffe://mesh.example/signet/node/n1", Serial: "01", NotBefore: testNow.Add(-time.Minute), NotAfter: testNow.Add(time.Hour), RenewAt: testNow.Add(30 * time.Minute), Issuer: "aa"},
			{Holder: "pay/ledger-1", ID: id("pay/ledger"), Serial: "02", NotBefore: testNow.Add(-time.Hour), NotAfter: testNow.Add(time.Minute), RenewAt: testNow.Add(-time.Second), Issuer: "aa"},
			{Holder: "shop/batch", ID: id("shop/batch")},
		},
		records:   testRecords,
		authority: authorityAt(adminv1.RotationIdle, ""),
		rotating: []adminv1.AuthorityStatus{
			authorityAt(adminv1.RotationPublishing, "the proxy has not taken them\x1b[2J yet"), authorityAt(adminv1.RotationPublishing, ""),
		},
		verification: adminv1.AuditVerification{Batches: 2, Records: 3},
		explanation:  adminv1.Explanation{Port: 8443, Mode: "enforce", Verdict: "allowed", Reason: "allowed by pay/allow-checkout", Policy: "pay/allow-checkout", Revision: "00112233445566ff"},
	},
	"ill": {
		control: &adminv1.ControlStatus{
			TrustDomain: "mesh.example", Revision: "00112233445566ff", Since: testNow.Add(-time.Hour),
			Rejected: []string{"pay.yaml:7: spec.from[0].spiffeID: is no SPIFFE ID"},
			Invalid:  []authz.Diagnostic{{Policy: "pay/old", Field: "spec.from", Message: "is empty"}},
			Nodes: []adminv1.NodeStatus{
				{Name: "n1", Connected: true, Revision: "ffffffffffffffff", Since: testNow.Add(-time.Hour)},
				{Name: "n2", Since: testNow.Add(-time.Minute)},
			},
		},
		agent: &adminv1.AgentStatus{
			Node: "n1", Revision: "ffffffffffffffff",
			Workloads: []adminv1.WorkloadStatus{{Workload: "pay/ledger-1", ID: id("pay/ledger"), Mode: "enforce", Problem: "no rules in the kernel"}},
			Audit:     adminv1.AuditStatus{Records: 3, Gaps: 4},
		},
		certificates: []adminv1.Certificate{
			{Holder: "node", ID: "spiffe://mesh.example/signet/node/n1", Serial: "01", NotBefore: testNow.Add(-time.Hour), NotAfter: testNow.Add(-time.Second), RenewAt: testNow.Add(-time.Minute), Issuer: "aa"},
			{Holder: "pay/ledger-1", ID: id("pay/ledger"), Serial: "02", NotBefore: testNow.Add(-time.Hour), NotAfter: testNow.Add(time.Minute), RenewAt: testNow.Add(-time.Second), Issuer: "aa", LastError: "control plane: not this node's workload"},
			{Holder: "pay/new", ID: id("pay/new"), LastError: "control plane: away"},
		},
		authority:    adminv1.AuthorityStatus{TrustDomain: "mesh.example", Stage: adminv1.RotationPublishing, Error: "no space left on device", Roots: authorityAt(adminv1.RotationPublishing, "").Roots, Nodes: authorityAt(adminv1.RotationPublishing, "it is not connected since 2026-11-23T09:29:00Z").Nodes},
		verification: adminv1.AuditVerification{Batches: 1, Records: 2, Fault: "batch 2 does not follow batch 1"},
		explanation: adminv1.Explanation{
			Port: 8443, Mode: "observe", Verdict: "denied", Reason: "default deny: 1 policy protects pay/ledger, it does not admit this caller",
			Near: []authz.NearMiss{{Policy: "pay/allow-checkout", Why: "caller is shop/web"}},
		},
	},
}

// result is one run of the program in this process.
type result struct {
	code     int
	out, err string
}

func runIn(t *testing.T, dir string, argv ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	env := map[string]string{"SIGNET_RUN_DIR": dir, "SIGNET_STATE_DIR": filepath.Join(dir, "state")}
	a := &app{in: strings.NewReader(""), out: &out, err: &errs, getenv: func(k string) string { return env[k] }, now: func() time.Time { return testNow }}
	return result{a.run(t.Context(), argv), out.String(), errs.String()}
}

// An exit code that depends on the form of output lets a broken mesh or a bad
// policy pass a pipeline that happens to ask for JSON.
func TestExitCodesAreTheSameInEveryForm(t *testing.T) {
	commands := map[string]struct {
		argv []string
		ill  int // exit code with the mesh that is ill
		gone int // exit code without a mesh
	}{
		"signet status":          {[]string{"status"}, exitFindings, exitFailed},
		"signet certs":           {[]string{"certs"}, exitFindings, exitFailed},
		"signet audit":           {[]string{"audit"}, exitGood, exitFailed},
		"signet audit verify":    {[]string{"audit", "verify"}, exitFindings, exitFailed},
		"signet policy explain":  {[]string{"policy", "explain", "--from", "shop/web", "--to", "pay/ledger", "--port", "8443"}, exitFindings, exitFailed},
		"signet policy generate": {[]string{"policy", "generate"}, exitGood, exitFailed},
		"signet policy check":    {nil, exitFindings, exitFindings},
		"signet check":           {nil, exitFindings, exitFindings},
		"signet ca status":       {[]string{"ca", "status"}, exitFindings, exitFailed},
		"signet ca rotate":       {[]string{"ca", "rotate"}, exitFindings, exitFailed},
		"signet ca distrust":     {[]string{"ca", "distrust", "--yes"}, exitFindings, exitFailed},
		"signet ca abandon":      {[]string{"ca", "abandon"}, exitFindings, exitFailed},
		"signet ca revoke":       {[]string{"ca", "revoke", "--serial", "0a", "--reason", "lost"}, exitGood, exitFailed},
		"signet ca refused":      {[]string{"ca", "refused"}, exitGood, exitFailed},
		"signet ca revoked":      {[]string{"ca", "revoked"}, exitGood, exitFailed},
		"signet conformance":     {nil, exitFindings, exitFindings},
		"signet version":         {[]string{"version"}, exitGood, exitGood},
	}
	for name, c := range commands {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			for _, state := range []struct {
				name string
				want int
			}{{"well", exitGood}, {"ill", c.ill}, {"gone", c.gone}} {
				dir := t.TempDir()
				if m := meshes[state.name]; m != nil {
					stop, err := m.serve(dir)
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(stop)
				}
				argv := c.argv
				switch name {
				case "signet policy check":
					argv = []string{"policy", "check", writeFile(t, dir, "p.yaml", map[bool]string{true: goodPolicy, false: "kind: Nonsense\n"}[state.name == "well"], 0o600)}
				case "signet conformance":
					argv = map[bool][]string{true: {"conformance", "--list"}, false: {"conformance", "--bundle-url", "http://example.org/bundle"}}[state.name == "well"]
				case "signet check":
					version := map[bool]string{true: envoyVersion, false: "1.2.3"}[state.name == "well"]
					argv = []string{"check", "--envoy", fakeEnvoy(t, dir, version)}
				}
				for _, form := range []string{"table", "wide", "json", "yaml"} {
					got := runIn(t, dir, append(slices.Clone(argv), "-o", form)...)
					if got.code != state.want {
						t.Errorf("%s -o %s: exit code %d, want %d\n%s%s", state.name, form, got.code, state.want, got.out, got.err)
					}
					if got.code != exitFailed && got.out == "" {
						t.Errorf("%s -o %s: no output", state.name, form)
					}
					if form == "json" && got.code != exitFailed {
						var doc struct{ APIVersion, Kind string }
						if err := json.Unmarshal([]byte(got.out), &doc); err != nil || doc.APIVersion != "signet.dev/cli/v1" || doc.Kind == "" {
							t.Errorf("%s: opening %+v, %v", state.name, doc, err)
						}
					}
					if got.code == exitFailed && (got.out != "" || !strings.Contains(got.err, "signet up")) {
						t.Errorf("%s -o %s: a failure says what to do on stderr alone: %q, %q", state.name, form, got.out, got.err)
					}
				}
			}
		})
	}
	for _, c := range leaves((&app{getenv: os.Getenv}).newRoot()) {
		if _, listed := commands[c.CommandPath()]; !listed && c.Flags().Lookup("output") != nil && c.CommandPath() != "signet ca bundle" { // whose forms are others; see ca.txtar
			t.Errorf("%q has -o and is not tested here", c.CommandPath())
		}
	}
}

const goodPolicy = `apiVersion: signet.dev/v1alpha1
kind: AllowPolicy
metadata: {namespace: pay, name: allow-checkout}
spec:
  from: [{serviceAccount: shop/checkout}]
`

func writeFile(t *testing.T, dir, name, content string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func fakeEnvoy(t *testing.T, dir, version string) string {
	t.Helper()
	return writeFile(t, dir, "envoy", "#!/bin/sh\necho\necho 'envoy  version: 0123abcd/"+version+"/Clean/RELEASE/BoringSSL'\n", 0o700)
}

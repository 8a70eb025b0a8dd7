package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/mesh"
)

func testApp() *app {
	return &app{out: &bytes.Buffer{}, err: &bytes.Buffer{}, getenv: func(string) string { return "" }, now: func() time.Time { return testNow }}
}

func expect(t *testing.T, c check, level string, words ...string) {
	t.Helper()
	if c.Level != level {
		t.Errorf("%s %s: %s (%s), want %s", c.Code, c.Name, c.Level, c.Message, level)
	}
	for _, w := range words {
		if !strings.Contains(c.Message, w) {
			t.Errorf("%s %s: %q does not say %q", c.Code, c.Name, c.Message, w)
		}
	}
	if (c.Fix == "") != (level == levelOK) {
		t.Errorf("%s %s: level %s with fix %q", c.Code, c.Name, c.Level, c.Fix)
	}
}

// The kernel is tried, not asked for its version, and the machine that runs
// the tests has what the mesh needs, or the other tests could not pass.
func TestKernelProbes(t *testing.T) {
	before := tables(t)
	for _, c := range kernelChecks(t.Context()) {
		if c.Code != subjectKernel.code && c.Code != subjectPidfd.code {
			expect(t, c, levelOK)
		}
	}
	if after := tables(t); after != before || strings.Contains(after, "signet-check") {
		t.Errorf("the probe changed the machine's own tables: %q, before %q", after, before)
	}
}

// tables names the tables of nftables here.
func tables(t *testing.T) string {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	all, err := conn.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, table := range all {
		names = append(names, table.Name)
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// The probe sets rules; run by hand it must not do that to a namespace that
// somebody uses.
func TestProbeRefusesANamespaceInUse(t *testing.T) {
	if got := runIn(t, t.TempDir(), probeCommand); got.code != exitFailed || !strings.Contains(got.err, "namespace of the caller") || got.out != "" {
		t.Errorf("%+v", got)
	}
}

func TestKernelVersion(t *testing.T) {
	for release, level := range map[string]string{
		"6.18.44": levelOK, "5.10.0-28-amd64": levelOK, "10.0": levelOK,
		"5.9.16": levelWarning, "4.19.0-26": levelWarning, "": levelWarning, "new": levelWarning,
	} {
		expect(t, checkKernel(release), level)
	}
}

func TestCheckEnvoy(t *testing.T) {
	dir := t.TempDir()
	a := testApp()
	expect(t, a.checkEnvoy(t.Context(), filepath.Join(dir, "none")), levelError, "--envoy")
	expect(t, a.checkEnvoy(t.Context(), fakeEnvoy(t, dir, "1.40.7")), levelOK, "1.40.7", dir)
	expect(t, a.checkEnvoy(t.Context(), fakeEnvoy(t, dir, "1.4.0")), levelError, "not 1.40.x")
	expect(t, a.checkEnvoy(t.Context(), writeFile(t, dir, "other", "#!/bin/sh\necho hello\n", 0o700)), levelError, "names no version")
	expect(t, a.checkEnvoy(t.Context(), writeFile(t, dir, "fails", "#!/bin/sh\nexit 9\n", 0o700)), levelError, "exit status 9")

	a.getenv = func(k string) string { return map[string]string{envEnvoy: filepath.Join(dir, "none")}[k] }
	// What was asked for is never quietly replaced by what is in PATH.
	expect(t, a.checkEnvoy(t.Context(), ""), levelError, "$SIGNET_ENVOY")
	expect(t, a.checkEnvoy(t.Context(), fakeEnvoy(t, dir, envoyVersion)), levelOK)

	t.Chdir(dir)
	a.getenv = func(string) string { return "" }
	if err := os.MkdirAll(filepath.Dir(toolsEnvoy), 0o700); err != nil {
		t.Fatal(err)
	}
	fakeEnvoy(t, filepath.Dir(toolsEnvoy), "1.40.1")
	expect(t, a.checkEnvoy(t.Context(), ""), levelOK, "1.40.1", filepath.Join(dir, toolsEnvoy))
}

func TestCheckRunDir(t *testing.T) {
	dir := t.TempDir()
	expect(t, checkRunDir(dir, false), levelOK, "free")
	expect(t, checkRunDir(filepath.Join(dir, "not", "yet"), false), levelOK, "free")
	expect(t, checkRunDir(dir, true), levelOK, "in use")
	expect(t, checkRunDir(filepath.Join(dir, strings.Repeat("x", 100)), false), levelError, "107 are possible")
	writeFile(t, dir, "admin.sock", "", 0o600)
	expect(t, checkRunDir(dir, false), levelError, "is no socket")
	expect(t, checkRunDir(filepath.Join(dir, "admin.sock"), false), levelError, "no directory")
}

func TestCheckStateDir(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	expect(t, checkStateDir(dir), levelOK, "can be made")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	expect(t, checkStateDir(dir), levelOK, "written")
	key := writeFile(t, dir, "root.key", "", 0o640)
	expect(t, checkStateDir(dir), levelError, "others can read", key)
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	expect(t, checkStateDir(dir), levelOK)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	expect(t, checkStateDir(dir), levelError, "mode 0777")
	if c := checkSpace(filepath.Join(dir, "deeper", "still")); !strings.Contains(c.Message, "are free") {
		t.Errorf("space: %s", c.Message)
	}
}

// certificate writes a self-issued or intermediate certificate.
func certificate(t *testing.T, path string, issuer string, notAfter time.Time) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "it"}, NotBefore: testNow.Add(-time.Hour), NotAfter: notAfter,
		IsCA: true, BasicConstraintsValid: true,
	}
	parent := *cert
	parent.Subject.CommonName = issuer
	der, err := x509.CreateCertificate(rand.Reader, cert, &parent, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Dir(path), filepath.Base(path), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), 0o600)
}

func TestCheckAuthority(t *testing.T) {
	a := testApp()
	dir := t.TempDir()
	deep := filepath.Join(dir, "control", "ca")
	if err := os.MkdirAll(deep, 0o700); err != nil {
		t.Fatal(err)
	}
	root, middle := filepath.Join(deep, "root.crt"), filepath.Join(deep, "intermediate.crt")
	expect(t, a.checkAuthority(filepath.Join(dir, "none"), false), levelOK, "first start")
	expect(t, a.checkAuthority(dir, false), levelOK, "first start")
	certificate(t, root, "it", testNow.Add(365*24*time.Hour))
	expect(t, a.checkAuthority(dir, false), levelOK, "2027-11-23")
	certificate(t, middle, "another", testNow.Add(time.Hour)) // replaced in time by the control plane
	expect(t, a.checkAuthority(dir, true), levelOK, "2 certificates")
	certificate(t, middle, "another", testNow.Add(-time.Second)) // replaced when it starts
	expect(t, a.checkAuthority(dir, false), levelOK)
	expect(t, a.checkAuthority(dir, true), levelError, "intermediate", "expired")
	certificate(t, root, "it", testNow.Add(24*time.Hour))
	expect(t, a.checkAuthority(dir, false), levelWarning, "expires in 24h0m0s")
	certificate(t, root, "it", testNow.Add(-time.Second))
	expect(t, a.checkAuthority(dir, false), levelError, "expired")
	a.now = func() time.Time { return testNow.Add(-2 * time.Hour) }
	expect(t, a.checkAuthority(dir, false), levelError, "not valid before")
	writeFile(t, deep, "root.crt", "rubbish", 0o600)
	expect(t, a.checkAuthority(dir, false), levelError, "holds no certificate")
}

func TestCheckClock(t *testing.T) {
	a := testApp()
	if c := a.checkClock(); c.Level == levelError {
		t.Errorf("%+v", c)
	}
	a.now = func() time.Time { return time.Unix(0, 0) }
	expect(t, a.checkClock(), levelError, "1970")
}

// newNetNS makes a network namespace that lives as long as the test and whose
// path is returned, and runs f inside it.
func newNetNS(t *testing.T, f func()) string {
	t.Helper()
	path := make(chan string)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("make a network namespace: %v", err)
			path <- ""
			return
		}
		f()
		path <- fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
		<-stop
	}()
	t.Cleanup(func() { close(stop); <-done })
	return <-path
}

func TestCheckDocuments(t *testing.T) {
	dir := t.TempDir()
	expect(t, checkDocuments(filepath.Join(dir, "none"), false)[0], levelError, "no such file")
	bad := checkDocuments(writeFile(t, dir, "bad.yaml", "kind: Nonsense\n", 0o600), false)
	expect(t, bad[0], levelError, "bad.yaml:1")
	if !strings.HasPrefix(bad[0].Code, "SIG1") {
		t.Errorf("the finding's own code is lost: %+v", bad[0])
	}

	var l net.Listener
	busy := newNetNS(t, func() {
		var err error
		if l, err = net.Listen("tcp6", "[::]:15008"); err != nil {
			t.Errorf("listen: %v", err)
		}
	})
	if l == nil {
		t.FailNow()
	}
	t.Cleanup(func() { _ = l.Close() })
	free := newNetNS(t, func() {})
	capture := func(path string) *mesh.Workload {
		return &mesh.Workload{Namespace: "pay", Name: "ledger", Capture: &mesh.Capture{NetNS: path}}
	}
	expect(t, checkCapture(capture(free), false), levelOK, "pay/ledger")
	expect(t, checkCapture(capture(busy), false), levelError, "pay/ledger", "15008")
	expect(t, checkCapture(capture(busy), true), levelOK) // by the mesh itself
	expect(t, checkCapture(capture(filepath.Join(dir, "none")), false), levelError, "no such file")
	expect(t, checkCapture(capture(writeFile(t, dir, "file", "", 0o600)), false), levelError, "enter the network namespace")

	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	good := writeFile(t, dir, "good.yaml", `apiVersion: signet.dev/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {trustDomain: mesh.example}
---
apiVersion: v1
kind: Namespace
metadata: {name: pay, annotations: {signet.dev/mesh: enforce}}
---
apiVersion: signet.dev/v1alpha1
kind: WorkloadEntry
metadata: {namespace: pay, name: ledger}
spec:
  serviceAccount: ledger
  capture: {networkNamespace: signet-test-no-such, addresses: [10.99.0.2]}
---
apiVersion: signet.dev/v1alpha1
kind: WorkloadEntry
metadata: {namespace: pay, name: far}
spec:
  serviceAccount: ledger
  node: not-`+host+`
  capture: {networkNamespace: signet-test-no-such-2, addresses: [10.99.0.3]}
`, 0o600)
	checks := checkDocuments(good, false)
	if len(checks) != 2 {
		t.Fatalf("one capture is on this machine: %+v", checks)
	}
	expect(t, checks[0], levelOK, "2 workloads")
	expect(t, checks[1], levelError, "pay/ledger", "signet-test-no-such")
}

package ca

import (
	"bytes"
	"crypto/x509"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite testdata/csr")

const corpusDir = "testdata/csr"

// Every hostile request is refused for the right reason before any trusted key
// is touched, and every good one passes.
func TestPrepareCorpus(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	cases := csrCorpus(t)
	hostile := 0
	for _, c := range cases {
		if c.want != "" {
			hostile++
		}
		if (c.want == "") != strings.HasPrefix(c.name, "good_") {
			t.Fatalf("%s: name and expectation disagree", c.name)
		}
		t.Run(c.name, func(t *testing.T) { checkCase(t, a, c) })
	}
	if hostile < 40 {
		t.Errorf("%d hostile requests; want at least 40", hostile)
	}
	entries, err := a.IssuanceLog().Entries(a.now().AddDate(-1, 0, 0))
	if err != nil || len(entries) != 0 {
		t.Errorf("Prepare left %d entries in the issuance log (%v); want none", len(entries), err)
	}
}

func checkCase(t *testing.T, a *Authority, c csrCase) {
	t.Helper()
	p, err := a.Prepare(Request{ID: corpusID, CSR: c.der})
	switch {
	case c.want == "" && err != nil:
		t.Errorf("refused: %v", err)
	case c.want != "" && err == nil:
		t.Errorf("passed as %v; want a refusal that says %q", p.tmpl.URIs, c.want)
	case c.want != "" && !strings.Contains(err.Error(), c.want):
		t.Errorf("refused with %q; want %q in it", err, c.want)
	}
}

// The stored corpus, which the server's test sends over the wire, holds the
// same cases and is judged alike.
func TestStoredCorpus(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	cases := csrCorpus(t)
	if *update {
		if err := os.RemoveAll(corpusDir); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(corpusDir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, c := range cases {
			if err := os.WriteFile(filepath.Join(corpusDir, c.name+".der"), c.der, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range cases {
		der, err := os.ReadFile(filepath.Join(corpusDir, c.name+".der"))
		if err != nil {
			t.Errorf("%v; run go test ./ca -run Corpus -update", err)
			continue
		}
		c.der = der
		t.Run(c.name, func(t *testing.T) { checkCase(t, a, c) })
	}
	if files, _ := filepath.Glob(filepath.Join(corpusDir, "*")); len(files) != len(cases) {
		t.Errorf("%d stored requests for %d cases; run go test ./ca -run Corpus -update", len(files), len(cases))
	}
}

// Whatever bytes come, Prepare does not panic, and what it accepts is a
// certificate for the requested identity and the request's own key.
func FuzzPrepare(f *testing.F) {
	a := openTest(f, f.TempDir(), nil)
	files, _ := filepath.Glob(filepath.Join(corpusDir, "*.der"))
	if len(files) == 0 {
		f.Fatal("no seeds in " + corpusDir)
	}
	for _, file := range files {
		der, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(der)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		p, err := a.Prepare(Request{ID: corpusID, CSR: der})
		if err != nil {
			return
		}
		csr, err := x509.ParseCertificateRequest(der)
		if err != nil {
			t.Fatalf("accepted what does not parse: %v", err)
		}
		if csr.CheckSignature() != nil {
			t.Error("accepted a request without proof of possession")
		}
		if len(p.tmpl.URIs) != 1 || p.tmpl.URIs[0].String() != corpusID.String() {
			t.Errorf("prepared %v; want %s", p.tmpl.URIs, corpusID)
		}
		if len(csr.DNSNames)+len(csr.IPAddresses)+len(csr.EmailAddresses) != 0 || len(csr.URIs) > 1 {
			t.Error("accepted names beside the identity")
		}
		spki, err := x509.MarshalPKIXPublicKey(p.pub)
		if err != nil {
			t.Fatal(err)
		}
		// RSA keys may be written without NULL parameters; compare those parsed.
		if again, err := x509.ParsePKIXPublicKey(csr.RawSubjectPublicKeyInfo); err != nil {
			t.Fatal(err)
		} else if der, err := x509.MarshalPKIXPublicKey(again); err != nil || !bytes.Equal(der, spki) {
			t.Error("prepared another key than the request's")
		}
	})
}

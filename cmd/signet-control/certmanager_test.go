package main

import (
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Flags that make no sense together are refused with words that name them, before
// anything is asked.
func TestCertManagerFlags(t *testing.T) {
	for _, c := range []struct {
		args       string
		kubernetes bool
		want       string // in the error; empty: there is none
	}{
		{"", false, ""},
		{"--cert-manager-issuer=company --cert-manager-issuer-kind=ClusterIssuer", true, ""},
		{"--cert-manager-issuer=pca --cert-manager-issuer-kind=AWSPCAIssuer --cert-manager-issuer-group=awspca.cert-manager.io", true, ""},
		{"--cert-manager-issuer=company", false, "needs --kubernetes"},
		{"--cert-manager-issuer-kind=ClusterIssuer", true, "--cert-manager-issuer: is missing"},
		{"--cert-manager-roots=roots.pem", true, "--cert-manager-issuer: is missing"},
		{"--cert-manager-issuer=company --cert-manager-issuer-kind=Certificate", true, `kind "Certificate"`},
		{"--cert-manager-issuer=company --cert-manager-mode=per-workload", true, ""},
		{"--cert-manager-issuer=company --cert-manager-mode=strict", true, `--cert-manager-mode: is "strict"`},
		{"--cert-manager-issuer=company --cert-manager-mode=per-workload --cert-manager-workload-issuer=leaves --cert-manager-workload-issuer-kind=ClusterIssuer", true, ""},
		{"--cert-manager-issuer=company --cert-manager-workload-issuer=leaves", true, "--cert-manager-workload-issuer: needs --cert-manager-mode=per-workload"},
		{"--cert-manager-issuer=company --cert-manager-mode=per-workload --cert-manager-workload-issuer-kind=ClusterIssuer", true, "--cert-manager-workload-issuer: is missing"},
		{"--cert-manager-issuer=company --cert-manager-mode=per-workload --cert-manager-workload-issuer=leaves --cert-manager-workload-issuer-kind=Certificate", true, `--cert-manager-workload-issuer-kind: kind "Certificate"`},
		{"--cert-manager-mode=per-workload", true, "--cert-manager-issuer: is missing"},
		{"--cert-manager-issuer=company --cert-manager-duration=1s", true, "--cert-manager-duration: is 1s"},
	} {
		var o certManager
		f := flag.NewFlagSet("test", flag.ContinueOnError)
		f.SetOutput(io.Discard)
		o.flags(f)
		err := f.Parse(strings.Fields(c.args))
		if err == nil {
			err = o.check(c.kubernetes)
		}
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.args, err, c.want)
		}
	}
}

// A file of roots that holds anything else must not count as no file: the roots that
// the issuer says would be taken instead.
func TestReadRoots(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"empty": "", "text": "a root", "key": "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
		"broken": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if roots, err := readRoots(path); err == nil {
			t.Errorf("%s: %d roots and no error", name, len(roots))
		}
	}
	if _, err := readRoots(filepath.Join(dir, "absent")); err == nil {
		t.Error("a file that is not there")
	}
	if roots, err := readRoots(""); err != nil || roots != nil {
		t.Errorf("no file: %v, %v", roots, err)
	}
}

package clients

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"os"
	"regexp"
	"testing"
	"time"

	"github.com/signet-mesh/signet/internal/control"
)

// denied is PermissionDenied in the words of each library. Rust's has a name of
// its own for it when the message is the usual one.
var denied = map[string]*regexp.Regexp{
	"go":     regexp.MustCompile(`code = PermissionDenied`),
	"java":   regexp.MustCompile(`StatusRuntimeException: PERMISSION_DENIED`),
	"python": regexp.MustCompile(`StatusCode.PERMISSION_DENIED`),
	"rust":   regexp.MustCompile(`^no identity issued$`),
}

// TestFetch: a workload in each language gets its identity and the mesh's root
// from the library's own client. The same program as another user gets nothing,
// and neither does another program as the same user: an interpreter is told
// apart by both.
func TestFetch(t *testing.T) {
	f := start(t, time.Hour)
	raw, err := os.ReadFile(control.RootFile(f.mesh.StateDir))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(raw)
	f.each(func(t *testing.T, l *language) {
		got := f.run(t, l, 0, "fetch").next(t)
		if got.Error != "" || got.ID != l.id() {
			t.Fatalf("got %q, %s; want %s", got.ID, got.Error, l.id())
		}
		if len(got.Roots) != 1 || !bytes.Equal(got.Roots[0], block.Bytes) {
			t.Errorf("the bundle has %d certificates, and is not the root", len(got.Roots))
		}
		opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
		var leaf *x509.Certificate
		for i, der := range append(got.Chain, got.Roots...) {
			c, err := x509.ParseCertificate(der)
			switch {
			case err != nil:
				t.Fatal(err)
			case i == 0:
				leaf = c
			case i < len(got.Chain):
				opts.Intermediates.AddCert(c)
			default:
				opts.Roots.AddCert(c)
			}
		}
		if _, err := leaf.Verify(opts); err != nil {
			t.Error(err)
		}
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != l.id() {
			t.Errorf("the certificate is of %v", leaf.URIs)
		}

		if got := f.run(t, l, nobodyUID, "fetch").next(t); !denied[l.name].MatchString(got.Error) {
			t.Errorf("as a user of no workload: %q, %s", got.ID, got.Error)
		}
		for _, other := range f.languages {
			if other == l {
				continue
			}
			if got := f.run(t, l, other.uid, "fetch").next(t); !denied[l.name].MatchString(got.Error) {
				t.Errorf("as the user of %s: %q, %s", other.name, got.ID, got.Error)
			}
			break
		}
	})
}

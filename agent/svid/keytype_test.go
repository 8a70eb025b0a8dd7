package svid

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"testing"

	"github.com/signet-mesh/signet/internal/mesh"
)

// A request is for a key of the kind that is asked for, and signed with it. A
// kind that nobody knows makes none.
func TestNewRequest(t *testing.T) {
	for kind := mesh.KeyECP256; kind <= mesh.KeyRSA4096; kind++ {
		_, der, err := newRequest(kind)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := x509.ParseCertificateRequest(der)
		if err != nil {
			t.Fatal(err)
		}
		if err := csr.CheckSignature(); err != nil {
			t.Error(err)
		}
		is := ""
		switch k := csr.PublicKey.(type) {
		case *ecdsa.PublicKey:
			is = fmt.Sprintf("ec-p%d", k.Params().BitSize)
		case *rsa.PublicKey:
			is = fmt.Sprintf("rsa-%d", k.N.BitLen())
		}
		if is != kind.String() {
			t.Errorf("%s is asked for, %q is made", kind, is)
		}
		if again, ok := mesh.ParseKeyType(is); !ok || again != kind {
			t.Errorf("%q is read as %s, %v", is, again, ok)
		}
	}
	if _, _, err := newRequest(mesh.KeyRSA4096 + 1); err == nil {
		t.Error("a key of no kind is made")
	}
}

package svid

import (
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/internal/mesh"
)

// A request is for a key of the kind that is asked for, is signed with it, and names
// the identity and nothing else, since authorities above copy it. A kind that nobody
// knows makes none.
func TestNewRequest(t *testing.T) {
	id := sa("web")
	for kind := mesh.KeyECP256; kind <= mesh.KeyRSA4096; kind++ {
		r, err := newRequest(kind, id)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := x509.ParseCertificateRequest(r.csr)
		if err != nil {
			t.Fatal(err)
		}
		if err := csr.CheckSignature(); err != nil {
			t.Error(err)
		}
		if len(csr.URIs) != 1 || csr.URIs[0].String() != id.String() || len(csr.Extensions) != 1 || len(csr.Subject.Names) != 0 {
			t.Errorf("it names %v, %v, and has %d extensions", csr.URIs, csr.Subject, len(csr.Extensions))
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
	if _, err := newRequest(mesh.KeyRSA4096+1, id); err == nil {
		t.Error("a key of no kind is made")
	}
}

// A request that was not answered is repeated as it was, so that an authority that
// takes long knows it; once it was answered the key is used for nothing else.
func TestUnansweredRequestIsRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, time.Hour)
		is.set(func(i *issuer) { i.before = func(context.Context, string) error { return errors.New("pending") } })
		n := start(t, is, Config{}, "web")
		defer n.stop()
		time.Sleep(time.Minute)
		is.set(func(i *issuer) { i.before = nil })
		time.Sleep(time.Hour)
		keys := []string{}
		is.set(func(i *issuer) { keys = i.keys })
		if len(keys) < 5 {
			t.Fatalf("%d requests", len(keys))
		}
		if distinct := len(slices.Compact(keys)); distinct < 2 || distinct > 3 {
			t.Errorf("%d keys: that of a minute of failures, and one or two of renewals in an hour", distinct)
		}
	})
}

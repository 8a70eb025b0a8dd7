package federation

import (
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/signet-mesh/signet/ca"
)

// TestDiscovery: a verifier that knows nothing of SPIFFE finds the keys by the
// issuer's name alone and takes a real token, for its audience and of its issuer
// only. Below a path, too.
func TestDiscovery(t *testing.T) {
	for _, path := range []string{"", "/mesh/one"} {
		mux := http.NewServeMux()
		s := httptest.NewTLSServer(mux)
		defer s.Close()
		issuer := s.URL + path
		token := func(iss string) (*ca.Authority, string) {
			a, err := ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: meshTD, JWTIssuer: iss})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { a.Close() })
			p, err := a.PrepareJWT(ca.JWTRequest{ID: spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/app"), Audience: []string{"cloud"}})
			if err != nil {
				t.Fatal(err)
			}
			issued, err := a.IssueJWT(p)
			if err != nil {
				t.Fatal(err)
			}
			return a, issued.Token
		}
		authority, good := token(issuer)
		_, strange := token(issuer) // with keys of its own
		d := &Discovery{Issuer: issuer, Keys: func() []ca.JWTKey { keys, _ := authority.JWTKeys(); return keys }}
		if err := d.Register(mux); err != nil {
			t.Fatal(err)
		}
		ctx := oidc.ClientContext(t.Context(), s.Client())
		provider, err := oidc.NewProvider(ctx, issuer)
		if err != nil {
			t.Fatal(err)
		}
		verify := func(audience, raw string) (*oidc.IDToken, error) {
			return provider.VerifierContext(ctx, &oidc.Config{ClientID: audience}).Verify(ctx, raw)
		}
		if got, err := verify("cloud", good); err != nil || got.Subject != "spiffe://mesh.test/ns/shop/sa/app" || got.Issuer != issuer {
			t.Errorf("%q: %+v %v", path, got, err)
		}
		if _, err := verify("others", good); err == nil {
			t.Errorf("%q: taken for another audience", path)
		}
		if _, err := verify("cloud", strange); err == nil {
			t.Errorf("%q: taken with a key that is not shown", path)
		}
		_, plain := token("")
		if got, err := jwtsvid.ParseInsecure(plain, []string{"cloud"}); err != nil || got.Claims["iss"] != nil {
			t.Errorf("%q: without an issuer: %+v %v", path, got, err)
		}
	}
}

// An issuer is compared as a string, and is an address that verifiers ask.
func TestCheckIssuer(t *testing.T) {
	for _, good := range []string{"https://oidc.example", "https://oidc.example:8443", "https://oidc.example/a/b"} {
		if err := CheckIssuer(good); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"", "oidc.example", "http://oidc.example", "https://", "https://oidc.example/", "https://u@oidc.example", "https://oidc.example?x", "https://oidc.example?", "https://oidc.example#x", "https://oidc.example/a b", "HTTPS://oidc.example"} {
		if err := CheckIssuer(bad); err == nil {
			t.Errorf("%s: taken", bad)
		}
	}
}

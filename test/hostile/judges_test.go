package hostile

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/adminserver"
	"github.com/signet-mesh/signet/internal/fanout"
	"github.com/signet-mesh/signet/internal/mesh"
	"github.com/signet-mesh/signet/internal/x509check"
)

// verdict is what a judge says: the identity that it believes, or why none.
type verdict struct {
	id  string
	why string
}

func (v verdict) String() string {
	if v.id == "" {
		return "refuses: " + v.why
	}
	return "accepts as " + v.id
}

func judged(id spiffeid.ID, err error) verdict {
	if err != nil {
		return verdict{why: err.Error()}
	}
	return verdict{id: id.String()}
}

// parse reads a chain as Go's TLS does.
func parse(chain [][]byte) ([]*x509.Certificate, error) {
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		certs[i] = c
	}
	return certs, nil
}

// proves reports whether the presenter's key is the leaf's.
func proves(c *testCase, leaf *x509.Certificate) bool {
	k, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(c.key.Public())
}

var errKey = errors.New("the presenter does not have the certificate's key")

// goSpiffe is the library as every program uses it: the chain against the
// bundle, and then, as a source that was handed the certificate would do it, the
// certificate together with its key.
func goSpiffe(c *testCase, bundle x509bundle.Source) verdict {
	certs, err := parse(c.chain)
	if err != nil {
		return judged(spiffeid.ID{}, err)
	}
	if !proves(c, certs[0]) { // the TLS library's part
		return judged(spiffeid.ID{}, errKey)
	}
	id, _, err := x509svid.Verify(certs, bundle)
	return judged(id, err)
}

// goSpiffeSource is the library's judgement of its own certificate and key.
func goSpiffeSource(c *testCase) verdict {
	key, err := x509.MarshalPKCS8PrivateKey(c.key)
	if err != nil {
		return judged(spiffeid.ID{}, err)
	}
	svid, err := x509svid.ParseRaw(bytes.Join(c.chain, nil), key)
	if err != nil {
		return judged(spiffeid.ID{}, err)
	}
	return judged(svid.ID, nil)
}

// project is what this project's Go programs say to a peer.
func project(c *testCase, p *pki) verdict {
	certs, err := parse(c.chain)
	if err != nil {
		return judged(spiffeid.ID{}, err)
	}
	if !proves(c, certs[0]) {
		return judged(spiffeid.ID{}, errKey)
	}
	return judged(x509check.Verify(certs, p.bundle(), p.clock()))
}

// guard is one place where the project decides about a peer's certificate. It
// believes one identity only, or, if that is zero, any.
type guard struct {
	name   string
	only   spiffeid.ID
	config *tls.Config
}

// guards are the TLS configurations that the project's programs use.
func guards(t *testing.T, p *pki) []guard {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString(trustDomain)
	own := func() (*tls.Certificate, error) {
		return &tls.Certificate{Certificate: [][]byte{p.leaf(p.root, idServer)}, PrivateKey: p.keys.p256}, nil
	}
	client, err := caserver.ClientTLS(caserver.ClientConfig{TrustDomain: td, Bundle: p.bundle(), Now: p.clock})
	if err != nil {
		t.Fatal(err)
	}
	node, err := fanout.NodeTLS(fanout.Identity{Certificate: own, Bundle: p.bundle(), Node: func(name string) (spiffeid.ID, error) { return ca.NodeID(td, name) }, Now: p.clock})
	if err != nil {
		t.Fatal(err)
	}
	asked, err := node("n1")
	if err != nil {
		t.Fatal(err)
	}
	out := []guard{
		{"an agent that calls the control plane", spiffeid.RequireFromString(idControl), client},
		{"the control plane that asks node n1", spiffeid.RequireFromString(idNode), asked},
	}
	for _, aim := range aims {
		id := spiffeid.RequireFromString(aim)
		cfg, err := (&adminserver.TLS{Certificate: own, Bundle: p.bundle(), Client: id, Now: p.clock}).Config()
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, guard{"an agent's admin server for " + aim, id, cfg})
	}
	return out
}

// controlPlane returns the TLS of a control plane that has the corpus' root.
func controlPlane(t *testing.T, p *pki) *tls.Config {
	t.Helper()
	dir := t.TempDir()
	log := slog.New(slog.DiscardHandler)
	root := must(x509.ParseCertificate(p.root.der))
	authority, err := ca.Open(ca.Options{
		Dir: filepath.Join(dir, "ca"), TrustDomain: spiffeid.RequireTrustDomainFromString(trustDomain), Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { authority.Close() })
	if err := authority.PublishRoots([]*x509.Certificate{root}); err != nil {
		t.Fatal(err)
	}
	tokens, err := caserver.OpenTokens(filepath.Join(dir, "tokens"))
	if err != nil {
		t.Fatal(err)
	}
	server, err := caserver.New(caserver.Config{Authority: authority, Feed: new(mesh.Feed), Tokens: tokens, Log: log, Now: p.clock})
	if err != nil {
		t.Fatal(err)
	}
	return server.TLSConfig()
}

// presenter proves a key as if it were of a kind that the other side likes: what
// a client refuses for its own good shows nothing about the server.
type presenter struct {
	crypto.Signer
	as crypto.PublicKey
}

// Public implements crypto.Signer.
func (p presenter) Public() crypto.PublicKey { return p.as }

// present returns the certificate as a client of Go's TLS presents it.
func (c *testCase) present(k *keys) *tls.Certificate {
	signer := c.key
	if key, ok := signer.(*ecdsa.PrivateKey); ok && key.Curve != k.p256.Curve && key.Curve != k.p384.Curve {
		signer = presenter{key, k.p256.Public()}
	}
	if _, ok := signer.(ed25519.PrivateKey); ok {
		signer = presenter{k.p256, k.p256.Public()}
	}
	return &tls.Certificate{Certificate: c.chain, PrivateKey: signer}
}

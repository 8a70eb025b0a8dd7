package agent

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Only what says that one of the two does not trust the other makes a node look
// for other roots: a control plane that is away, or refuses for another reason,
// does not.
func TestCutOff(t *testing.T) {
	for err, want := range map[error]bool{
		status.Error(codes.Unauthenticated, "client certificate: x509: unknown authority"):                                                                     true,
		status.Error(codes.Unavailable, "connection error: desc = \"transport: authentication handshake failed: control plane's certificate: x509: unknown\""): true,
		status.Error(codes.Unavailable, "connection error: desc = \"error reading server preface: remote error: tls: bad certificate\""):                       true,
		status.Error(codes.Unavailable, "connection refused"):                                                                                                  false,
		status.Error(codes.PermissionDenied, "node \"one\" is cut off by quarantine \"q\""):                                                                    false,
		errors.New("a state that makes no sense was not taken"):                                                                                                false,
	} {
		if got := cutOff(err); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}
}

// Published roots replace the node's own, on its disk too; a text without any
// replaces nothing. A certificate that ends at none of them is forgotten, and one
// that ends at one of them is kept.
func TestPublishedRoots(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("mesh.test")
	old, next := below(t, nil), below(t, nil)
	n := &nodeIdentity{dir: t.TempDir(), bundle: x509bundle.FromX509Authorities(td, []*x509.Certificate{old.cert}), renew: make(chan struct{}, 1), log: slog.New(slog.DiscardHandler)}
	text := func(all ...*signer) (out []byte) {
		for _, s := range all {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.cert.Raw})...)
		}
		return out
	}
	n.cert = &tls.Certificate{Certificate: [][]byte{[]byte("leaf"), below(t, old).cert.Raw}}
	if err := os.WriteFile(n.file(), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i, step := range []struct {
		text        []byte
		news, fails bool
		stale       bool
	}{
		{nil, false, true, false},
		{[]byte("garbage"), false, true, false},
		{text(old), false, false, false},
		{text(old, next), true, false, false},
		{text(next), true, false, true},
		{text(next), false, false, true},
	} {
		news, err := n.trust(step.text)
		if news != step.news || (err != nil) != step.fails {
			t.Errorf("%d: news %v, %v", i, news, err)
		}
		if got := n.stale(); got != step.stale {
			t.Errorf("%d: stale %v", i, got)
		}
		if _, err := os.Stat(n.file()); (err != nil) != step.stale {
			t.Errorf("%d: the certificate on disk: %v", i, err)
		}
	}
	kept, err := x509bundle.Load(td, n.bundleFile())
	if err != nil || fmt.Sprint(fingerprints(kept.X509Authorities())) != fmt.Sprint(fingerprints([]*x509.Certificate{next.cert})) {
		t.Errorf("on disk: %v, %v", kept, err)
	}
}

package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"log/slog"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/svid"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
)

// issuing is a control plane that certifies every workload but shop/bad, with serial
// numbers that count up.
type issuing struct {
	nodev1.NodeClient
	t      *testing.T
	by     *signer
	serial int64
}

func (c *issuing) leaf(workload string) []byte {
	c.serial++
	id, err := url.Parse("spiffe://mesh.test/ns/shop/sa/" + strings.TrimPrefix(workload, "shop/"))
	if err != nil {
		c.t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		c.t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(c.serial), URIs: []*url.URL{id}, NotAfter: time.Now().Add(time.Hour)}, c.by.cert, key.Public(), c.by.key)
	if err != nil {
		c.t.Fatal(err)
	}
	return der
}

func (c *issuing) Issue(_ context.Context, req *nodev1.IssueRequest, _ ...grpc.CallOption) (*nodev1.IssueResponse, error) {
	return &nodev1.IssueResponse{Chain: [][]byte{c.leaf(req.GetWorkload()), c.by.cert.Raw}}, nil
}

func (c *issuing) IssueMany(_ context.Context, req *nodev1.IssueManyRequest, _ ...grpc.CallOption) (*nodev1.IssueManyResponse, error) {
	out := new(nodev1.IssueManyResponse)
	for _, one := range req.GetRequests() {
		result := &nodev1.IssueResult{Code: uint32(codes.PermissionDenied), Message: "no"}
		if one.GetWorkload() != "shop/bad" {
			result = &nodev1.IssueResult{Chain: [][]byte{c.leaf(one.GetWorkload())}}
		}
		out.Results = append(out.Results, result)
	}
	return out, nil
}

// TestIssuedIsWritten: what the control plane issues is in the node's audit when who
// asked for it has it, each once; that the audit cannot be written keeps nobody from
// its certificate.
//
// What it defends: that whose a certificate was is known after the control plane that
// issued it is gone.
func TestIssuedIsWritten(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	store, err := audit.Open(t.TempDir(), "n1", log)
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{log: log, store: store, client: &issuing{t: t, by: below(t, nil)}}
	kept := func() (out []string) {
		t.Helper()
		if err := store.Query(t.Context(), audit.Filter{Verdicts: []audit.Verdict{audit.Issued}}, func(r audit.Record) error {
			if r.Node != "n1" || r.Issuance.Kind != audit.KindX509 || r.Issuance.NotAfter.Before(time.Now()) || r.Start.IsZero() || r.End.IsZero() {
				t.Errorf("%+v", r)
			}
			out = append(out, r.Source.Serial+" "+r.Source.Workload+" "+r.Source.ID)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return out
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel() // who asked has gone: it was issued all the same
	if _, err := (issuer{a}).Issue(ended, "shop/web", nil); err != nil {
		t.Fatal(err)
	}
	want := []string{"01 shop/web spiffe://mesh.test/ns/shop/sa/web"}
	if got := kept(); !slices.Equal(got, want) {
		t.Errorf("kept %q, want %q", got, want)
	}
	if _, err := (issuer{a}).IssueMany(t.Context(), []svid.Ask{{Workload: "shop/a"}, {Workload: "shop/bad"}, {Workload: "shop/b"}}); err != nil {
		t.Fatal(err)
	}
	want = append(want, "02 shop/a spiffe://mesh.test/ns/shop/sa/a", "03 shop/b spiffe://mesh.test/ns/shop/sa/b")
	if got := kept(); !slices.Equal(got, want) {
		t.Errorf("kept %q, want %q", got, want)
	}
	store.Close()
	if chain, err := (issuer{a}).Issue(t.Context(), "shop/web", nil); err != nil || len(chain) != 2 {
		t.Errorf("while the audit cannot be written: %d certificates, %v", len(chain), err)
	}
	if err := store.Query(t.Context(), audit.Filter{}, nil); !errors.Is(err, audit.ErrClosed) {
		t.Errorf("the audit must not be usable: %v", err)
	}
}

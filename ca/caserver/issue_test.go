package caserver

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
)

func csrNaming(t *testing.T, uris ...*url.URL) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: uris}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// Defends: a batch gets a node nothing that it would not get one by one: each request
// is decided by itself, with the same words, and the same is told of it. What is good
// among them is issued, for its own key and identity.
func TestManyAsOneByOne(t *testing.T) {
	var told []Refusal
	w := newWorld(t, func(c *Config) { c.Refused = func(r Refusal) { told = append(told, r) } })
	view := podView("r2", "u2") // shop/web-1 is a pod
	w.feed.Set(view)
	ctx := testContext(t)
	one := w.asNode("one")
	_, csr := newKey(t)
	foreign := &url.URL{Scheme: "spiffe", Host: "mesh.example", Path: "/ns/shop/sa/db"}
	requests := []*nodev1.IssueRequest{
		{Workload: "shop/web-1", Uid: "u2", Csr: csr},
		{Workload: "shop/db-1", Csr: csr},                                   // on another node
		{Workload: "shop/none", Csr: csr},                                   // nowhere
		{Workload: "shop/web-1", Uid: "u1", Csr: csr},                       // another pod
		{Workload: "shop/web-1", Uid: "u2", Csr: csrNaming(t, foreign)},     // another identity
		{Workload: "shop/web-1", Uid: "u2", Csr: csrNaming(t, webID.URL())}, // its own
		{Workload: "shop/web-1", Uid: "u2", Csr: []byte("x")},               // no request
		{Workload: "dark/x-1", Csr: csr},                                    // takes no part
		{Workload: "shop/web-1", Uid: "u2", Csr: bytes.Repeat(csr, 100)},    // too large
		{},
		{Workload: "shop/web-1", Uid: "u2", Csr: csrNaming(t)},
	}
	type answered struct {
		code    codes.Code
		message string
	}
	var singly, together []answered
	for _, r := range requests {
		resp, err := one.Issue(ctx, r)
		if err == nil && leaf(t, resp.GetChain()).URIs[0].String() != webID.String() {
			t.Error("another identity")
		}
		singly = append(singly, answered{status.Code(err), status.Convert(err).Message()})
	}
	toldSingly := told
	told = nil
	before, err := w.authority.IssuanceLog().Entries(time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := one.IssueMany(ctx, &nodev1.IssueManyRequest{Requests: requests})
	if err != nil {
		t.Fatal(err)
	}
	issued := 0
	for i, r := range resp.GetResults() {
		together = append(together, answered{codes.Code(r.GetCode()), r.GetMessage()})
		if r.GetCode() != 0 {
			if len(r.GetChain()) > 0 {
				t.Errorf("%d: refused, with a certificate", i)
			}
			continue
		}
		issued++
		c := leaf(t, r.GetChain())
		want, err := x509.ParseCertificateRequest(requests[i].GetCsr())
		if err != nil || !bytes.Equal(c.RawSubjectPublicKeyInfo, want.RawSubjectPublicKeyInfo) || c.URIs[0].String() != webID.String() {
			t.Errorf("%d: not the certificate that was asked for: %v, %v", i, c.URIs, err)
		}
	}
	if !slices.Equal(singly, together) {
		t.Errorf("one by one %+v\ntogether %+v", singly, together)
	}
	if len(told) != len(requests)-3 || !slices.Equal(toldSingly, told) {
		t.Errorf("told one by one %+v\ntogether %+v", toldSingly, told)
	}
	after, err := w.authority.IssuanceLog().Entries(time.Time{})
	if err != nil || issued != 3 || len(after)-len(before) != issued {
		t.Errorf("%d certificates, %d entries, %v; want 3", issued, len(after)-len(before), err)
	}
	// Nor is anything issued before there is a state.
	w.feed.Set(nil)
	if resp, err = one.IssueMany(ctx, &nodev1.IssueManyRequest{Requests: requests[:1]}); err != nil || codes.Code(resp.GetResults()[0].GetCode()) != codes.Unavailable {
		t.Errorf("without a state: %v, %v", resp, err)
	}
}

// Defends: a batch counts as many times against the node's rate as it asks for
// certificates, whether or not it gets them.
func TestManyRate(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Rate, c.Burst = 1, 3 })
	ctx := testContext(t)
	_, csr := newKey(t)
	requests := []*nodev1.IssueRequest{{Workload: "shop/db-1", Csr: csr}}
	for range 4 {
		requests = append(requests, &nodev1.IssueRequest{Workload: "shop/web-1", Csr: csr})
	}
	one := w.asNode("one")
	resp, err := one.IssueMany(ctx, &nodev1.IssueManyRequest{Requests: requests})
	if err != nil {
		t.Fatal(err)
	}
	var got []codes.Code
	for _, r := range resp.GetResults() {
		got = append(got, codes.Code(r.GetCode()))
	}
	if want := []codes.Code{codes.PermissionDenied, codes.OK, codes.OK, codes.ResourceExhausted, codes.ResourceExhausted}; !slices.Equal(got, want) {
		t.Errorf("%v; want %v", got, want)
	}
	_, err = one.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Csr: csr})
	wantCode(t, err, codes.ResourceExhausted, "wait")
}

// Defends: a batch is bounded, and one that is not is refused before anything of it
// is looked at.
func TestManyBounds(t *testing.T) {
	var told []Refusal
	w := newWorld(t, func(c *Config) {
		c.Rate, c.Burst = 1, MaxMany+3
		c.Refused = func(r Refusal) { told = append(told, r) }
	})
	ctx := testContext(t)
	_, csr := newKey(t)
	one := w.asNode("one")
	many := func(n int) (*nodev1.IssueManyResponse, error) {
		requests := make([]*nodev1.IssueRequest, n)
		for i := range requests {
			requests[i] = &nodev1.IssueRequest{Workload: "shop/web-1", Csr: csr}
		}
		return one.IssueMany(ctx, &nodev1.IssueManyRequest{Requests: requests})
	}
	for _, n := range []int{0, MaxMany + 1} {
		_, err := many(n)
		wantCode(t, err, codes.InvalidArgument, "1 to 50")
	}
	if len(told) != 2 || told[0].Call != "IssueMany" || told[0].Node != "one" || told[0].Reason != ReasonRequest {
		t.Errorf("told %+v", told)
	}
	resp, err := many(MaxMany)
	if err != nil || len(resp.GetResults()) != MaxMany {
		t.Fatalf("%d results, %v", len(resp.GetResults()), err)
	}
	for i, r := range resp.GetResults() {
		if r.GetCode() != 0 {
			t.Errorf("%d: %s", i, r.GetMessage())
		}
	}
	if _, err := many(0); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
	_, err = many(0)
	wantCode(t, err, codes.ResourceExhausted, "wait") // calls that ask for nothing count, too
	_, err = w.server.IssueMany(context.Background(), &nodev1.IssueManyRequest{})
	wantCode(t, err, codes.Unauthenticated, "no node certificate")
}

// A failure of the authority is each certificate's.
func TestManyWhenAuthorityFails(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	one := w.asNode("one")
	_, csr := newKey(t)
	requests := []*nodev1.IssueRequest{{Workload: "shop/web-1", Csr: csr}, {Workload: "shop/db-1", Csr: csr}}
	if _, err := one.IssueMany(ctx, &nodev1.IssueManyRequest{Requests: requests}); err != nil { // connects
		t.Fatal(err)
	}
	w.authority.Close()
	resp, err := one.IssueMany(ctx, &nodev1.IssueManyRequest{Requests: requests})
	if err != nil {
		t.Fatal(err)
	}
	r := resp.GetResults()
	if codes.Code(r[0].GetCode()) != codes.Unavailable || len(r[0].GetChain()) > 0 || codes.Code(r[1].GetCode()) != codes.PermissionDenied {
		t.Errorf("%v", r)
	}
}

// What an agent hears of a control plane from before the call: that it does not know
// it, which is no refusal.
func TestManyOfOlderControlPlane(t *testing.T) {
	var told []Refusal
	w := newWorld(t, func(c *Config) { c.Refused = func(r Refusal) { told = append(told, r) } })
	older := nodev1.Node_ServiceDesc
	older.Methods = slices.DeleteFunc(slices.Clone(older.Methods), func(m grpc.MethodDesc) bool { return m.MethodName == "IssueMany" })
	w.socket = filepath.Join(t.TempDir(), "older.sock")
	listener, err := net.Listen("unix", w.socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(w.server.ServerOptions()...)
	server.RegisterService(&older, w.server)
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }()
	defer func() { server.Stop(); <-done }()
	one := w.asNode("one")
	_, csr := newKey(t)
	request := &nodev1.IssueRequest{Workload: "shop/web-1", Csr: csr}
	_, err = one.IssueMany(testContext(t), &nodev1.IssueManyRequest{Requests: []*nodev1.IssueRequest{request, request}})
	wantCode(t, err, codes.Unimplemented, "")
	if _, err := one.Issue(testContext(t), request); err != nil || len(told) != 0 {
		t.Errorf("%v; told %+v", err, told)
	}
}

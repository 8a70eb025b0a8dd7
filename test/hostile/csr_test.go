package hostile

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/mesh"
)

// mark is in the parts of requests that no certificate may carry on.
const mark = "hostile-mark"

// request is a PKCS#10 request for idWeb whose every part can be wrong.
type request struct {
	version    byte
	subject    []byte
	spki       []byte
	attributes [][]byte
	noAttrs    bool
	alg        []byte
	hash       crypto.Hash
	signer     crypto.Signer
	signature  func([]byte) []byte
}

func (r request) der() []byte {
	parts := [][]byte{tlv(2, []byte{r.version}), r.subject, r.spki}
	if !r.noAttrs {
		parts = append(parts, tlv(0xa0, r.attributes...))
	}
	info := seq(parts...)
	sig := signed(r.signer, r.hash, info)
	if r.signature != nil {
		sig = r.signature(sig)
	}
	return seq(info, r.alg, bits(sig))
}

// requestCase is a request, and whether one must be refused; another may be
// answered, with a certificate that has nothing of it but the key.
type requestCase struct {
	name   string
	der    []byte
	refuse bool
	key    crypto.PublicKey
}

// makeRequests makes every request anew.
func makeRequests(p *pki) (out []requestCase) {
	put := func(name string, refuse bool, change func(*request)) {
		r := request{subject: seq(), signer: p.keys.p256, alg: ecdsaSHA256}
		change(&r)
		if r.spki == nil {
			r.spki = spki(r.signer.Public())
		}
		out = append(out, requestCase{name, r.der(), refuse, r.signer.Public()})
	}
	wanting := func(name string, exts ...[]byte) {
		put(name, true, func(r *request) { r.attributes = [][]byte{extensionRequest(exts...)} })
	}

	// What is answered: these are ignored.
	put("plain", false, func(*request) {})
	put("without attributes", true, func(r *request) { r.noAttrs = true }) // they are not optional
	put("the identity itself", false, func(r *request) { r.attributes = [][]byte{extensionRequest(san(uri(idWeb)))} })
	put("of P-384", false, func(r *request) { r.signer = p.keys.p384 })
	put("of RSA 2048", false, func(r *request) { r.signer, r.alg = p.keys.rsa2048, rsaSHA256 })
	for name, subject := range map[string][]byte{
		"another's common name": commonName(idDB + mark), "the control plane's": commonName(idControl + mark), "an organization": rdn(oid(2, 5, 4, 10), 0x0c, mark), "NUL": commonName("web\x00" + mark),
		"a long one": commonName(strings.Repeat(mark, 500)), "a BMPString": rdn(oid(2, 5, 4, 3), 0x1e, mark+mark), "an address": rdn(oid(1, 2, 840, 113549, 1, 9, 1), 0x16, "a@"+mark), "an unknown attribute": rdn(oid(1, 2, 3, 4), 0x0c, mark),
	} {
		put("subject: "+name, false, func(r *request) { r.subject = subject })
	}

	// Names.
	for _, id := range aims {
		if id != idWeb {
			wanting("asks for "+id, san(uri(id)))
			wanting("asks for the identity and "+id, san(uri(idWeb), uri(id)))
			wanting("asks for "+id+" and the identity", san(uri(id), uri(idWeb)))
		}
		for _, s := range spellingsOf(id) {
			wanting("spelling of "+id+": "+s.name, san(uri(s.uri)))
		}
	}
	for i, s := range randomIDs(400) {
		if s != idWeb {
			wanting(fmt.Sprintf("stray %d %q", i, s), san(uri(s)))
		}
	}
	for name, names := range map[string][][]byte{
		"twice": {uri(idWeb), uri(idWeb)}, "a DNS name": {uri(idWeb), dns(mark)}, "a DNS name only": {dns(mark)}, "an address": {uri(idWeb), tlv(0x87, []byte{10, 0, 0, 1})}, "mail": {uri(idWeb), email("a@" + mark)},
		"a directory name": {uri(idWeb), tlv(0xa4, commonName(mark))}, "another kind": {uri(idWeb), tlv(0xa0, oid(1, 2, 3), tlv(0xa0, tlv(0x0c, []byte(mark))))}, "a registered ID": {uri(idWeb), tlv(0x88, []byte{42, 3})}, "an unknown kind": {uri(idWeb), tlv(0x89, []byte(mark))},
		"nothing": {}, "nothing and a URI": {uri(""), uri(idWeb)}, "constructed": {tlv(0xa6, []byte(idWeb))}, "a bare string": {tlv(0x16, []byte(idWeb))},
	} {
		wanting("names: "+name, san(names...))
	}
	wanting("names: the extension twice", san(uri(idWeb)), san(uri(idWeb)))
	wanting("names: the extension twice, differing", san(uri(idWeb)), san(uri(idDB)))
	wanting("names: trailing bytes", criticalExt(oidSAN, append(seq(uri(idWeb)), 5, 0)))

	// Powers.
	for n := range 1 << 7 {
		var numbers []int
		for bit := range 7 {
			if n>>bit&1 == 1 {
				numbers = append(numbers, bit)
			}
		}
		wanting(fmt.Sprintf("key usage %v", numbers), criticalExt(oidKeyUsage, keyUsage(numbers...)))
	}
	for name, e := range map[string][]byte{
		"CA": criticalExt(oidBasic, seq(derTrue)), "CA of path length 0": criticalExt(oidBasic, seq(derTrue, tlv(2, []byte{0}))), "CA, not critical": ext(oidBasic, seq(derTrue)), "no CA": criticalExt(oidBasic, seq()),
		"server": ext(oidEKU, seq(serverAuth)), "both purposes": ext(oidEKU, seq(serverAuth, clientAuth)), "any purpose": ext(oidEKU, seq(anyPurpose)), "code": ext(oidEKU, seq(codeSigning)),
		"name constraints": criticalExt(oidConstraints, seq(tlv(0xa0, seq(uri(trustDomain))))), "subject key identifier": ext(oidSKI, tlv(4, []byte(mark))), "authority key identifier": ext(oidAKI, seq(tlv(0x80, []byte(mark)))),
		"policies": ext(oidPolicies, seq(seq(oid(1, 2, 3)))), "unknown": ext(oid(1, 2, 3, 4), []byte(mark)), "unknown, critical": criticalExt(oid(1, 2, 3, 4), []byte(mark)), "issuer's names": ext(oid(2, 5, 29, 18), seq(uri(mark))),
	} {
		wanting("wants "+name, e)
		wanting("wants the identity and "+name, san(uri(idWeb)), e)
		wanting("wants "+name+" and the identity", e, san(uri(idWeb)))
	}
	attribute := func(id []byte, values ...[]byte) []byte { return seq(id, set(values...)) }
	for name, attrs := range map[string][][]byte{
		"a challenge": {attribute(oid(1, 2, 840, 113549, 1, 9, 7), tlv(0x0c, []byte(mark)))}, "unknown": {attribute(oid(1, 2, 3, 4), derNull)},
		"two requests": {extensionRequest(san(uri(idWeb))), extensionRequest(criticalExt(oidBasic, seq(derTrue)))}, "a request and another": {extensionRequest(san(uri(idWeb))), attribute(oid(1, 2, 3, 4), derNull)},
		"two values": {attribute(oidExtensionRequest, seq(san(uri(idWeb))), seq(criticalExt(oidBasic, seq(derTrue))))}, "no value": {attribute(oidExtensionRequest)}, "no attribute": {derNull}, "Microsoft's request": {attribute(oid(1, 3, 6, 1, 4, 1, 311, 2, 1, 14), seq(san(uri(idDB))))},
	} {
		put("attributes: "+name, true, func(r *request) { r.attributes = attrs })
	}

	// Keys and signatures.
	put("signed by another key", true, func(r *request) { r.spki, r.signer = spki(p.keys.p256.Public()), p.keys.other })
	put("SHA-1", true, func(r *request) { r.alg, r.hash = ecdsaSHA1, crypto.SHA1 })
	put("RSA with MD5", true, func(r *request) { r.signer, r.alg, r.hash = p.keys.rsa2048, rsaMD5, crypto.MD5 })
	put("RSA with SHA-1", true, func(r *request) { r.signer, r.alg, r.hash = p.keys.rsa2048, rsaSHA1, crypto.SHA1 })
	put("said to be RSA", true, func(r *request) { r.alg = rsaSHA256 })
	put("said to be SHA-384", true, func(r *request) { r.alg = ecdsaSHA384 })
	put("RSA 1024", true, func(r *request) { r.signer, r.alg = p.keys.rsa1024, rsaSHA256 })
	put("P-224", true, func(r *request) { r.signer = p.keys.p224 })
	put("P-521", true, func(r *request) { r.signer = p.keys.p521 })
	put("Ed25519", true, func(r *request) { r.signer, r.alg = p.keys.ed25519, seq(oid(1, 3, 101, 112)) })
	put("no signature", true, func(r *request) { r.signature = func([]byte) []byte { return nil } })
	put("zeros for a signature", true, func(r *request) { r.signature = func(s []byte) []byte { return make([]byte, len(s)) } })
	put("a signature and more", true, func(r *request) { r.signature = func(s []byte) []byte { return append(s, 0) } })
	for v := range 4 {
		put(fmt.Sprintf("version %d", v+1), true, func(r *request) { r.version = byte(v + 1) })
	}
	for _, c := range publicKeysOf(p) {
		put("key: "+c.name, true, func(r *request) { r.spki = c.spki })
	}

	// Encodings.
	good := request{subject: seq(), spki: spki(p.keys.p256.Public()), signer: p.keys.p256, alg: ecdsaSHA256, attributes: [][]byte{extensionRequest(san(uri(idWeb)))}}.der()
	bad := func(name string, der []byte) {
		out = append(out, requestCase{name, der, true, p.keys.p256.Public()})
	}
	bad("empty", nil)
	bad("trailing byte", append(bytes.Clone(good), 0))
	bad("a certificate", p.leaf(p.root, idWeb))
	bad("PEM", []byte("-----BEGIN CERTIFICATE REQUEST-----\n"))
	bad("too large", append(bytes.Clone(good), make([]byte, ca.MaxCSRBytes)...))
	for i := range 30 {
		bad(fmt.Sprintf("cut short at %d/30", i), good[:len(good)*i/30])
	}
	rng := rand.New(rand.NewPCG(seed, 2))
	for i := range 200 {
		changed := bytes.Clone(good)
		bit := rng.IntN(8 * len(good))
		changed[bit/8] ^= 1 << (bit % 8)
		bad(fmt.Sprintf("%d: bit %d changed", i, bit), changed)
	}
	slices.SortStableFunc(out, func(a, b requestCase) int { return strings.Compare(a.name, b.name) })
	seen := map[string]bool{}
	return slices.DeleteFunc(out, func(c requestCase) bool {
		was := seen[string(c.der)]
		seen[string(c.der)] = true
		return was
	})
}

var oidExtensionRequest = oid(1, 2, 840, 113549, 1, 9, 14)

func extensionRequest(exts ...[]byte) []byte { return seq(oidExtensionRequest, set(seq(exts...))) }

// controlWorld is a control plane that knows one workload, and a node that may
// ask for it.
type controlWorld struct {
	authority *ca.Authority
	server    *caserver.Server
	node      context.Context // of a call that the node makes
}

func newControlWorld(t *testing.T, p *pki) *controlWorld {
	t.Helper()
	dir := t.TempDir()
	td := spiffeid.RequireTrustDomainFromString(trustDomain)
	log := slog.New(slog.DiscardHandler)
	authority, err := ca.Open(ca.Options{Dir: filepath.Join(dir, "ca"), TrustDomain: td, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { authority.Close() })
	tokens, err := caserver.OpenTokens(filepath.Join(dir, "tokens"))
	if err != nil {
		t.Fatal(err)
	}
	feed := new(mesh.Feed)
	feed.Set(&mesh.View{Revision: "1", State: &mesh.State{TrustDomain: td, Namespaces: map[string]mesh.Mode{"shop": mesh.ModeEnforce}, Workloads: []mesh.Workload{
		{Namespace: "shop", Name: "web", ServiceAccount: "web", ID: spiffeid.RequireFromString(idWeb), Node: "n1"},
	}}})
	server, err := caserver.New(caserver.Config{Authority: authority, Feed: feed, Tokens: tokens, Log: log, Rate: 1e6, Burst: 1e6})
	if err != nil {
		t.Fatal(err)
	}
	csr := request{subject: seq(), spki: spki(p.keys.p256.Public()), signer: p.keys.p256, alg: ecdsaSHA256}.der()
	prepared, err := authority.Prepare(ca.Request{ID: spiffeid.RequireFromString(idNode), CSR: csr})
	if err != nil {
		t.Fatal(err)
	}
	issued, err := authority.Issue(prepared)
	if err != nil {
		t.Fatal(err)
	}
	certs, err := parse(issued.Chain)
	if err != nil {
		t.Fatal(err)
	}
	return &controlWorld{authority, server, peer.NewContext(t.Context(), &peer.Peer{
		AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: certs}},
	})}
}

// ask asks as the node does, through everything that stands before the server.
func (w *controlWorld) ask(csr []byte) ([][]byte, error) {
	out, err := w.server.UnaryInterceptor(w.node, &nodev1.IssueRequest{Workload: "shop/web", Csr: csr},
		&grpc.UnaryServerInfo{FullMethod: nodev1.Node_Issue_FullMethodName},
		func(ctx context.Context, req any) (any, error) {
			return w.server.Issue(ctx, req.(*nodev1.IssueRequest))
		})
	if err != nil {
		return nil, err
	}
	return out.(*nodev1.IssueResponse).GetChain(), nil
}

// TestRequests shows hostile certificate requests to the control plane, through
// the call by which a node asks on behalf of a workload. A request that wants
// anything is refused; and whatever a request says, nothing of it but the public
// key is in what is signed.
func TestRequests(t *testing.T) {
	p := newPKI(hour())
	w := newControlWorld(t, p)
	all := makeRequests(p)
	answered := 0
	for _, c := range all {
		chain, err := w.ask(c.der)
		if err != nil {
			if !c.refuse {
				t.Errorf("%s: refused: %v", c.name, err)
			}
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("%s: %v; want InvalidArgument", c.name, err)
			}
			if prepared, err := w.authority.Prepare(ca.Request{ID: spiffeid.RequireFromString(idWeb), CSR: c.der}); err == nil {
				t.Errorf("%s: the authority itself prepares %v", c.name, prepared)
			}
			continue
		}
		if c.refuse {
			t.Errorf("%s: answered; want a refusal", c.name)
		}
		answered++
		checkPure(t, &c, chain)
	}
	t.Logf("%d requests, %d answered", len(all), answered)
	if len(all) < 1000 || answered < 10 {
		t.Error("this shows little")
	}
}

// TestRequestsTogether shows the same requests in batches: each is answered as by
// itself, whatever stands beside it.
func TestRequestsTogether(t *testing.T) {
	p := newPKI(hour())
	w := newControlWorld(t, p)
	answered := 0
	for chunk := range slices.Chunk(makeRequests(p), caserver.MaxMany) {
		batch := new(nodev1.IssueManyRequest)
		for _, c := range chunk {
			batch.Requests = append(batch.Requests, &nodev1.IssueRequest{Workload: "shop/web", Csr: c.der})
		}
		out, err := w.server.UnaryInterceptor(w.node, batch, &grpc.UnaryServerInfo{FullMethod: nodev1.Node_IssueMany_FullMethodName},
			func(ctx context.Context, req any) (any, error) {
				return w.server.IssueMany(ctx, req.(*nodev1.IssueManyRequest))
			})
		if err != nil {
			t.Fatal(err)
		}
		results := out.(*nodev1.IssueManyResponse).GetResults()
		if len(results) != len(chunk) {
			t.Fatalf("%d results for %d requests", len(results), len(chunk))
		}
		for i, r := range results {
			c := &chunk[i]
			_, singly := w.ask(c.der)
			if said := status.Convert(singly); codes.Code(r.GetCode()) != said.Code() || r.GetMessage() != said.Message() {
				t.Errorf("%s: %s %q together, %v by itself", c.name, codes.Code(r.GetCode()), r.GetMessage(), singly)
			}
			if c.refuse != (r.GetCode() != 0) || c.refuse != (len(r.GetChain()) == 0) {
				t.Errorf("%s: code %d with a chain of %d; refuse: %t", c.name, r.GetCode(), len(r.GetChain()), c.refuse)
			}
			if r.GetCode() == 0 {
				answered++
				checkPure(t, c, r.GetChain())
			}
		}
	}
	if answered < 10 {
		t.Error("this shows little")
	}
}

// checkPure: the certificate is the authority's own work, but for the key.
func checkPure(t *testing.T, c *requestCase, chain [][]byte) {
	t.Helper()
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Errorf("%s: %v", c.name, err)
		return
	}
	if err := ca.Lint(leaf); err != nil {
		t.Errorf("%s: %v", c.name, err)
	}
	if !bytes.Equal(leaf.RawSubjectPublicKeyInfo, spki(c.key)) {
		t.Errorf("%s: the certificate is for another key", c.name)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != idWeb || len(leaf.Subject.Names) != 0 || len(leaf.Extensions) != 5 {
		t.Errorf("%s: names %v, subject %q, %d extensions", c.name, leaf.URIs, leaf.Subject, len(leaf.Extensions))
	}
	if bytes.Contains(leaf.Raw, []byte(mark)) {
		t.Errorf("%s: a part of the request is in the certificate", c.name)
	}
}

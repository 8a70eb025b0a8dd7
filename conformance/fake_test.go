package conformance

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"log"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
)

const (
	fakeDomain = "mesh.test"
	fakeWeb    = "spiffe://mesh.test/web"
	fakeDB     = "spiffe://mesh.test/db"
	fakeBundle = "spiffe://mesh.test/bundle"
	fakeOther  = "spiffe://partner.test"
)

// authority is a certificate with its key.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// fake is an implementation that does everything right, but for what a test
// changes before it starts.
type fake struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	t *testing.T

	root, middle, partner authority
	signer                *ecdsa.PrivateKey // of tokens
	ids                   []string
	life                  time.Duration // of certificates
	tokenLife             time.Duration
	updates               time.Duration // after which a stream gets its next message; 0: never

	// What tests change. Nil: nothing is.
	header     func(ctx context.Context, method string) error
	authorityT func(*x509.Certificate)
	leafT      func(*x509.Certificate)
	svid       func(*workload.X509SVID)
	svids      func(n int, m *workload.X509SVIDResponse) // n counts the messages of a stream
	roots      func(*workload.X509BundlesResponse)
	tokenParts func(header, claims map[string]any)
	token      func(*workload.JWTSVID)
	tokens     func(req *workload.JWTSVIDRequest, m *workload.JWTSVIDResponse, err error) (*workload.JWTSVIDResponse, error)
	keySet     func([]any) []any
	keySets    func(*workload.JWTBundlesResponse)
	validity   func(token, audience string, err error) error
	validated  func(*workload.ValidateJWTSVIDResponse)
	delay      time.Duration
	register   func(*grpc.Server)
	options    []grpc.ServerOption
	noReflect  bool
	stranger   func(method string) error
	document   func(map[string]any)
	endpoint   func(http.Handler) http.Handler
	endpointT  func(*x509.Certificate)
	tls        func(*tls.Config)
	edit       func(*Options)
}

func must[T any](t *testing.T, v T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func uris(t *testing.T, names ...string) (out []*url.URL) {
	t.Helper()
	for _, n := range names {
		u, err := url.Parse(n)
		out = append(out, must(t, u, err))
	}
	return out
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	return must(t, key, err)
}

// issue makes a certificate; without a signer it signs itself.
func (f *fake) issue(template *x509.Certificate, signer *authority) authority {
	f.t.Helper()
	key := newKey(f.t)
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore = time.Now().Add(-time.Minute)
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(time.Hour)
	}
	if signer == nil {
		signer = &authority{template, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer.cert, key.Public(), signer.key)
	cert, err := x509.ParseCertificate(must(f.t, der, err))
	return authority{must(f.t, cert, err), key}
}

func (f *fake) authority(name, id string, signer *authority) authority {
	f.t.Helper()
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, URIs: uris(f.t, id),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if f.authorityT != nil && signer != nil {
		f.authorityT(template)
	}
	return f.issue(template, signer)
}

func (f *fake) leaf(id string) authority {
	f.t.Helper()
	template := &x509.Certificate{
		URIs: uris(f.t, id), NotAfter: time.Now().Add(f.life), BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if f.leafT != nil && id != fakeBundle {
		f.leafT(template)
	}
	if f.endpointT != nil && id == fakeBundle {
		f.endpointT(template)
	}
	return f.issue(template, &f.middle)
}

func newFake(t *testing.T, change func(*fake)) *fake {
	t.Helper()
	f := &fake{t: t, ids: []string{fakeDB, fakeWeb}, life: time.Hour, tokenLife: 5 * time.Minute, signer: newKey(t)}
	if change != nil {
		change(f)
	}
	f.root = f.authority("root", "spiffe://"+fakeDomain, nil)
	f.middle = f.authority("middle", "spiffe://"+fakeDomain, &f.root)
	f.partner = f.authority("partner", fakeOther, nil)
	return f
}

// run serves the fake, and has the suite look at it.
func (f *fake) run() *Report {
	f.t.Helper()
	web := f.web()
	o := Options{
		Endpoint: f.serve(false), Stranger: f.serve(true), TrustDomain: fakeDomain, IDs: f.ids, Audience: "ledger",
		Federation: &Federation{URL: web.URL + "/bundle", SPIFFEID: fakeBundle}, FirstMessage: 500 * time.Millisecond, Timeout: 5 * time.Second,
	}
	if f.edit != nil {
		f.edit(&o)
	}
	report, err := Run(f.t.Context(), o)
	return must(f.t, report, err)
}

// serve starts a Workload API and returns its address; with stranger, nobody has an
// identity there.
func (f *fake) serve(stranger bool) string {
	f.t.Helper()
	path := filepath.Join(f.t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	must(f.t, l, err)
	admit := func(ctx context.Context, method string) error {
		if strings.HasPrefix(method, "/grpc.reflection.") {
			return nil
		}
		if f.header != nil {
			if err := f.header(ctx, method); err != nil {
				return err
			}
		} else if err := wantsHeader(ctx, method); err != nil {
			return err
		}
		if stranger && f.stranger != nil {
			return f.stranger(method)
		}
		if stranger {
			return status.Error(codes.PermissionDenied, "no identity")
		}
		return nil
	}
	srv := grpc.NewServer(append(f.options,
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := admit(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := admit(ss.Context(), info.FullMethod); err != nil {
				return err
			}
			return next(srv, ss)
		}))...)
	if f.register != nil {
		f.register(srv)
	} else {
		workload.RegisterSpiffeWorkloadAPIServer(srv, f)
	}
	if !f.noReflect {
		reflection.Register(srv)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	f.t.Cleanup(func() {
		srv.Stop()
		if err := <-done; err != nil {
			f.t.Error(err)
		}
	})
	return "unix://" + path
}

func wantsHeader(ctx context.Context, _ string) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(header); len(v) != 1 || v[0] != "true" {
		return status.Error(codes.InvalidArgument, "the header is missing")
	}
	return nil
}

func concat(certs ...*x509.Certificate) (out []byte) {
	for _, c := range certs {
		out = append(out, c.Raw...)
	}
	return out
}

func (f *fake) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	time.Sleep(f.delay)
	for n := 1; ; n++ {
		m := &workload.X509SVIDResponse{FederatedBundles: map[string][]byte{fakeOther: concat(f.partner.cert)}}
		for _, id := range f.ids {
			l := f.leaf(id)
			key, err := x509.MarshalPKCS8PrivateKey(l.key)
			svid := &workload.X509SVID{SpiffeId: id, X509Svid: concat(l.cert, f.middle.cert), X509SvidKey: must(f.t, key, err), Bundle: concat(f.root.cert), Hint: "of " + id}
			if f.svid != nil {
				f.svid(svid)
			}
			m.Svids = append(m.Svids, svid)
		}
		if f.svids != nil {
			f.svids(n, m)
		}
		if err := stream.Send(m); err != nil {
			return err
		}
		var next <-chan time.Time
		if f.updates > 0 {
			next = time.After(f.updates)
		}
		select {
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		case <-next:
		}
	}
}

func (f *fake) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	m := &workload.X509BundlesResponse{Bundles: map[string][]byte{"spiffe://" + fakeDomain: concat(f.root.cert), fakeOther: concat(f.partner.cert)}}
	if f.roots != nil {
		f.roots(m)
	}
	if err := stream.Send(m); err != nil {
		return err
	}
	<-stream.Context().Done()
	return status.FromContextError(stream.Context().Err()).Err()
}

// sign makes a token.
func (f *fake) sign(header, claims map[string]any) string {
	text := part(header) + "." + part(claims)
	digest := sha256.Sum256([]byte(text))
	r, v, err := ecdsa.Sign(rand.Reader, f.signer, digest[:])
	must(f.t, r, err)
	return text + "." + base64.RawURLEncoding.EncodeToString(append(r.FillBytes(make([]byte, 32)), v.FillBytes(make([]byte, 32))...))
}

func (f *fake) FetchJWTSVID(_ context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	m, err := f.mint(req)
	if f.tokens != nil {
		return f.tokens(req, m, err)
	}
	return m, err
}

func (f *fake) mint(req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if len(req.GetAudience()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "audience")
	}
	ids := f.ids
	if id := req.GetSpiffeId(); id != "" {
		if !slices.Contains(f.ids, id) {
			return nil, status.Error(codes.PermissionDenied, "not yours")
		}
		ids = []string{id}
	}
	m := &workload.JWTSVIDResponse{}
	for _, id := range ids {
		header := map[string]any{"alg": "ES256", "kid": "k1", "typ": "JWT"}
		claims := map[string]any{"sub": id, "aud": req.GetAudience(), "exp": time.Now().Add(f.tokenLife).Unix(), "iat": time.Now().Unix()}
		if f.tokenParts != nil {
			f.tokenParts(header, claims)
		}
		svid := &workload.JWTSVID{SpiffeId: id, Svid: f.sign(header, claims), Hint: "of " + id}
		if f.token != nil {
			f.token(svid)
		}
		m.Svids = append(m.Svids, svid)
	}
	return m, nil
}

// jwkOf is a public key as JSON.
func jwkOf(key *ecdsa.PublicKey) map[string]any {
	raw, _ := key.Bytes()
	return map[string]any{"kty": "EC", "crv": "P-256",
		"x": base64.RawURLEncoding.EncodeToString(raw[1:33]), "y": base64.RawURLEncoding.EncodeToString(raw[33:])}
}

func (f *fake) jwtKey() map[string]any {
	k := jwkOf(&f.signer.PublicKey)
	maps.Copy(k, map[string]any{"use": "jwt-svid", "kid": "k1"})
	return k
}

func (f *fake) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	keys := []any{f.jwtKey()}
	if f.keySet != nil {
		keys = f.keySet(keys)
	}
	own, err := json.Marshal(map[string]any{"keys": keys})
	other, errOther := json.Marshal(map[string]any{"keys": []any{}})
	m := &workload.JWTBundlesResponse{Bundles: map[string][]byte{"spiffe://" + fakeDomain: must(f.t, own, err), fakeOther: must(f.t, other, errOther)}}
	if f.keySets != nil {
		f.keySets(m)
	}
	if err := stream.Send(m); err != nil {
		return err
	}
	<-stream.Context().Done()
	return status.FromContextError(stream.Context().Err()).Err()
}

// judge is the verdict of a validator that is right.
func (f *fake) judge(text, audience string) error {
	t, err := parseToken(text)
	switch {
	case audience == "" || text == "":
		return status.Error(codes.InvalidArgument, "empty")
	case err != nil:
		return status.Error(codes.InvalidArgument, err.Error())
	case t.header["alg"] != "ES256":
		return status.Error(codes.InvalidArgument, "alg")
	case t.header["kid"] != "k1" || !strings.HasPrefix(t.textOf(t.claims, "sub"), "spiffe://"+fakeDomain+"/"):
		return status.Error(codes.InvalidArgument, "nobody knows who made it")
	case !slices.Contains(t.audience(), audience):
		return status.Error(codes.InvalidArgument, "aud")
	}
	if err := t.signedBy(&f.signer.PublicKey); err != nil {
		return status.Error(codes.InvalidArgument, "signature: "+err.Error())
	}
	if at, err := t.expiry(); err == nil && !at.After(time.Now()) {
		return status.Error(codes.InvalidArgument, "expired")
	}
	return nil
}

func (f *fake) ValidateJWTSVID(_ context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	err := f.judge(req.GetSvid(), req.GetAudience())
	if f.validity != nil {
		err = f.validity(req.GetSvid(), req.GetAudience(), err)
	}
	if err != nil {
		return nil, err
	}
	m := &workload.ValidateJWTSVIDResponse{SpiffeId: fakeWeb}
	if t, err := parseToken(req.GetSvid()); err == nil {
		m.SpiffeId = t.textOf(t.claims, "sub")
		claims := map[string]any{"exp": float64(0)}
		for name, v := range t.claims {
			if _, number := v.(json.Number); !number {
				claims[name] = v
			}
		}
		m.Claims, err = structpb.NewStruct(claims)
		must(f.t, m, err)
	}
	if f.validated != nil {
		f.validated(m)
	}
	return m, nil
}

// web starts a bundle endpoint.
func (f *fake) web() *httptest.Server {
	f.t.Helper()
	doc := func() []byte {
		x := jwkOf(f.root.cert.PublicKey.(*ecdsa.PublicKey))
		maps.Copy(x, map[string]any{"use": "x509-svid", "x5c": []any{base64.StdEncoding.EncodeToString(f.root.cert.Raw)}})
		set := map[string]any{"keys": []any{x, f.jwtKey()}, "spiffe_sequence": 7, "spiffe_refresh_hint": 300}
		if f.document != nil {
			f.document(set)
		}
		raw, err := json.Marshal(set)
		return must(f.t, raw, err)
	}
	var handler http.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(doc())
	})
	if f.endpoint != nil {
		handler = f.endpoint(handler)
	}
	l := f.leaf(fakeBundle)
	srv := httptest.NewUnstartedServer(handler)
	srv.Config.ErrorLog = log.New(f.t.Output(), "", 0)
	srv.TLS = &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{{Certificate: [][]byte{l.cert.Raw, f.middle.cert.Raw}, PrivateKey: crypto.Signer(l.key)}}}
	if f.tls != nil {
		f.tls(srv.TLS)
	}
	srv.StartTLS()
	f.t.Cleanup(srv.Close)
	return srv
}

package conformance

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// failed lists the checks that failed.
func failed(r *Report) (out []string) {
	for _, c := range r.Results {
		if c.Verdict == Fail {
			out = append(out, c.ID)
		}
	}
	return out
}

// passes expects a report without a failure, and nothing that was not looked at but
// what is named.
func passes(t *testing.T, r *Report, not ...string) {
	t.Helper()
	for _, c := range r.Results {
		want := Pass
		if slices.Contains(not, c.ID) {
			want = NotApplicable
		}
		if c.Verdict != want || c.Reason == "" {
			t.Errorf("%s: %s (%s), want %s", c.ID, c.Verdict, c.Reason, want)
		}
	}
}

// An implementation that does everything right passes every check; nothing is passed
// over that could be looked at.
func TestGood(t *testing.T) {
	r := newFake(t, func(f *fake) {
		f.updates, f.tokenLife = 100*time.Millisecond, 8*time.Second
		f.edit = func(o *Options) { o.Wait = 20 * time.Second }
	}).run()
	passes(t, r)
	if got := r.Count(Pass, Must) + r.Count(Pass, Should); got != len(Checks()) {
		t.Errorf("%d passed, of %d", got, len(Checks()))
	}
}

// What the options do not give is not judged, and said to be so.
func TestWithout(t *testing.T) {
	waits := []string{"update", "full-state", "validate-expired"}
	var jwt, federation []string
	for _, c := range Checks() {
		switch {
		case strings.HasPrefix(c.ID, "jwt-"), strings.HasPrefix(c.ID, "validate-") && c.ID != "validate-expired":
			jwt = append(jwt, c.ID)
		case strings.HasPrefix(c.ID, "federation-"), strings.HasPrefix(c.ID, "bundle-"):
			federation = append(federation, c.ID)
		}
	}
	for name, c := range map[string]struct {
		edit func(*Options)
		not  []string
	}{
		"patience":           {func(*Options) {}, waits},
		"the JWT profile":    {func(o *Options) { o.NoJWT = true }, slices.Concat(waits, jwt)},
		"a stranger":         {func(o *Options) { o.Stranger = "" }, append(waits, "stranger")},
		"a bundle endpoint":  {func(o *Options) { o.Federation = nil }, slices.Concat(waits, federation)},
		"what is to be seen": {func(o *Options) { o.IDs, o.TrustDomain = nil, "" }, append(waits, "x509-every-identity", "x509-domain")},
	} {
		t.Run(name, func(t *testing.T) {
			passes(t, newFake(t, func(f *fake) { f.edit = c.edit }).run(), c.not...)
		})
	}
}

// A bundle is the same in whatever order its keys are.
func TestOrderOfKeys(t *testing.T) {
	n := 0
	passes(t, newFake(t, func(f *fake) {
		f.document = func(set map[string]any) {
			if n++; n%2 == 0 {
				slices.Reverse(set["keys"].([]any))
			}
		}
	}).run(), "update", "full-state", "validate-expired")
}

// The half that a caller without an identity can look at.
func TestStrangerAlone(t *testing.T) {
	r := newFake(t, func(f *fake) { f.edit = func(o *Options) { o.Endpoint, o.Federation = "", nil } }).run()
	for _, c := range r.Results {
		if want := map[bool]Verdict{true: Pass, false: NotApplicable}[c.ID == "stranger"]; c.Verdict != want {
			t.Errorf("%s: %s (%s), want %s", c.ID, c.Verdict, c.Reason, want)
		}
	}
}

// A certificate of the web's authorities is judged by the host's name.
func TestWebProfile(t *testing.T) {
	web := func(roots bool) func(*fake) {
		return func(f *fake) {
			f.endpointT = func(c *x509.Certificate) { c.DNSNames, c.URIs = []string{"localhost"}, nil }
			f.edit = func(o *Options) {
				u, err := url.Parse(o.Federation.URL)
				if err != nil {
					t.Fatal(err)
				}
				o.Federation = &Federation{URL: "https://localhost:" + u.Port() + "/bundle"}
				if roots {
					o.Federation.Roots = []*x509.Certificate{f.root.cert}
				}
			}
		}
	}
	passes(t, newFake(t, web(true)).run(), "update", "full-state", "validate-expired")
	if got := failed(newFake(t, web(false)).run()); !slices.Equal(got, []string{"federation-certificate"}) {
		t.Errorf("an authority that the machine does not trust: %q fail", got)
	}
}

// Options that make no sense, and endpoints that are not there, are no findings.
func TestOptions(t *testing.T) {
	for want, o := range map[string]Options{
		"nothing to look at": {},
		"neither unix":       {Endpoint: "/run/agent.sock"},
		"localhost":          {Endpoint: "tcp://localhost:8081"},
		"with#fragment":      {Endpoint: "unix:///run/agent.sock#with#fragment"},
		"no such file":       {Endpoint: "unix:///no/such/agent.sock"},
		"TrustDomain":        {Endpoint: "unix:///run/agent.sock", TrustDomain: "Mesh.test"},
		"IDs":                {Endpoint: "unix:///run/agent.sock", IDs: []string{"spiffe://mesh.test"}},
		"URL":                {Federation: &Federation{}},
		"SPIFFEID":           {Federation: &Federation{URL: "https://mesh.test/", SPIFFEID: "spiffe://mesh.test"}},
		"negative":           {Endpoint: "unix:///run/agent.sock", Wait: -1},
	} {
		if r, err := Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), want) || r != nil {
			t.Errorf("%+v: %v, %v, want an error that says %q", o, r, err, want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	f := newFake(t, nil)
	address := f.serve(false)
	if _, err := Run(ctx, Options{Endpoint: address, Progress: func(Check) { cancel() }}); err != context.Canceled {
		t.Errorf("ended in the middle: %v", err)
	}
}

// TestBroken: for each check there is a server that does that one thing wrong, and
// exactly that check fails. Without this a check could pass whatever is served.
func TestBroken(t *testing.T) {
	covered := map[string]bool{}
	for _, b := range breaches {
		t.Run(b.id+"/"+b.what, func(t *testing.T) {
			if b.waits {
				t.Parallel()
			}
			r := newFake(t, b.change).run()
			if got := failed(r); !slices.Equal(got, []string{b.id}) {
				t.Errorf("%q fail", got)
			}
			for _, c := range r.Results {
				if c.Verdict == Fail || t.Failed() && c.Verdict != Pass {
					t.Logf("%s: %s (%s)", c.ID, c.Verdict, c.Reason)
				}
			}
		})
		covered[b.id] = true
	}
	seen := map[string]bool{}
	for _, c := range Checks() {
		if !covered[c.ID] {
			t.Errorf("%s: no server breaks it", c.ID)
		}
		if seen[c.ID] || c.Document == "" || c.Section == "" || c.Demand == "" || c.Level != Must && c.Level != Should {
			t.Errorf("%+v: two have this ID, or something is missing", c)
		}
		seen[c.ID] = true
	}
}

// breach is a server that does one thing wrong.
type breach struct {
	id, what string
	change   func(*fake)
	waits    bool
}

func svidOf(edit func(*workload.X509SVID)) func(*fake) { return func(f *fake) { f.svid = edit } }

func leafOf(edit func(*x509.Certificate)) func(*fake) { return func(f *fake) { f.leafT = edit } }

func middleOf(edit func(*x509.Certificate)) func(*fake) { return func(f *fake) { f.authorityT = edit } }

func tokenOf(edit func(header, claims map[string]any)) func(*fake) {
	return func(f *fake) { f.tokenParts = edit }
}

func keysOf(edit func([]any) []any) func(*fake) { return func(f *fake) { f.keySet = edit } }

func key0(edit func(map[string]any)) func(*fake) {
	return keysOf(func(keys []any) []any { edit(keys[0].(map[string]any)); return keys })
}

func docOf(edit func(map[string]any)) func(*fake) { return func(f *fake) { f.document = edit } }

// docKey edits the key of X509-SVIDs (0) or of JWT-SVIDs (1).
func docKey(i int, edit func(map[string]any)) func(*fake) {
	return docOf(func(set map[string]any) { edit(set["keys"].([]any)[i].(map[string]any)) })
}

func web(serve func(w http.ResponseWriter, r *http.Request, next http.Handler)) func(*fake) {
	return func(f *fake) {
		f.endpoint = func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { serve(w, r, next) })
		}
	}
}

// takes has the validator take what a question says.
func takes(ask func(*token) bool) func(*fake) {
	return func(f *fake) {
		f.validity = func(text, _ string, err error) error {
			if t, parsed := parseToken(text); parsed == nil && ask(t) {
				return nil
			}
			return err
		}
	}
}

// headers has the header judged in another way.
func headers(ask func(value []string) bool, code codes.Code) func(*fake) {
	return func(f *fake) {
		f.header = func(ctx context.Context, _ string) error {
			md, _ := metadata.FromIncomingContext(ctx)
			if ask(md.Get(header)) {
				return nil
			}
			return status.Error(code, "the header")
		}
	}
}

// extended is the service with a method more.
func extended(f *fake) {
	f.register = func(srv *grpc.Server) {
		desc := workload.SpiffeWorkloadAPI_ServiceDesc
		desc.Methods = append(slices.Clone(desc.Methods), grpc.MethodDesc{MethodName: "Attest", Handler: func(any, context.Context, func(any) error, grpc.UnaryServerInterceptor) (any, error) {
			return &workload.JWTBundlesRequest{}, nil
		}})
		srv.RegisterService(&desc, f)
	}
}

var breaches = []breach{
	{"endpoint-open", "TLS", func(f *fake) {
		f.root = f.authority("root", "spiffe://"+fakeDomain, nil)
		cert := f.issue(&x509.Certificate{DNSNames: []string{"localhost"}}, &f.root)
		f.options = append(f.options, grpc.Creds(credentials.NewServerTLSFromCert(&tls.Certificate{Certificate: [][]byte{cert.cert.Raw}, PrivateKey: cert.key})))
		f.edit = func(o *Options) { o.Timeout, o.Federation, o.Stranger = time.Second, nil, "" }
	}, false},
	{"endpoint-open", "a password", func(f *fake) {
		f.header = func(context.Context, string) error { return status.Error(codes.Unauthenticated, "who are you") }
		f.edit = func(o *Options) { o.Federation, o.Stranger = nil, "" }
	}, false},
	{"header-missing", "it is not looked at", headers(func(v []string) bool { return len(v) == 0 || v[0] == "true" }, codes.InvalidArgument), false},
	{"header-missing", "another code", headers(func(v []string) bool { return len(v) == 1 && v[0] == "true" }, codes.PermissionDenied), false},
	{"header-missing", "one method", func(f *fake) {
		f.header = func(ctx context.Context, method string) error {
			if strings.HasSuffix(method, "FetchJWTBundles") && len(metadata.ValueFromIncomingContext(ctx, header)) == 0 {
				return nil
			}
			return wantsHeader(ctx, method)
		}
	}, false},
	{"header-value", "any case", headers(func(v []string) bool { return len(v) == 1 && strings.EqualFold(v[0], "true") }, codes.InvalidArgument), false},
	{"header-value", "any value", headers(func(v []string) bool { return len(v) == 1 }, codes.InvalidArgument), false},
	{"reflection", "none", func(f *fake) { f.noReflect = true }, false},
	{"no-method-beyond", "shown by reflection", extended, false},
	{"no-method-beyond", "everything is answered", func(f *fake) {
		f.options = append(f.options, grpc.UnknownServiceHandler(func(_ any, ss grpc.ServerStream) error {
			if method, _ := grpc.MethodFromServerStream(ss); !strings.HasPrefix(method, "/SpiffeWorkloadAPI/") {
				return status.Error(codes.Unimplemented, "unknown")
			}
			return ss.SendMsg(&workload.JWTBundlesRequest{})
		}))
	}, false},
	{"no-field-beyond", "in an answer", svidOf(func(s *workload.X509SVID) { s.ProtoReflect().SetUnknown([]byte{0xa0, 0x06, 1}) }), false},
	{"wit-unimplemented", "another code", func(f *fake) {
		f.header = func(ctx context.Context, method string) error {
			if strings.HasSuffix(method, "FetchWITSVID") {
				return status.Error(codes.Internal, "no")
			}
			return wantsHeader(ctx, method)
		}
	}, false},
	{"wit-unimplemented", "one of the two", func(f *fake) {
		f.header = func(ctx context.Context, method string) error {
			if strings.HasSuffix(method, "FetchWITBundles") {
				return status.Error(codes.PermissionDenied, "no")
			}
			return wantsHeader(ctx, method)
		}
	}, false},
	{"first-message", "a second late", func(f *fake) { f.delay = time.Second }, true},

	{"x509-served", "an empty message", func(f *fake) { f.svids = func(_ int, m *workload.X509SVIDResponse) { m.Svids = nil } }, false},
	{"x509-served", "refused", func(f *fake) {
		f.header = func(ctx context.Context, method string) error {
			if strings.HasSuffix(method, "FetchX509SVID") && wantsHeader(ctx, method) == nil {
				return status.Error(codes.PermissionDenied, "no identity")
			}
			return wantsHeader(ctx, method)
		}
	}, false},
	{"x509-every-identity", "one is left out", func(f *fake) {
		f.svids = func(_ int, m *workload.X509SVIDResponse) { m.Svids = m.Svids[:1] }
	}, false},
	{"x509-fields", "no bundle", svidOf(func(s *workload.X509SVID) { s.Bundle = nil }), false},
	{"x509-fields", "no key", svidOf(func(s *workload.X509SVID) { s.X509SvidKey = nil }), false},
	{"x509-hint", "twice", svidOf(func(s *workload.X509SVID) { s.Hint = "internal" }), false},
	{"x509-chain-der", "PEM", svidOf(func(s *workload.X509SVID) {
		s.X509Svid = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.X509Svid})
	}), false},
	{"x509-chain-der", "cut short", svidOf(func(s *workload.X509SVID) { s.X509Svid = s.X509Svid[:len(s.X509Svid)-1] }), false},
	{"x509-chain-order", "the root of another", func(f *fake) {
		f.svid = func(s *workload.X509SVID) { s.X509Svid = append(s.X509Svid, f.partner.cert.Raw...) }
	}, false},
	{"x509-key-form", "PEM", svidOf(func(s *workload.X509SVID) {
		s.X509SvidKey = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: s.X509SvidKey})
	}), false},
	{"x509-key-form", "SEC 1", func(f *fake) {
		f.svid = func(s *workload.X509SVID) {
			der, err := x509.MarshalECPrivateKey(f.signer)
			s.X509SvidKey = must(f.t, der, err)
		}
	}, false},
	{"x509-key-match", "another key", func(f *fake) {
		f.svid = func(s *workload.X509SVID) {
			der, err := x509.MarshalPKCS8PrivateKey(f.signer)
			s.X509SvidKey = must(f.t, der, err)
		}
	}, false},
	{"x509-bundle-der", "PEM", svidOf(func(s *workload.X509SVID) {
		s.Bundle = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Bundle})
	}), false},
	{"x509-one-uri", "two", leafOf(func(c *x509.Certificate) {
		c.URIs = append(c.URIs, &url.URL{Scheme: "https", Host: "mesh.test"})
	}), false},
	{"x509-one-uri", "none", leafOf(func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"web"} }), false},
	{"x509-id-form", "a slash at the end", func(f *fake) {
		f.leafT = func(c *x509.Certificate) { c.URIs[0].Path += "/" }
		f.svid = func(s *workload.X509SVID) { s.SpiffeId += "/" }
		f.edit = func(o *Options) { o.IDs, o.NoJWT = nil, true }
	}, false},
	{"x509-id-path", "the trust domain's", func(f *fake) {
		f.ids = []string{"spiffe://mesh.test"}
		f.edit = func(o *Options) { o.IDs, o.NoJWT = nil, true }
	}, false},
	{"x509-id-match", "another name", leafOf(func(c *x509.Certificate) { c.URIs[0].Path += "-2" }), false},
	{"x509-domain", "another", func(f *fake) {
		f.ids = []string{"spiffe://mesh.test/web", "spiffe://partner.test/web"}
		f.edit = func(o *Options) { o.NoJWT = true }
	}, false},
	{"x509-san-critical", "it is not", func(f *fake) {
		f.leafT = func(c *x509.Certificate) {
			// A name in raw form is not critical by itself.
			raw := append([]byte{0x30, byte(2 + len(c.URIs[0].String())), 0x86, byte(len(c.URIs[0].String()))}, c.URIs[0].String()...)
			c.ExtraExtensions, c.URIs = append(c.ExtraExtensions, extensionOf(oidSAN, raw)), nil
		}
	}, false},
	{"x509-leaf-ca", "an authority", leafOf(func(c *x509.Certificate) { c.IsCA = true }), false},
	{"x509-key-usage", "none", leafOf(func(c *x509.Certificate) { c.KeyUsage = 0 }), false},
	{"x509-key-usage", "not critical", leafOf(func(c *x509.Certificate) {
		c.KeyUsage = 0
		c.ExtraExtensions = append(c.ExtraExtensions, extensionOf(oidKeyUsage, []byte{3, 2, 7, 0x80}))
	}), false},
	{"x509-key-usage-leaf", "no signatures", leafOf(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), false},
	{"x509-key-usage-leaf", "revocation lists", leafOf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }), false},
	{"x509-purposes", "for servers only", leafOf(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), false},
	{"x509-purposes-there", "none", leafOf(func(c *x509.Certificate) { c.ExtKeyUsage = nil }), false},
	{"x509-verifies", "another root", func(f *fake) {
		f.svid = func(s *workload.X509SVID) { s.Bundle = concat(f.authority("another", "spiffe://mesh.test", nil).cert) }
	}, false},
	{"x509-verifies", "expired", leafOf(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-2 * time.Second) }), false},
	{"x509-verifies", "the intermediate is left out", func(f *fake) {
		f.svid = func(s *workload.X509SVID) { s.X509Svid = s.X509Svid[:len(s.X509Svid)-len(f.middle.cert.Raw)] }
	}, false},

	{"authority-ca", "a root that is none", func(f *fake) {
		f.svid = func(s *workload.X509SVID) {
			extra := f.issue(&x509.Certificate{URIs: uris(f.t, "spiffe://mesh.test"), KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true}, nil)
			s.Bundle = append(s.Bundle, extra.cert.Raw...)
		}
	}, false},
	{"authority-key-usage", "it signs no certificates", func(f *fake) {
		f.svid = func(s *workload.X509SVID) {
			extra := f.issue(&x509.Certificate{URIs: uris(f.t, "spiffe://mesh.test"), KeyUsage: x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true}, nil)
			s.Bundle = append(s.Bundle, extra.cert.Raw...)
		}
	}, false},
	{"authority-id", "a path", middleOf(func(c *x509.Certificate) { c.URIs[0].Path = "/middle" }), false},
	{"authority-svid", "a root without", func(f *fake) {
		f.svid = func(s *workload.X509SVID) {
			extra := f.issue(&x509.Certificate{KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true}, nil)
			s.Bundle = append(s.Bundle, extra.cert.Raw...)
		}
	}, false},
	{"x509-bundles-own", "others only", func(f *fake) {
		f.roots = func(m *workload.X509BundlesResponse) { delete(m.Bundles, "spiffe://mesh.test") }
	}, false},
	{"x509-bundles-own", "another root", func(f *fake) {
		f.roots = func(m *workload.X509BundlesResponse) { m.Bundles["spiffe://mesh.test"] = concat(f.partner.cert) }
		f.edit = func(o *Options) { o.Federation = nil }
	}, false},
	{"x509-bundles-names", "names without scheme", func(f *fake) {
		f.roots = func(m *workload.X509BundlesResponse) {
			m.Bundles["mesh.test"] = m.Bundles["spiffe://mesh.test"]
			delete(m.Bundles, "spiffe://mesh.test")
		}
		f.edit = func(o *Options) { o.Federation = nil }
	}, false},
	{"x509-bundles-names", "beside the certificates", func(f *fake) {
		f.svids = func(_ int, m *workload.X509SVIDResponse) {
			m.FederatedBundles["spiffe://partner.test/web"] = concat(f.partner.cert)
		}
	}, false},
	{"x509-bundles-der", "PEM", func(f *fake) {
		f.roots = func(m *workload.X509BundlesResponse) {
			m.Bundles[fakeOther] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.Bundles[fakeOther]})
		}
	}, false},

	{"jwt-served", "an empty message", func(f *fake) {
		f.tokens = func(*workload.JWTSVIDRequest, *workload.JWTSVIDResponse, error) (*workload.JWTSVIDResponse, error) {
			return &workload.JWTSVIDResponse{}, nil
		}
	}, false},
	{"jwt-audience-mandatory", "one is made up", func(f *fake) {
		f.tokens = func(req *workload.JWTSVIDRequest, m *workload.JWTSVIDResponse, err error) (*workload.JWTSVIDResponse, error) {
			if len(req.GetAudience()) == 0 {
				return f.mint(&workload.JWTSVIDRequest{Audience: []string{"everybody"}})
			}
			return m, err
		}
	}, false},
	{"jwt-every-identity", "the first only", func(f *fake) {
		f.tokens = func(_ *workload.JWTSVIDRequest, m *workload.JWTSVIDResponse, err error) (*workload.JWTSVIDResponse, error) {
			if len(m.GetSvids()) > 1 {
				m.Svids = m.Svids[:1]
			}
			return m, err
		}
	}, false},
	{"jwt-one-identity", "all of them", func(f *fake) {
		f.tokens = func(req *workload.JWTSVIDRequest, m *workload.JWTSVIDResponse, err error) (*workload.JWTSVIDResponse, error) {
			if err == nil && req.GetSpiffeId() != "" {
				return f.mint(&workload.JWTSVIDRequest{Audience: req.GetAudience()})
			}
			return m, err
		}
	}, false},
	{"jwt-not-mine", "whatever is asked", func(f *fake) {
		f.tokens = func(req *workload.JWTSVIDRequest, m *workload.JWTSVIDResponse, err error) (*workload.JWTSVIDResponse, error) {
			if status.Code(err) == codes.PermissionDenied {
				return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{SpiffeId: req.GetSpiffeId(), Svid: "x"}}}, nil
			}
			return m, err
		}
	}, false},
	{"jwt-hint", "twice", func(f *fake) { f.token = func(s *workload.JWTSVID) { s.Hint = "internal" } }, false},
	{"jwt-compact", "padded", func(f *fake) {
		f.token = func(s *workload.JWTSVID) {
			p := strings.Split(s.Svid, ".")
			raw, err := base64.RawURLEncoding.DecodeString(p[2])
			s.Svid = p[0] + "." + p[1] + "." + base64.URLEncoding.EncodeToString(must(f.t, raw, err))
		}
	}, false},
	{"jwt-compact", "JSON", func(f *fake) { f.token = func(s *workload.JWTSVID) { s.Svid = `{"payload":"` + s.Svid + `"}` } }, false},
	{"jwt-headers", "jku", tokenOf(func(h, _ map[string]any) { h["jku"] = "https://mesh.test/keys" }), false},
	{"jwt-alg", "EdDSA", func(f *fake) {
		f.tokenParts = func(h, _ map[string]any) { h["alg"] = "EdDSA" }
	}, false},
	{"jwt-typ", "at+jwt", tokenOf(func(h, _ map[string]any) { h["typ"] = "at+jwt" }), false},
	{"jwt-sub", "another", tokenOf(func(_, c map[string]any) { c["sub"] = "spiffe://mesh.test/other" }), false},
	{"jwt-aud", "another", func(f *fake) {
		f.tokenParts = func(_, c map[string]any) { c["aud"] = "everybody" }
	}, false},
	{"jwt-exp", "none", tokenOf(func(_, c map[string]any) { delete(c, "exp") }), false},
	{"jwt-signature", "another key", func(f *fake) {
		f.keySet = func(keys []any) []any {
			other := jwkOf(&newKey(f.t).PublicKey)
			other["use"], other["kid"] = "jwt-svid", "k1"
			return []any{other}
		}
		f.edit = func(o *Options) { o.Federation = nil }
	}, false},
	{"jwt-bundles-own", "others only", func(f *fake) {
		f.keySets = func(m *workload.JWTBundlesResponse) { delete(m.Bundles, "spiffe://mesh.test") }
	}, false},
	{"jwt-bundles-names", "names without scheme", func(f *fake) {
		f.keySets = func(m *workload.JWTBundlesResponse) {
			m.Bundles["mesh.test"] = m.Bundles["spiffe://mesh.test"]
			delete(m.Bundles, "spiffe://mesh.test")
		}
	}, false},
	{"jwt-bundles-form", "a private key", key0(func(k map[string]any) { k["d"] = k["x"] }), false},
	{"jwt-bundles-form", "a list", func(f *fake) {
		f.keySets = func(m *workload.JWTBundlesResponse) { m.Bundles["spiffe://mesh.test"] = []byte(`[]`) }
	}, false},
	{"jwt-bundles-use", "keys of certificates", keysOf(func(keys []any) []any {
		other := map[string]any{}
		for name, v := range keys[0].(map[string]any) {
			other[name] = v
		}
		other["use"], other["kid"] = "x509-svid", "k2"
		return append(keys, other)
	}), false},
	{"jwt-bundles-kid", "none", key0(func(k map[string]any) { delete(k, "kid") }), false},
	{"jwt-bundles-kid", "twice", keysOf(func(keys []any) []any { return append(keys, keys[0]) }), false},

	{"validate-mandatory", "any audience", func(f *fake) {
		f.validity = func(text, audience string, err error) error {
			if audience == "" && text != "" {
				return nil
			}
			return err
		}
	}, false},
	{"validate-accepts", "nothing is good", func(f *fake) {
		f.validity = func(string, string, error) error { return status.Error(codes.InvalidArgument, "no") }
	}, false},
	{"validate-accepts", "another's", func(f *fake) {
		f.validated = func(m *workload.ValidateJWTSVIDResponse) { m.SpiffeId = "spiffe://mesh.test/other" }
	}, false},
	{"validate-claims", "none", func(f *fake) { f.validated = func(m *workload.ValidateJWTSVIDResponse) { m.Claims = nil } }, false},
	{"validate-audience", "a prefix is enough", func(f *fake) {
		f.validity = func(text, audience string, err error) error {
			if t, parsed := parseToken(text); parsed == nil && strings.HasPrefix(audience, t.audience()[0]) && f.judge(text, t.audience()[0]) == nil {
				return nil
			}
			return err
		}
	}, false},
	{"validate-signature", "it is not looked at", func(f *fake) {
		f.validity = func(_, _ string, err error) error {
			if err != nil && strings.Contains(err.Error(), "signature: ") {
				return nil
			}
			return err
		}
	}, false},
	{"validate-algorithm", "none", takes(func(t *token) bool { return t.header["alg"] == "none" }), false},
	{"validate-algorithm", "HMAC", takes(func(t *token) bool { return t.header["alg"] == "HS256" }), false},
	{"validate-domain", "any", takes(func(t *token) bool {
		return t.header["alg"] == "ES256" && strings.HasPrefix(t.textOf(t.claims, "sub"), "spiffe://spiffe-conformance-suite.invalid/")
	}), false},
	{"validate-serialization", "JSON", func(f *fake) {
		f.validity = func(text, _ string, err error) error {
			if strings.HasPrefix(text, "{") {
				return nil
			}
			return err
		}
	}, false},
	{"validate-expired", "ever after", func(f *fake) {
		f.tokenLife = 3 * time.Second
		f.edit = func(o *Options) { o.Wait, o.leeway = 5*time.Second, time.Second }
		f.validity = func(text, audience string, err error) error {
			if err != nil && strings.Contains(err.Error(), "expired") {
				return nil
			}
			return err
		}
	}, true},

	{"stranger", "an empty message", func(f *fake) {
		f.stranger = func(string) error { return nil }
	}, false},
	{"stranger", "another code", func(f *fake) {
		f.stranger = func(method string) error {
			if strings.HasSuffix(method, "FetchX509Bundles") {
				return status.Error(codes.NotFound, "no")
			}
			return status.Error(codes.PermissionDenied, "no")
		}
	}, false},

	{"federation-url", "http", func(f *fake) {
		f.edit = func(o *Options) { o.Federation.URL = strings.Replace(o.Federation.URL, "https", "http", 1) }
	}, false},
	{"federation-url", "a user", func(f *fake) {
		f.edit = func(o *Options) { o.Federation.URL = strings.Replace(o.Federation.URL, "//", "//me@", 1) }
	}, false},
	{"federation-open", "client certificates", func(f *fake) { f.tls = func(c *tls.Config) { c.ClientAuth = tls.RequireAnyClientCert } }, false},
	{"federation-open", "a password", web(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) { w.WriteHeader(http.StatusUnauthorized) }), false},
	{"federation-certificate", "another identity", func(f *fake) {
		f.endpointT = func(c *x509.Certificate) { c.URIs[0].Path = "/other" }
	}, false},
	{"federation-certificate", "of another authority", func(f *fake) {
		f.edit = func(o *Options) { o.Federation.Roots = []*x509.Certificate{f.partner.cert} }
	}, false},
	{"federation-tls", "TLS 1.1", func(f *fake) {
		f.tls = func(c *tls.Config) {
			c.MinVersion = tls.VersionTLS10
			for _, s := range append(tls.CipherSuites(), tls.InsecureCipherSuites()...) {
				c.CipherSuites = append(c.CipherSuites, s.ID)
			}
		}
	}, false},
	{"federation-content-type", "text", web(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		next.ServeHTTP(&plain{w}, r)
	}), false},
	{"bundle-set", "no keys", docOf(func(set map[string]any) { delete(set, "keys") }), false},
	{"bundle-set", "not UTF-8", web(func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte("{\"keys\":[],\"name\":\"\xff\"}"))
	}), false},
	{"bundle-kty", "none", docKey(1, func(k map[string]any) { delete(k, "kty") }), false},
	{"bundle-use", "none", docOf(func(set map[string]any) {
		keys := set["keys"].([]any)
		other := map[string]any{"kid": "k2"}
		for _, name := range []string{"kty", "crv", "x", "y"} {
			other[name] = keys[1].(map[string]any)[name]
		}
		set["keys"] = append(keys, other)
	}), false},
	{"bundle-x5c", "none", docKey(0, func(k map[string]any) { delete(k, "x5c") }), false},
	{"bundle-x5c", "two", docKey(0, func(k map[string]any) { k["x5c"] = append(k["x5c"].([]any), k["x5c"].([]any)[0]) }), false},
	{"bundle-x509-kid", "one", docKey(0, func(k map[string]any) { k["kid"] = "root" }), false},
	{"bundle-jwt-kid", "none", docKey(1, func(k map[string]any) { delete(k, "kid") }), false},
	{"bundle-keys", "a private one", docKey(0, func(k map[string]any) { k["d"] = k["x"] }), false},
	{"bundle-sequence", "text", docOf(func(set map[string]any) { set["spiffe_sequence"] = "7" }), false},
	{"bundle-sequence", "a fraction", docOf(func(set map[string]any) { set["spiffe_sequence"] = 7.5 }), false},
	{"bundle-sequence", "it falls", falling, false},
	{"bundle-sequence", "it stays", func(f *fake) {
		n := 300
		f.document = func(set map[string]any) { n++; set["spiffe_refresh_hint"] = n }
	}, false},
	{"bundle-sequence-there", "none", docOf(func(set map[string]any) { delete(set, "spiffe_sequence") }), false},
	{"bundle-hint", "text", docOf(func(set map[string]any) { set["spiffe_refresh_hint"] = "5m" }), false},
	{"bundle-hint-there", "none", docOf(func(set map[string]any) { delete(set, "spiffe_refresh_hint") }), false},
	{"bundle-complete", "another root", func(f *fake) {
		f.document = func(set map[string]any) {
			k := set["keys"].([]any)[0].(map[string]any)
			k["x5c"] = []any{base64.StdEncoding.EncodeToString(f.partner.cert.Raw)}
		}
	}, false},
	{"bundle-complete", "no key of tokens", docOf(func(set map[string]any) { set["keys"] = set["keys"].([]any)[:1] }), false},

	{"update", "it lets them expire", func(f *fake) {
		f.life = 6 * time.Second
		f.edit = func(o *Options) { o.Wait = time.Minute }
	}, true},
	{"full-state", "what has changed only", func(f *fake) {
		f.updates = 50 * time.Millisecond
		f.svids = func(n int, m *workload.X509SVIDResponse) {
			if n > 1 {
				m.Svids = m.Svids[:1]
			}
		}
		f.life, f.edit = 2*time.Hour, func(o *Options) { o.Wait = 20 * time.Second }
	}, true},
	{"full-state", "no bundles of others", func(f *fake) {
		f.updates = 50 * time.Millisecond
		f.svids = func(n int, m *workload.X509SVIDResponse) {
			if n > 1 {
				m.FederatedBundles = nil
			}
		}
		f.edit = func(o *Options) { o.Wait = 20 * time.Second }
	}, true},
}

func extensionOf(id asn1.ObjectIdentifier, value []byte) pkix.Extension {
	return pkix.Extension{Id: id, Value: value}
}

// plain is an answer that says it is text.
type plain struct{ http.ResponseWriter }

func (p *plain) Write(b []byte) (int, error) {
	p.Header().Set("Content-Type", "text/plain")
	return p.ResponseWriter.Write(b)
}

// falling has a bundle whose number is lower each time.
func falling(f *fake) {
	n := 7
	f.document = func(set map[string]any) { n--; set["spiffe_sequence"] = n }
}

package control

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/federation"
)

// FederationConfig says how the mesh shows itself to others. The zero value
// shows nothing; others are followed all the same, as documents say.
type FederationConfig struct {
	// SPIFFEListen serves the bundle with the control plane's own SVID, WebListen
	// with an operator's certificate. host:port; empty: not.
	SPIFFEListen, WebListen string
	// Certificate and Key are that certificate's files.
	Certificate, Key string
	// RefreshHint is how often others are told to ask; zero: the default.
	RefreshHint time.Duration
	// Issuer is the iss of tokens, whose discovery document WebListen serves;
	// empty: tokens have none.
	Issuer string
	// Store keeps the document that is shown, Copies the last good copy of
	// another trust domain's. Nil: files below the state directory.
	Store  federation.Store
	Copies func(own, td spiffeid.TrustDomain) federation.Store
}

// Check refuses what makes no sense. The errors name flags of signet-control.
func (c *FederationConfig) Check(jwtKeyLife time.Duration) error {
	if jwtKeyLife == 0 {
		jwtKeyLife = ca.DefaultJWTKeyLife
	}
	switch {
	case c.WebListen != "" && (c.Certificate == "" || c.Key == ""):
		return errors.New("--bundle-web-listen: needs --web-certificate and --web-key, files in PEM")
	case c.WebListen == "" && c.Certificate+c.Key != "":
		return errors.New("--web-certificate and --web-key: are used by --bundle-web-listen only")
	case c.WebListen == "" && c.Issuer != "":
		return errors.New("--oidc-issuer: needs --bundle-web-listen, which serves its discovery document")
	}
	if c.Issuer != "" {
		if err := federation.CheckIssuer(c.Issuer); err != nil {
			return fmt.Errorf("--oidc-issuer: %w", err)
		}
	}
	if c.RefreshHint == 0 {
		c.RefreshHint = federation.DefaultRefreshHint
	}
	if c.SPIFFEListen+c.WebListen != "" {
		if err := federation.CheckRefreshHint(c.RefreshHint, jwtKeyLife); err != nil {
			return fmt.Errorf("--bundle-refresh-hint: %w", err)
		}
	}
	return nil
}

// newFollower follows other trust domains.
func (c *control) newFollower(own spiffeid.TrustDomain) *federation.Follower {
	copies := func(td spiffeid.TrustDomain) federation.Store {
		if c.cfg.Federation.Copies != nil {
			return c.cfg.Federation.Copies(own, td)
		}
		return federation.File(filepath.Join(FederationDir(c.cfg.StateDir), "bundle-"+td.Name()+".json"))
	}
	return &federation.Follower{Own: own, Store: copies, Log: c.log}
}

// publish serves the mesh's own bundle; nil: to nobody.
func (c *control) publish(ctx context.Context, g *errgroup.Group, authority *ca.Authority) (*federation.Publisher, error) {
	cfg := c.cfg.Federation
	if cfg.SPIFFEListen == "" && cfg.WebListen == "" {
		return nil, nil
	}
	store := cfg.Store
	if store == nil {
		store = federation.File(filepath.Join(FederationDir(c.cfg.StateDir), "published.json"))
	}
	p := &federation.Publisher{Authority: authority, TrustDomain: authority.TrustDomain(), Store: store, RefreshHint: cfg.RefreshHint, Log: c.log}
	serve := func(address string, certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error), mux *http.ServeMux) error {
		mux.Handle(federation.Path, p)
		l, err := listen(address)
		if err != nil {
			return err
		}
		g.Go(func() error { return federation.Serve(ctx, l, certificate, mux, c.log) })
		c.log.Info("bundle endpoint serves", "address", l.Addr(), "path", federation.Path)
		return nil
	}
	if cfg.SPIFFEListen != "" {
		own, err := authority.ServerCertificate(ca.BundleEndpointID(authority.TrustDomain()), caserver.DefaultNodeTTL)
		if err != nil {
			return nil, err
		}
		if err := serve(cfg.SPIFFEListen, own.GetCertificate, http.NewServeMux()); err != nil {
			return nil, err
		}
	}
	if cfg.WebListen != "" {
		files, err := federation.OpenCertificate(cfg.Certificate, cfg.Key, c.log)
		if err != nil {
			return nil, err
		}
		mux := http.NewServeMux()
		if cfg.Issuer != "" {
			keys := func() []ca.JWTKey { keys, _ := authority.JWTKeys(); return keys }
			if err := (&federation.Discovery{Issuer: cfg.Issuer, Keys: keys}).Register(mux); err != nil {
				return nil, fmt.Errorf("--oidc-issuer: %w", err)
			}
		}
		if err := serve(cfg.WebListen, files.GetCertificate, mux); err != nil {
			return nil, err
		}
	}
	g.Go(func() error { p.Run(ctx); return nil })
	return p, nil
}

// trustBundle is the bundle of a trust domain; empty: the mesh's own, which is what
// the bundle endpoint shows, where there is one.
func (c *control) trustBundle(name string) (adminv1.TrustBundle, error) {
	authority := c.authority.Load()
	td := authority.TrustDomain()
	if name != "" {
		wanted, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return adminv1.TrustBundle{}, fmt.Errorf("trust-domain: %q is none: %w", name, err)
		}
		if wanted != td {
			return c.foreignBundle(wanted)
		}
	}
	out := adminv1.TrustBundle{TrustDomain: td.Name()}
	if c.shown != nil {
		if out.Document, _ = c.shown.Document(); out.Document == nil {
			return out, errors.New("the bundle endpoint shows no bundle yet; ask again in a moment")
		}
		return out, nil
	}
	var err error
	out.Document, err = federation.Unnumbered(td, authority)
	return out, err
}

// foreignBundle is the newest bundle of a trust domain that is followed.
func (c *control) foreignBundle(td spiffeid.TrustDomain) (adminv1.TrustBundle, error) {
	bundles, _ := c.follower.Bundles()
	for _, b := range bundles {
		if b.TrustDomain == td {
			doc, err := b.Marshal()
			return adminv1.TrustBundle{TrustDomain: td.Name(), Document: doc}, err
		}
	}
	return adminv1.TrustBundle{}, fmt.Errorf("trust-domain: the mesh knows no bundle of %s; add a Federation for it, or wait until its bundle was fetched", td)
}

// outsiders says why the next root may not sign yet: other trust domains have
// not had the time to learn of it. Empty: they have.
func outsiders(p *federation.Publisher, roots []*x509.Certificate, now time.Time) string {
	if p == nil {
		return ""
	}
	from, shown := p.Known(roots)
	switch {
	case !shown:
		return "the bundle endpoint does not show the next root yet"
	case now.Before(from):
		return fmt.Sprintf("other trust domains learn of the next root by %s", from.UTC().Format(time.RFC3339))
	}
	return ""
}

// FederationDir keeps what others were shown, and what they have shown.
func FederationDir(state string) string { return filepath.Join(state, "federation") }

package conformance

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Options say what is looked at, and what is known of it.
type Options struct {
	// Endpoint is the Workload Endpoint, as SPIFFE_ENDPOINT_SOCKET has it:
	// unix:///PATH or tcp://IP:PORT. The caller has an identity there. Empty: no
	// check needs one; see Stranger and Federation.
	Endpoint string
	// Stranger is an endpoint of the same implementation at which the caller has
	// no identity.
	Stranger string
	// TrustDomain is the name of the server's trust domain; empty: the one of the
	// first identity.
	TrustDomain string
	// IDs are the SPIFFE IDs that the caller has, all of them; nil: not known.
	IDs []string
	// Audience is for whom tokens are asked; empty: a name of the suite.
	Audience string
	// NoJWT says that the JWT-SVID profile is switched off here.
	NoJWT bool
	// Wait is for how long the suite waits for a certificate to be replaced, and
	// for a token to expire. 0: it does not.
	Wait time.Duration
	// Federation is the bundle endpoint; nil: there is none.
	Federation *Federation
	// Timeout bounds each call; 0: ten seconds.
	Timeout time.Duration
	// FirstMessage bounds how long the first message of a stream may take; 0: one
	// second.
	FirstMessage time.Duration
	// Progress, if it is not nil, is called before each check.
	Progress func(Check)

	leeway time.Duration // what a validator may grant after the end of a token; 0: a minute
}

// Federation is a bundle endpoint.
type Federation struct {
	URL string
	// SPIFFEID is the endpoint's identity in the profile https_spiffe; empty: the
	// profile is https_web.
	SPIFFEID string
	// Roots prove the endpoint. Nil: the machine's with https_web, and with
	// https_spiffe those of the Workload API.
	Roots []*x509.Certificate
}

const (
	defaultTimeout      = 10 * time.Second
	defaultLeeway       = time.Minute
	defaultFirstMessage = time.Second
	defaultAudience     = "spiffe-conformance-suite"
)

// Check says what makes no sense in the options; Run refuses them then.
func (o *Options) Check() error {
	switch {
	case o.Timeout < 0 || o.FirstMessage < 0 || o.Wait < 0:
		return errors.New("Timeout, FirstMessage and Wait must not be negative")
	case o.Endpoint == "" && o.Stranger == "" && o.Federation == nil:
		return errors.New("nothing to look at: give Endpoint, Stranger or Federation")
	case o.TrustDomain != "":
		if id, err := parseID("spiffe://" + o.TrustDomain); err != nil || id.path != "" {
			return fmt.Errorf("TrustDomain: %q is no name of a trust domain, such as example.org", o.TrustDomain)
		}
	}
	for name, text := range map[string]string{"Endpoint": o.Endpoint, "Stranger": o.Stranger} {
		if _, _, err := endpointAddress(text); text != "" && err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, id := range o.IDs {
		if parsed, err := parseID(id); err != nil || parsed.path == "" {
			return fmt.Errorf("IDs: %q is no SPIFFE ID of a workload", id)
		}
	}
	if f := o.Federation; f != nil {
		if _, err := url.Parse(f.URL); err != nil || f.URL == "" {
			return fmt.Errorf("Federation: URL: %q is none", f.URL)
		}
		if id, err := parseID(f.SPIFFEID); f.SPIFFEID != "" && (err != nil || id.path == "") {
			return fmt.Errorf("Federation: SPIFFEID: %q is no SPIFFE ID with a path", f.SPIFFEID)
		}
	}
	return nil
}

// open checks the options and connects.
func (o *Options) open(ctx context.Context) (*session, error) {
	if err := o.Check(); err != nil {
		return nil, fmt.Errorf("conformance: %w", err)
	}
	s := &session{Options: *o}
	s.Timeout = cmp.Or(s.Timeout, defaultTimeout)
	s.FirstMessage = cmp.Or(s.FirstMessage, defaultFirstMessage)
	s.leeway = cmp.Or(s.leeway, defaultLeeway)
	s.Audience = cmp.Or(s.Audience, defaultAudience)
	s.IDs = slices.Sorted(slices.Values(s.IDs))
	for _, e := range []struct {
		name, address string
		conn          **grpc.ClientConn
	}{{"Endpoint", o.Endpoint, &s.conn}, {"Stranger", o.Stranger, &s.stranger}} {
		if e.address == "" {
			continue
		}
		network, address, err := endpointAddress(e.address)
		if err == nil {
			err = reach(ctx, network, address, s.Timeout)
		}
		if err == nil {
			*e.conn, err = dial(network, address)
		}
		if err != nil {
			s.close()
			return nil, fmt.Errorf("conformance: %s: %w", e.name, err)
		}
	}
	return s, nil
}

// endpointAddress reads what SPIFFE_ENDPOINT_SOCKET may hold.
func endpointAddress(text string) (network, address string, err error) {
	u, err := url.Parse(text)
	if err != nil || u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || u.Opaque != "" {
		return "", "", fmt.Errorf("%q is neither unix:///PATH nor tcp://IP:PORT", text)
	}
	switch {
	case u.Scheme == "unix" && u.Host == "" && strings.HasPrefix(u.Path, "/"):
		return "unix", u.Path, nil
	case u.Scheme == "tcp" && u.Path == "":
		if at, err := netip.ParseAddrPort(u.Host); err == nil {
			return "tcp", at.String(), nil
		}
	}
	return "", "", fmt.Errorf("%q is neither unix:///PATH nor tcp://IP:PORT", text)
}

// reach tells an endpoint that is not there from one that does something wrong.
func reach(ctx context.Context, network, address string, timeout time.Duration) error {
	d := net.Dialer{Timeout: timeout}
	c, err := d.DialContext(ctx, network, address)
	if err != nil {
		return err
	}
	return c.Close()
}

// dial makes a connection without TLS and without credentials.
func dial(network, address string) (*grpc.ClientConn, error) {
	target := "passthrough:///" + address
	if network == "unix" {
		target = "unix://" + address
	}
	return grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableServiceConfig(), grpc.WithDisableRetry())
}

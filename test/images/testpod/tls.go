package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// tlsResult is what tls prints of each call.
type tlsResult struct {
	At     time.Time `json:"at"`
	Serial string    `json:"serial,omitempty"` // of the server's certificate
	Own    string    `json:"own,omitempty"`    // SPIFFE ID that the caller showed
	Error  string    `json:"error,omitempty"`
}

// callTLS calls a server by mutual TLS, with a new connection each time and the
// identity that the Workload API of $SPIFFE_ENDPOINT_SOCKET gives, until ctx ends.
func callTLS(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("tls", flag.ContinueOnError)
	want := f.String("id", "", "SPIFFE ID that the server must have")
	every := f.Duration("every", 100*time.Millisecond, "between two calls")
	rest, err := parse(f, args)
	if err != nil {
		return err
	}
	if len(rest) != 1 {
		return errors.New("tls: name one address, HOST:PORT")
	}
	id, err := spiffeid.FromString(*want)
	if err != nil {
		return fmt.Errorf("tls: --id: %w", err)
	}
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	for ctx.Err() == nil {
		r := tlsResult{At: time.Now()}
		if own, err := source.GetX509SVID(); err == nil {
			r.Own = own.ID.String()
		}
		transport := &http.Transport{DisableKeepAlives: true, TLSClientConfig: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(id))}
		resp, err := (&http.Client{Transport: transport, Timeout: 5 * time.Second}).Get("https://" + rest[0] + "/")
		if err == nil {
			r.Serial = fmt.Sprintf("%x", resp.TLS.PeerCertificates[0].SerialNumber.Bytes())
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if err == nil && resp.StatusCode != http.StatusOK {
				err = errors.New(resp.Status)
			}
		}
		if err != nil {
			r.Error = err.Error()
		}
		printLine(r)
		select {
		case <-ctx.Done():
		case <-time.After(*every):
		}
	}
	return nil
}

// serveTLS answers HTTPS by mutual TLS with the identity that the Workload API of
// $SPIFFE_ENDPOINT_SOCKET gives, and whoever the mesh knows may call: with the pod's
// name and the SPIFFE ID that the caller showed.
func serveTLS(ctx context.Context, l net.Listener, id string) error {
	defer l.Close()
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	config := tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny())
	config.MinVersion = tls.VersionTLS13
	s := &http.Server{
		TLSConfig:         config,
		ReadHeaderTimeout: time.Minute,
		ErrorLog:          slog.NewLogLogger(slog.DiscardHandler, slog.LevelError), // what is printed is JSON
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			caller, err := x509svid.IDFromCert(r.TLS.PeerCertificates[0])
			if err != nil {
				http.Error(w, err.Error(), http.StatusForbidden)
				return
			}
			_, _ = fmt.Fprintln(w, id, caller)
		}),
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Close() })
	defer stop()
	return s.ServeTLS(l, "", "")
}

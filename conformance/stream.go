package conformance

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

var streamChecks = []check{
	{Check{"first-message", docAPI, "4.3", Must, "the first message of a stream comes as soon as possible"}, checkFirstMessage},
}

func checkFirstMessage(ctx context.Context, s *session) (string, error) {
	if err := s.open(ctx); err != nil {
		return "", err
	}
	// What is not there yet may be made for the first call; the second finds it.
	if _, err := s.served(ctx); err != nil {
		return "", err
	}
	slowest := time.Duration(0)
	for _, c := range s.calls() {
		if c.name == "FetchJWTSVID" {
			continue // no stream
		}
		ctx, cancel := s.proper(ctx)
		began := time.Now()
		_, err := c.do(ctx, s.conn)
		took := time.Since(began)
		cancel()
		if status.Code(err) == codes.DeadlineExceeded || took > s.FirstMessage {
			return "", fmt.Errorf("%s: nothing within %s, at most %s is granted", c.name, took.Round(time.Millisecond), s.FirstMessage)
		}
		slowest = max(slowest, took)
	}
	return "the slowest within " + max(slowest.Round(time.Millisecond), time.Millisecond).String(), nil
}

// waitChecks come last: they have to wait.
var waitChecks = []check{
	{Check{"update", docAPI, "4.3", Should, "a certificate is replaced on the open stream before it expires"}, checkUpdate},
	{Check{"full-state", docAPI, "4.3", Must, "an update has everything, as a first message has"}, checkFullState},
	{Check{"validate-expired", docJWT, "3.3, 4", Must, "ValidateJWTSVID refuses a token that has expired"}, checkExpired},
}

// update is what was heard on an open stream.
type update struct {
	before, after *workload.X509SVIDResponse
	fresh         *workload.X509SVIDResponse // the first message of a stream that was opened right after
}

// awaitUpdate waits for the next message of a stream.
func (s *session) awaitUpdate(whole context.Context) (*update, error) {
	return s.update.get(func() (*update, error) {
		svids, err := s.served(whole)
		if err != nil {
			return nil, err
		}
		if s.Wait == 0 {
			return nil, skip("the options give no time to wait for an update")
		}
		wait := s.Wait
		if rest := time.Until(earliest(svids)) + 2*time.Second; rest < wait {
			wait = rest // what has expired needs no more patience
		}
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(whole, header, "true"), wait)
		defer cancel()
		stream, err := openX509(s.conn)(ctx)
		if err != nil {
			return nil, err
		}
		u := &update{}
		if u.before, err = stream.Recv(); err != nil {
			return nil, err
		}
		expires := earliest(u.before.GetSvids())
		if u.after, err = stream.Recv(); err != nil {
			switch {
			case time.Now().After(expires):
				return nil, fmt.Errorf("nothing came until the certificate had expired, at %s", expires.UTC().Format(time.RFC3339))
			case status.Code(err) == codes.DeadlineExceeded, errors.Is(err, io.EOF), status.Code(err) == codes.Unavailable:
				return nil, skip("nothing came within %s; the certificate lives until %s", s.Wait, expires.UTC().Format(time.RFC3339))
			}
			return nil, err
		}
		u.fresh, err = message(whole, s, openX509(s.conn))
		return u, err
	})
}

// earliest is when the first of some certificates expires; zero if that cannot be
// read.
func earliest(svids []*workload.X509SVID) (at time.Time) {
	for _, svid := range svids {
		certs, err := x509.ParseCertificates(svid.GetX509Svid())
		if err == nil && len(certs) > 0 && (at.IsZero() || certs[0].NotAfter.Before(at)) {
			at = certs[0].NotAfter
		}
	}
	return at
}

func checkUpdate(ctx context.Context, s *session) (string, error) {
	u, err := s.awaitUpdate(ctx)
	if err != nil {
		return "", err
	}
	if !slices.ContainsFunc(u.after.GetSvids(), func(svid *workload.X509SVID) bool {
		return !slices.ContainsFunc(u.before.GetSvids(), func(old *workload.X509SVID) bool { return bytes.Equal(old.GetX509Svid(), svid.GetX509Svid()) })
	}) {
		return "", skip("what came was no new certificate")
	}
	before := earliest(u.before.GetSvids())
	return fmt.Sprintf("replaced %s before it expires", time.Until(before).Round(time.Second)), nil
}

// checkFullState compares an update with what a stream begins with that is opened
// after it.
func checkFullState(ctx context.Context, s *session) (string, error) {
	u, err := s.awaitUpdate(ctx)
	if err != nil {
		var no *skipped
		if !errors.As(err, &no) {
			err = skip("no update came; see update")
		}
		return "", err
	}
	if got, want := ids(u.after.GetSvids()), ids(u.fresh.GetSvids()); !slices.Equal(got, want) {
		return "", fmt.Errorf("an update has %q, and a first message %q", got, want)
	}
	got, want := slices.Sorted(maps.Keys(u.after.GetFederatedBundles())), slices.Sorted(maps.Keys(u.fresh.GetFederatedBundles()))
	if !slices.Equal(got, want) {
		return "", fmt.Errorf("an update has bundles of %q, and a first message of %q", got, want)
	}
	for _, svid := range u.after.GetSvids() {
		if missing := mandatory(svid); missing != "" {
			return "", fmt.Errorf("%s: an update has no %s", svid.GetSpiffeId(), missing)
		}
	}
	return fmt.Sprintf("%d identities, %d bundles of others", len(ids(u.after.GetSvids())), len(got)), nil
}

package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var jwtChecks = []check{
	{Check{"jwt-served", docAPI, "6.2.1", Must, "FetchJWTSVID answers with one JWT-SVID or more"}, checkJWTServed},
	{Check{"jwt-audience-mandatory", docAPI, "4.5, 6.2.1", Should, "FetchJWTSVID without an audience is InvalidArgument"}, checkAudienceMandatory},
	{Check{"jwt-every-identity", docAPI, "6.2.1", Must, "without spiffe_id there is a JWT-SVID for each identity of the caller"}, checkJWTEveryIdentity},
	{Check{"jwt-one-identity", docAPI, "6.2.1", Must, "with spiffe_id there is a JWT-SVID of that identity, and of no other"}, checkJWTOneIdentity},
	{Check{"jwt-not-mine", docAPI, "6.2.1", Should, "FetchJWTSVID for an identity that the caller has not is PermissionDenied"}, checkNotMine},
	{Check{"jwt-hint", docAPI, "6.2.1", Must, "no hint is given twice"}, checkJWTHints},
	{Check{"jwt-compact", docJWT, "5.1", Must, "the token is a JWS in compact serialization"}, checkCompact},
	{Check{"jwt-headers", docJWT, "2", Must, "there is no header beside alg, kid and typ"}, eachToken(checkHeaders)},
	{Check{"jwt-alg", docJWT, "2.1", Must, "alg is RS, ES or PS with 256, 384 or 512"}, eachToken(checkAlg)},
	{Check{"jwt-typ", docJWT, "2.3", Must, "typ, if it is there, is JWT or JOSE"}, eachToken(checkTyp)},
	{Check{"jwt-sub", docJWT, "3.1", Must, "sub is the SPIFFE ID of the workload, which is the one in spiffe_id"}, eachToken(checkSub)},
	{Check{"jwt-aud", docAPI, "6.2.1", Must, "aud has the audience that was asked for"}, checkAud},
	{Check{"jwt-exp", docJWT, "3.3", Must, "exp is there, and lies ahead"}, eachToken(checkExp)},
	{Check{"jwt-signature", docJWT, "4", Must, "the signature is of a key in the JWT bundle of the subject's trust domain"}, checkSignature},
}

// sent is a token as it was served.
type sent struct {
	svid *workload.JWTSVID
	*token
}

// tokens returns the caller's JWT-SVIDs, at least one, or says why a check that is
// about them has nothing to judge.
func (s *session) tokens(ctx context.Context) ([]sent, error) {
	m, err := s.fetchJWT(ctx)
	var no *skipped
	switch {
	case errors.As(err, &no):
		return nil, err
	case err != nil || len(m.GetSvids()) == 0:
		return nil, skip("no JWT-SVID was served; see jwt-served")
	}
	var out []sent
	for _, svid := range m.GetSvids() {
		t, err := parseToken(svid.GetSvid())
		if err != nil {
			return nil, skip("a token cannot be read; see jwt-compact")
		}
		out = append(out, sent{svid, t})
	}
	return out, nil
}

// eachToken makes a check of a question about one token.
func eachToken(ask func(sent) error) func(context.Context, *session) (string, error) {
	return func(ctx context.Context, s *session) (string, error) {
		all, err := s.tokens(ctx)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("%d tokens", len(all)), each(all, func(t sent) string { return t.svid.GetSpiffeId() }, ask)
	}
}

func checkJWTServed(ctx context.Context, s *session) (string, error) {
	if err := s.hasJWT(); err != nil {
		return "", err
	}
	if err := s.open(ctx); err != nil {
		return "", err
	}
	m, err := s.fetchJWT(ctx)
	switch {
	case err != nil:
		return "", fmt.Errorf("FetchJWTSVID ends with %s", describe(err))
	case len(m.GetSvids()) == 0:
		return "", errors.New("the message has none")
	}
	return fmt.Sprintf("%d tokens", len(m.GetSvids())), nil
}

// ask calls FetchJWTSVID.
func (s *session) ask(ctx context.Context, id string, audience ...string) (*workload.JWTSVIDResponse, error) {
	ctx, cancel := s.proper(ctx)
	defer cancel()
	return workload.NewSpiffeWorkloadAPIClient(s.conn).FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: audience, SpiffeId: id})
}

func checkAudienceMandatory(ctx context.Context, s *session) (string, error) {
	if _, err := s.tokens(ctx); err != nil {
		return "", err
	}
	if _, err := s.ask(ctx, ""); status.Code(err) != codes.InvalidArgument {
		return "", fmt.Errorf("it is answered with %s", describe(err))
	}
	return "it is", nil
}

func jwtIDs(m *workload.JWTSVIDResponse) (out []string) {
	for _, svid := range m.GetSvids() {
		out = append(out, svid.GetSpiffeId())
	}
	slices.Sort(out)
	return out
}

func checkJWTEveryIdentity(ctx context.Context, s *session) (string, error) {
	if _, err := s.tokens(ctx); err != nil {
		return "", err
	}
	want := s.IDs
	if want == nil {
		svids, err := s.served(ctx)
		if err != nil {
			return "", err
		}
		want = ids(svids)
	}
	m, err := s.fetchJWT(ctx)
	if err != nil {
		return "", err
	}
	if got := jwtIDs(m); !slices.Equal(got, want) {
		return "", fmt.Errorf("got %q, want %q", got, want)
	}
	return fmt.Sprintf("%q", want), nil
}

func checkJWTOneIdentity(ctx context.Context, s *session) (string, error) {
	all, err := s.tokens(ctx)
	if err != nil {
		return "", err
	}
	err = each(all, func(t sent) string { return t.svid.GetSpiffeId() }, func(t sent) error {
		id := t.svid.GetSpiffeId()
		m, err := s.ask(ctx, id, s.Audience)
		if err != nil {
			return err
		}
		if got := jwtIDs(m); !slices.Equal(got, []string{id}) {
			return fmt.Errorf("got %q", got)
		}
		return nil
	})
	return fmt.Sprintf("%d identities", len(all)), err
}

func checkNotMine(ctx context.Context, s *session) (string, error) {
	if _, err := s.tokens(ctx); err != nil {
		return "", err
	}
	domain, err := s.domain(ctx)
	if err != nil {
		return "", err
	}
	id := "spiffe://" + domain + "/spiffe-conformance-suite/no-such-identity"
	if _, err := s.ask(ctx, id, s.Audience); status.Code(err) != codes.PermissionDenied {
		return "", fmt.Errorf("for %s it is answered with %s", id, describe(err))
	}
	return "asked for " + id, nil
}

func checkJWTHints(ctx context.Context, s *session) (string, error) {
	all, err := s.tokens(ctx)
	if err != nil {
		return "", err
	}
	var hints []string
	for _, t := range all {
		hints = append(hints, t.svid.GetHint())
	}
	return uniqueHints(hints)
}

func checkCompact(ctx context.Context, s *session) (string, error) {
	m, err := s.fetchJWT(ctx)
	if err != nil || len(m.GetSvids()) == 0 {
		_, err := s.tokens(ctx)
		return "", err
	}
	err = each(m.GetSvids(), (*workload.JWTSVID).GetSpiffeId, func(svid *workload.JWTSVID) error {
		_, err := parseToken(svid.GetSvid())
		return err
	})
	return fmt.Sprintf("%d tokens", len(m.GetSvids())), err
}

func checkHeaders(t sent) error {
	for _, name := range slices.Sorted(maps.Keys(t.header)) {
		if name != "alg" && name != "kid" && name != "typ" {
			return fmt.Errorf("there is %s", name)
		}
	}
	return nil
}

func checkAlg(t sent) error {
	if _, ok := algorithms[t.textOf(t.header, "alg")]; !ok {
		return fmt.Errorf("it is %v", t.header["alg"])
	}
	return nil
}

func checkTyp(t sent) error {
	if typ, ok := t.header["typ"]; ok && typ != "JWT" && typ != "JOSE" {
		return fmt.Errorf("it is %v", typ)
	}
	return nil
}

func checkSub(t sent) error {
	sub := t.textOf(t.claims, "sub")
	id, err := parseID(sub)
	switch {
	case err != nil:
		return err
	case id.path == "":
		return fmt.Errorf("it is %s, which has no path", id)
	case sub != t.svid.GetSpiffeId():
		return fmt.Errorf("it is %s", id)
	}
	return nil
}

func checkAud(ctx context.Context, s *session) (string, error) {
	all, err := s.tokens(ctx)
	if err != nil {
		return "", err
	}
	return s.Audience, each(all, func(t sent) string { return t.svid.GetSpiffeId() }, func(t sent) error {
		if !slices.Contains(t.audience(), s.Audience) {
			return fmt.Errorf("it is %v", t.claims["aud"])
		}
		return nil
	})
}

// expiry is the claim exp.
func (t *token) expiry() (time.Time, error) {
	n, ok := t.claims["exp"].(json.Number)
	if !ok {
		return time.Time{}, errors.New("there is none, or it is no number")
	}
	seconds, err := n.Float64()
	return time.Unix(int64(seconds), 0), err
}

func checkExp(t sent) error {
	at, err := t.expiry()
	if err == nil && !at.After(time.Now()) {
		err = fmt.Errorf("it is %s", at.UTC().Format(time.RFC3339))
	}
	return err
}

func checkSignature(ctx context.Context, s *session) (string, error) {
	all, err := s.tokens(ctx)
	if err != nil {
		return "", err
	}
	err = each(all, func(t sent) string { return t.svid.GetSpiffeId() }, func(t sent) error {
		id, err := parseID(t.svid.GetSpiffeId())
		if err != nil {
			return skip("spiffe_id is no SPIFFE ID; see jwt-sub")
		}
		if checkAlg(t) != nil {
			return skip("the algorithm is not allowed; see jwt-alg")
		}
		keys, err := s.keysOf(ctx, id.domain)
		if err != nil {
			return err
		}
		if kid := t.textOf(t.header, "kid"); kid != "" {
			key, ok := keys[kid]
			if !ok {
				return fmt.Errorf("the bundle has no key %q", kid)
			}
			return t.signedBy(key)
		}
		for _, key := range keys {
			if t.signedBy(key) == nil {
				return nil
			}
		}
		return errors.New("no key of the bundle made it")
	})
	return fmt.Sprintf("%d tokens", len(all)), err
}

package federation

import (
	"crypto/ecdsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/signet-mesh/signet/ca"
)

// CheckIssuer refuses what cannot be the issuer of tokens as OpenID Connect
// Discovery has it. It is compared as a string, so it has one spelling.
func CheckIssuer(issuer string) error {
	u, err := url.Parse(issuer)
	switch {
	case err != nil:
		return errors.New("is no URL")
	case u.Scheme != "https":
		return fmt.Errorf("has the scheme %q; an issuer is an https URL", u.Scheme)
	case u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" || u.Host == "" || u.Opaque != "":
		return errors.New("must be a host and, if need be, a path: no user, query or fragment")
	case strings.HasSuffix(issuer, "/"):
		return errors.New("ends in a slash; leave it out")
	case len(issuer) > 512 || u.String() != issuer:
		return errors.New("is not in its usual spelling, or longer than 512 bytes")
	}
	return nil
}

// Discovery shows the keys of tokens to verifiers that know nothing of SPIFFE.
type Discovery struct {
	Issuer string // passes CheckIssuer
	// Keys returns the keys that verify tokens now.
	Keys func() []ca.JWTKey
}

// Register adds the two documents to a server of the issuer's host.
func (d *Discovery) Register(mux *http.ServeMux) error {
	u, err := url.Parse(d.Issuer)
	if err != nil {
		return err
	}
	if strings.ContainsAny(u.Path, "{} ") {
		return fmt.Errorf("the issuer's path %q has characters that none may have here", u.Path)
	}
	mux.HandleFunc("GET "+u.Path+"/.well-known/openid-configuration", d.configuration)
	mux.HandleFunc("GET "+u.Path+"/keys", d.keys)
	return nil
}

func (d *Discovery) configuration(w http.ResponseWriter, _ *http.Request) {
	answer(w, map[string]any{
		"issuer":   d.Issuer,
		"jwks_uri": d.Issuer + "/keys",
		// There is no login here: tokens come from the Workload API. The members
		// below are demanded by the specification.
		"authorization_endpoint":                "",
		"response_types_supported":              []string{"id_token"},
		"subject_types_supported":               []string{"public"},
		"id_token_signing_alg_values_supported": []string{"ES256"},
	})
}

// jwk is one key as a verifier of signatures wants it: unlike in a bundle, its
// use is sig.
type jwk struct {
	KeyType   string `json:"kty"`
	Use       string `json:"use"`
	Algorithm string `json:"alg"`
	KeyID     string `json:"kid"`
	Curve     string `json:"crv"`
	X         string `json:"x"`
	Y         string `json:"y"`
}

func (d *Discovery) keys(w http.ResponseWriter, _ *http.Request) {
	keys := d.Keys()
	if len(keys) == 0 {
		http.Error(w, "the keys are not known yet", http.StatusServiceUnavailable)
		return
	}
	out := struct {
		Keys []jwk `json:"keys"`
	}{}
	for _, k := range keys {
		pub, ok := k.Key.(*ecdsa.PublicKey)
		if !ok {
			continue // the authority makes no others
		}
		point, err := pub.Bytes() // 4, X, Y
		if err != nil {
			continue
		}
		half := (len(point) - 1) / 2
		encode := base64.RawURLEncoding.EncodeToString
		out.Keys = append(out.Keys, jwk{
			KeyType: "EC", Use: "sig", Algorithm: "ES256", KeyID: k.ID, Curve: pub.Curve.Params().Name,
			X: encode(point[1 : 1+half]), Y: encode(point[1+half:]),
		})
	}
	answer(w, out)
}

func answer(w http.ResponseWriter, doc any) {
	body, err := json.Marshal(doc)
	if err != nil {
		http.Error(w, "the document cannot be written", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "max-age=300")
	_, _ = w.Write(body) // the caller is gone
}

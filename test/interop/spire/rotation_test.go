//go:build interop

package spire

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
)

// until makes rounds of calls, of which none may fail, until f returns nil, and
// returns how many there were.
func (w *world) until(t *testing.T, s *servers, d time.Duration, what string, f func() error) (rounds int) {
	t.Helper()
	for began := time.Now(); ; rounds++ {
		if err := w.round(t.Context(), s); err != nil {
			t.Fatalf("round %d, while waiting for %s: %v", rounds, what, err)
		}
		err := f()
		if err == nil {
			t.Logf("%s: after %.1f s and %d rounds of calls, none failed", what, time.Since(began).Seconds(), rounds+1)
			return rounds + 1
		}
		if time.Since(began) > d {
			t.Fatalf("waited %s for %s: %v", d, what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// roots are the authorities of a trust domain that a program has, by key ID.
func roots(source *workloadapi.X509Source, td spiffeid.TrustDomain) (ids []string, err error) {
	b, err := source.GetX509BundleForTrustDomain(td)
	if err != nil {
		return nil, err
	}
	for _, c := range b.X509Authorities() {
		ids = append(ids, hex.EncodeToString(c.SubjectKeyId))
	}
	slices.Sort(ids)
	return ids, nil
}

// authority is the key ID of the one that a certificate was signed by, or, with
// an intermediate, that the intermediate was.
func authority(s *x509svid.SVID) string {
	return hex.EncodeToString(s.Certificates[len(s.Certificates)-1].AuthorityKeyId)
}

// rotateSPIRE replaces SPIRE's root, step by step as its operators do, and taints
// and revokes the former. This mesh follows, and trusts the former no more.
func (w *world) rotateSPIRE(t *testing.T, s *servers) {
	ctx := t.Context()
	step := func(action, id, answer string) string {
		t.Helper()
		got, err := w.server.LocalAuthority(ctx, "x509", action, id)
		if err != nil {
			t.Fatal(err)
		}
		if got[answer].ID == "" {
			t.Fatalf("localauthority x509 %s: no %s in %v", action, answer, got)
		}
		return got[answer].ID
	}
	former := step("show", "", "active")
	old, err := w.foreign[app].GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	if a := authority(old); a != former {
		t.Fatalf("certificates are signed by %s, and the active authority is %s", a, former)
	}
	next := step("prepare", "", "prepared_authority")
	shown := func(want ...string) func() error {
		slices.Sort(want)
		return func() error {
			ids, err := roots(w.own, spireTD)
			if err == nil && !slices.Equal(ids, want) {
				err = fmt.Errorf("programs have the roots %v, want %v", ids, want)
			}
			return err
		}
	}
	w.until(t, s, 20*time.Second, "this mesh to know SPIRE's next root", shown(former, next))
	step("activate", next, "activated_authority")
	step("taint", former, "tainted_authority")
	w.until(t, s, time.Minute, "SPIRE's programs to have certificates of the next root", func() error {
		for id, source := range w.foreign {
			svid, err := source.GetX509SVID()
			if err != nil {
				return err
			}
			if a := authority(svid); a != next {
				return fmt.Errorf("%s has one of %s, want %s", id, a, next)
			}
		}
		return nil
	})
	if _, err := w.server.LocalAuthority(ctx, "x509", "revoke", former); err != nil {
		t.Fatal(err)
	}
	w.until(t, s, 20*time.Second, "this mesh to drop SPIRE's former root", shown(next))
	w.until(t, s, 10*time.Second, "web's proxy to refuse a certificate of the former", func() error {
		if status, got, err := w.connect(ctx, with(old)); err == nil {
			return fmt.Errorf("it got %d %q", status, got)
		}
		return nil
	})
}

// rotateSPIREsTokens: a token that SPIRE signed with its next key is good, and
// one of the revoked key is not.
func (w *world) rotateSPIREsTokens(t *testing.T) {
	ctx := t.Context()
	ours, theirs := workloadapi.WithAddr("unix://"+w.socket()), workloadapi.WithAddr(w.agent.Socket())
	// An audience of each, or SPIRE's agent gives out what it has kept.
	fetch := func(audience string) *jwtsvid.SVID {
		t.Helper()
		svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Subject: app, Audience: audience}, theirs)
		if err != nil {
			t.Fatal(err)
		}
		return svid
	}
	validate := func(svid *jwtsvid.SVID) error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		_, err := workloadapi.ValidateJWTSVID(ctx, svid.Marshal(), svid.Audience[0], ours)
		return err
	}
	former := fetch("before")
	if err := validate(former); err != nil {
		t.Fatal(err)
	}
	act := func(action, id string) map[string]string {
		t.Helper()
		got, err := w.server.LocalAuthority(ctx, "jwt", action, id)
		if err != nil {
			t.Fatal(err)
		}
		ids := map[string]string{}
		for name, a := range got {
			ids[name] = a.ID
		}
		return ids
	}
	old, next := act("show", "")["active"], act("prepare", "")["prepared_authority"]
	w.Eventually(20*time.Second, "this mesh to know SPIRE's next key", func() error {
		source, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(ours))
		if err != nil {
			return err
		}
		defer source.Close()
		b, err := source.GetJWTBundleForTrustDomain(spireTD)
		if err == nil && !b.HasJWTAuthority(next) {
			err = fmt.Errorf("no key %s", next)
		}
		return err
	})
	act("activate", next)
	if err := validate(fetch("after")); err != nil {
		t.Errorf("a token of the next key: %v", err)
	}
	act("taint", old)
	act("revoke", old)
	w.Eventually(20*time.Second, "tokens of the revoked key to be refused", func() error {
		if err := validate(former); err == nil || !strings.Contains(err.Error(), "kid") {
			return fmt.Errorf("%v", err)
		}
		return nil
	})
	if err := validate(fetch("later")); err != nil {
		t.Errorf("a token of the next key: %v", err)
	}
}

// rotateMesh replaces this mesh's root. SPIRE follows before the next one signs,
// and trusts the former no more.
func (w *world) rotateMesh(t *testing.T, s *servers) {
	ctx := t.Context()
	w.until(t, s, firstAsk, "SPIRE to ask by itself", func() error {
		if left := firstAsk - 5*time.Second - time.Since(w.began); left > 0 {
			return fmt.Errorf("%s left", left)
		}
		return nil
	})
	before, err := roots(w.foreign[app], ownTD)
	if err != nil || len(before) != 1 {
		t.Fatalf("SPIRE's programs have the roots %v, %v; want one", before, err)
	}
	rotation, err := w.Client.RotateRoot(ctx, false)
	if err != nil {
		t.Fatal(err)
	}
	waited := false
	w.until(t, s, 3*time.Minute, "this mesh's root to be replaced", func() error {
		rotation, err = w.Client.Authority(ctx)
		if err != nil {
			return err
		}
		waited = waited || strings.Contains(rotation.Waits, "trust domains")
		if rotation.Stage != adminv1.RotationIdle {
			return fmt.Errorf("it is still %s, and waits for %q", rotation.Stage, rotation.Waits)
		}
		return nil
	})
	if !waited {
		t.Error("the next root signed without regard to other trust domains, so this shows luck only")
	}
	w.until(t, s, follow, "SPIRE to drop the former root", func() error {
		ids, err := roots(w.foreign[app], ownTD)
		if err == nil && (len(ids) != 1 || ids[0] == before[0]) {
			err = fmt.Errorf("its programs have %v, and had %v", ids, before)
		}
		return err
	})
}

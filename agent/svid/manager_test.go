package svid

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/internal/mesh"
)

// Two workloads with one service account share one certificate and key; the
// request goes out once, and the result is what TLS can use.
func TestOneSVIDForEachIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, time.Hour)
		n := start(t, is, Config{}, "b=web", "a=web", "db")
		defer n.stop()
		synctest.Wait()
		if got := is.count(); got != 2 {
			t.Fatalf("%d requests for 2 identities", got)
		}
		web := n.must("web")
		if want := []string{"default/a", "default/b"}; !slices.Equal(web.Workloads, want) {
			t.Errorf("workloads %v, want %v", web.Workloads, want)
		}
		if k := web.Key.(*ecdsa.PrivateKey); k.Curve.Params().Name != "P-256" {
			t.Errorf("curve %s", k.Curve.Params().Name)
		}
		keyPEM, err := web.KeyPEM()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tls.X509KeyPair(pemOf(web.Chain), keyPEM); err != nil {
			t.Errorf("certificate and key do not fit: %v", err)
		}
		if all := n.All(); len(all) != 2 || all[0].ID != sa("db") || all[1].ID != sa("web") {
			t.Errorf("All = %v, want db and web, sorted", all)
		}
		st := n.Status()
		var holders []string
		for _, c := range st {
			holders = append(holders, c.Holder)
		}
		if want := []string{"default/a", "default/b", "default/db"}; !slices.Equal(holders, want) {
			t.Errorf("status of %v, want %v", holders, want)
		}
		if c := st[0]; c.Serial != web.Serial || c.Issuer == "" || !c.NotAfter.Equal(web.NotAfter) || c.LastError != "" {
			t.Errorf("status %+v does not describe %+v", c, web)
		}
	})
}

// Renewal happens at half life, with a new key each time, and is announced.
func TestRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, time.Hour)
		n := start(t, is, Config{}, "web")
		defer n.stop()
		synctest.Wait()
		first := n.must("web")
		if want := time.Now().Add(30 * time.Minute); !first.RenewAt.Equal(want) {
			t.Errorf("renew at %v, want %v", first.RenewAt, want)
		}
		changed := n.Changed()
		time.Sleep(30*time.Minute - time.Second)
		synctest.Wait()
		select {
		case <-changed:
			t.Error("changed before half life")
		default:
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		select {
		case <-changed:
		default:
			t.Error("a renewal was not announced")
		}
		second := n.must("web")
		if second.Serial == first.Serial {
			t.Error("not renewed at half life")
		}
		if second.Key.Public().(*ecdsa.PublicKey).Equal(first.Key.Public()) {
			t.Error("the renewal kept the key")
		}
	})
}

// An issuer that is away costs nothing while the certificate lives: it stays,
// attempts back off and do not exceed their bounds, and the certificate is
// withdrawn, announced and reported at the instant it expires.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, time.Hour)
		n := start(t, is, Config{}, "web")
		defer n.stop()
		synctest.Wait()
		first := n.must("web")
		is.set(func(i *issuer) {
			i.before = func(context.Context, string) error { return errors.New("connection refused") }
		})
		time.Sleep(time.Hour - time.Minute)
		synctest.Wait()
		if got := n.must("web"); got != first {
			t.Error("a failed renewal replaced a certificate that is valid")
		}
		if m := n.Missing(); len(m) > 0 {
			t.Errorf("missing though it is valid: %v", m)
		}
		if st := n.Status()[0]; !strings.Contains(st.LastError, "connection refused") || st.Serial != first.Serial {
			t.Errorf("status %+v hides the failure or the certificate", st)
		}
		// 29 minutes with waits of at most 30 s and at least 15 s (jitter
		// takes up to half; it is 0.5 here, so a quarter).
		if tries := is.count(); tries < 58 || tries > 120 {
			t.Errorf("%d attempts in 29 minutes", tries)
		}
		changed := n.Changed()
		time.Sleep(time.Minute - time.Nanosecond)
		synctest.Wait()
		n.must("web")
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if _, ok := n.Get(sa("web")); ok || len(n.All()) != 0 {
			t.Error("an expired certificate is handed out")
		}
		select {
		case <-changed:
		default:
			t.Error("the withdrawal was not announced")
		}
		if st := n.Status()[0]; st.Serial != "" || !strings.Contains(st.LastError, "expired") || !strings.Contains(st.LastError, "connection refused") {
			t.Errorf("status after expiry: %+v", st)
		}
		if why, ok := n.Missing()[sa("web")]; !ok || !strings.Contains(why, "expired") {
			t.Errorf("missing after expiry: %q, %v", why, ok)
		}
		is.set(func(i *issuer) { i.before = nil })
		time.Sleep(31 * time.Second)
		synctest.Wait()
		if got := n.must("web"); got.Serial == first.Serial {
			t.Error("the expired certificate came back")
		}
		if st := n.Status()[0]; st.LastError != "" {
			t.Errorf("status after recovery still says %q", st.LastError)
		}
	})
}

// An issuer that hangs loses its turn; with seconds-long lifetimes there is
// still time for another attempt.
func TestHangingIssuer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, 6*time.Second)
		n := start(t, is, Config{}, "web")
		defer n.stop()
		synctest.Wait()
		first := n.must("web")
		hung := false
		is.set(func(i *issuer) {
			i.before = func(ctx context.Context, _ string) error {
				is.mu.Lock()
				once := !hung
				hung = true
				is.mu.Unlock()
				if once {
					<-ctx.Done()
					return ctx.Err()
				}
				return nil
			}
		})
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if got := n.must("web"); got.Serial == first.Serial {
			t.Error("one request that hung cost the certificate")
		}
	})
}

// Certificates of 4 s, the shortest a mesh may have, renewed for a minute by
// an issuer that fails every other time: there is a valid one at any instant.
func TestShortLived(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, 4*time.Second)
		n := start(t, is, Config{}, "web")
		defer n.stop()
		synctest.Wait()
		flip := 0
		is.set(func(i *issuer) {
			i.before = func(context.Context, string) error {
				is.mu.Lock()
				defer is.mu.Unlock()
				if flip++; flip%2 == 0 {
					return errors.New("busy")
				}
				return nil
			}
		})
		for range 600 {
			time.Sleep(100 * time.Millisecond)
			n.must("web")
		}
	})
}

// What the issuer returns is looked at before it is taken. Each row spoils one
// property; the certificate held before stays.
func TestIssuerIsNotBelieved(t *testing.T) {
	for _, tc := range []struct {
		name, want string
		edit       func(*x509.Certificate)
		chain      func(is *issuer, chain [][]byte) [][]byte
		foreign    bool
	}{
		{name: "another identity", want: "names spiffe://mesh.test/ns/default/sa/admin",
			edit: func(c *x509.Certificate) { c.URIs = []*url.URL{sa("admin").URL()} }},
		{name: "another trust domain", want: "names spiffe://evil.test",
			edit: func(c *x509.Certificate) {
				c.URIs = []*url.URL{{Scheme: "spiffe", Host: "evil.test", Path: "/ns/default/sa/web"}}
			}},
		{name: "two URI SANs", want: "more than one URI",
			edit: func(c *x509.Certificate) { c.URIs = append(c.URIs, sa("admin").URL()) }},
		{name: "no URI SAN", want: "no URI", edit: func(c *x509.Certificate) { c.URIs = nil }},
		{name: "a DNS name too", want: "other names", edit: func(c *x509.Certificate) { c.DNSNames = []string{"bank.example"} }},
		{name: "expired", want: "expired", edit: func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(time.Second) }},
		{name: "not valid yet", want: "this node's clock is 1h0m0s or more behind", edit: func(c *x509.Certificate) {
			c.NotBefore = c.NotBefore.Add(time.Hour)
			c.NotAfter = c.NotAfter.Add(time.Hour)
		}},
		{name: "a CA", want: "CA flag", edit: func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }},
		{name: "may sign certificates", want: "KeyCertSign", edit: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }},
		{name: "no digital signature", want: "digitalSignature", edit: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }},
		{name: "clients only", want: "extended key usage", edit: func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }},
		{name: "no certificate", want: "chain is empty", chain: func(*issuer, [][]byte) [][]byte { return nil }},
		{name: "garbage", want: "certificate 0", chain: func(*issuer, [][]byte) [][]byte { return [][]byte{{1, 2, 3}} }},
		{name: "too many", want: "at most", chain: func(_ *issuer, c [][]byte) [][]byte { return slices.Repeat(c, 20) }},
		{name: "intermediate missing", want: "unknown authority", chain: func(_ *issuer, c [][]byte) [][]byte { return c[:1] }},
		{name: "another key", want: "another public key", chain: func(is *issuer, _ [][]byte) [][]byte {
			r, err := newRequest(mesh.KeyECP256, sa("web"))
			if err != nil {
				t.Error(err)
			}
			c, err := is.issue("default/web", r.csr)
			if err != nil {
				t.Error(err)
			}
			return c
		}},
		{name: "another root", want: "unknown authority", foreign: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				is := newIssuer(t, time.Hour)
				n := start(t, is, Config{}, "web")
				defer n.stop()
				synctest.Wait()
				first := n.must("web")
				is.set(func(i *issuer) { i.edit = tc.edit })
				if tc.foreign {
					a := newAuthority(t, time.Now())
					is.set(func(i *issuer) { i.inter, i.interKey = a.inter, a.interKey })
				}
				is.set(func(i *issuer) { i.spoil = tc.chain })
				time.Sleep(31 * time.Minute)
				synctest.Wait()
				if got := n.must("web"); got != first {
					t.Errorf("took a certificate with %s", tc.name)
				}
				if st := n.Status()[0]; !strings.Contains(st.LastError, tc.want) {
					t.Errorf("reports %q, want something with %q", st.LastError, tc.want)
				}
			})
		})
	}
}

// An identity that leaves the node is withdrawn at once and asked for no
// more, even when its certificate is on the way; one that comes is obtained.
func TestUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, time.Hour)
		n := start(t, is, Config{}, "web", "db")
		defer n.stop()
		synctest.Wait()
		n.must("db")
		is.set(func(i *issuer) {
			i.before = func(ctx context.Context, w string) error {
				if w == "default/slow" {
					<-ctx.Done()
					return nil // answers although nobody waits
				}
				return nil
			}
		})
		n.state.Workloads = is.workloads("web", "slow")
		n.Update(n.state)
		if _, ok := n.Get(sa("db")); ok {
			t.Error("an identity that left the node is still handed out")
		}
		synctest.Wait()
		n.state.Workloads = is.workloads("web", "mail")
		n.Update(n.state)
		synctest.Wait()
		n.must("mail")
		if _, ok := n.Get(sa("slow")); ok {
			t.Error("an answer for an identity that left was taken")
		}
		asked := is.count()
		time.Sleep(29 * time.Minute)
		synctest.Wait()
		if is.count() != asked {
			t.Error("asks for identities that left")
		}
	})
}

// An identity of another trust domain than the mesh's is never asked for.
func TestForeignTrustDomain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, time.Hour)
		n := start(t, is, Config{}, "web")
		defer n.stop()
		synctest.Wait()
		w := is.workloads("web")
		w[0].ID = mustID("spiffe://other.test/ns/default/sa/web")
		n.state.Workloads = w
		n.Update(n.state)
		synctest.Wait()
		if len(n.All()) != 0 || is.count() != 1 {
			t.Errorf("%d certificates, %d requests; want 0 and the 1 from before", len(n.All()), is.count())
		}
	})
}

// The same state again wakes nobody, but lets what failed try again at once.
func TestUpdateUnchanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, time.Hour)
		is.before = func(context.Context, string) error { return errors.New("away") }
		n := start(t, is, Config{}, "web")
		defer n.stop()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		is.set(func(i *issuer) { i.before = nil })
		changed := n.Changed()
		n.Update(n.state)
		select {
		case <-changed:
			t.Error("an unchanged state was announced")
		default:
		}
		time.Sleep(minBackoff)
		synctest.Wait()
		n.must("web")
	})
}

// When a root is taken out of the bundle, certificates under it are replaced
// without waiting for half life; one that is only added changes nothing.
func TestBundleChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, time.Hour)
		n := start(t, is, Config{}, "web")
		defer n.stop()
		synctest.Wait()
		first := n.must("web")
		next := newAuthority(t, time.Now())
		n.state.Bundle = []*x509.Certificate{is.root, next.root}
		changed := n.Changed()
		n.Update(n.state)
		synctest.Wait()
		select {
		case <-changed:
		default:
			t.Error("a new bundle was not announced")
		}
		if n.must("web") != first {
			t.Error("a root more replaced the certificate")
		}
		if got := n.Bundle(); len(got) != 2 {
			t.Errorf("bundle of %d", len(got))
		}
		is.set(func(i *issuer) { i.authority = next })
		n.state.Bundle = []*x509.Certificate{next.root}
		n.Update(n.state)
		synctest.Wait()
		if n.must("web").Serial == first.Serial {
			t.Error("the certificate under a retired root was kept")
		}
	})
}

// When another root signs, certificates below the one before are renewed soon,
// though they are good: that root is to be retired. They are not all renewed at
// once.
func TestAnotherRootSigns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, time.Hour)
		n := start(t, is, Config{Jitter: func() float64 { return 0.5 }}, "web")
		defer n.stop()
		synctest.Wait()
		first := n.must("web")
		next := newAuthority(t, time.Now())
		n.state.Bundle = []*x509.Certificate{next.root, is.root}
		is.set(func(i *issuer) { i.authority = next })
		n.Update(n.state)
		time.Sleep(rotationSpread/2 - time.Second)
		synctest.Wait()
		if n.must("web") != first {
			t.Error("renewed at once")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		second := n.must("web")
		if second.Serial == first.Serial {
			t.Error("the certificate below the root that no longer signs was kept")
		}
		n.Update(n.state)
		time.Sleep(rotationSpread)
		synctest.Wait()
		if n.must("web") != second {
			t.Error("renewed once more")
		}
	})
}

// Certificates below a distrusted root are renewed at once.
func TestDistrustedRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, time.Hour)
		n := start(t, is, Config{Jitter: func() float64 { return 0.9 }}, "web")
		defer n.stop()
		synctest.Wait()
		first := n.must("web")
		next := newAuthority(t, time.Now())
		n.state.Bundle, n.state.Distrusted = []*x509.Certificate{next.root, is.root}, [][sha256.Size]byte{sha256.Sum256(is.root.Raw)}
		is.set(func(i *issuer) { i.authority = next })
		n.Update(n.state)
		synctest.Wait()
		if n.must("web").Serial == first.Serial {
			t.Error("the certificate below a distrusted root was kept")
		}
	})
}

// A shorter lifetime is applied to the certificates that are there.
func TestShorterTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, time.Hour)
		n := start(t, is, Config{}, "web")
		defer n.stop()
		synctest.Wait()
		is.set(func(i *issuer) { i.ttl = 5 * time.Second })
		n.state.TTL = 5 * time.Second
		n.Update(n.state)
		synctest.Wait()
		if left := time.Until(n.must("web").NotAfter); left > 5*time.Second {
			t.Errorf("still has %v to live", left)
		}
	})
}

// When the control plane no longer knows one of two workloads of an identity,
// the other one is named.
func TestOtherWorkloadIsNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, time.Hour)
		w := is.workloads("a=web", "b=web")
		is.set(func(i *issuer) { delete(i.ids, "default/a") })
		n := prepare(t, is, Config{})
		n.Update(State{TrustDomain: td, Bundle: []*x509.Certificate{is.root}, Workloads: w})
		n.run()
		defer n.stop()
		time.Sleep(time.Second)
		synctest.Wait()
		n.must("web")
	})
}

// Very many identities at once: all are obtained, and never more requests are
// under way than there are workers.
func TestBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		is := newIssuer(t, 24*time.Hour)
		is.before = func(context.Context, string) error { time.Sleep(time.Millisecond); return nil }
		var specs []string
		for i := range 2_000 {
			specs = append(specs, fmt.Sprintf("w%d", i))
		}
		n := start(t, is, Config{Workers: 8}, specs...)
		defer n.stop()
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := len(n.All()); got != 2_000 {
			t.Errorf("%d certificates, want 2,000", got)
		}
		if is.peak > 8 || is.count() != 2_000 {
			t.Errorf("%d requests at once, %d in all; want 8 and 2,000", is.peak, is.count())
		}
	})
}

// A machine that was suspended: the wall clock has moved on and timers have
// not. What expired meanwhile is not handed out, and is renewed within
// seconds of waking and not half an hour later.
func TestSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asleep atomic.Int64 // nanoseconds
		now := func() time.Time { return time.Now().Add(time.Duration(asleep.Load())) }
		is := newIssuer(t, time.Hour)
		is.now = now
		n := start(t, is, Config{Now: now}, "web")
		defer n.stop()
		synctest.Wait()
		first := n.must("web")
		time.Sleep(time.Minute)
		asleep.Store(int64(2 * time.Hour))
		if _, ok := n.Get(sa("web")); ok {
			t.Error("a certificate that expired during the suspension is handed out")
		}
		time.Sleep(lookAround + time.Second)
		synctest.Wait()
		if n.must("web").Serial == first.Serial {
			t.Error("not renewed after the suspension")
		}
	})
}

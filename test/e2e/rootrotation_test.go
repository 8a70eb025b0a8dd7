package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/control"
	"github.com/signet-mesh/signet/test/harness"
)

const (
	rootTTL   = 20 * time.Second // of certificates
	rootEvery = 30 * time.Second // a root is replaced
)

// rotated is one rotation, as its time went.
type rotated struct {
	began, ended time.Time
	issuers      map[string]bool // that signed below the former root
	accepted     bool            // a certificate below the former root, before the end
}

// TestRootRotation: the root is replaced twice a minute, under a constant load of
// short connections beside long ones, with certificates of twenty seconds. Nothing
// fails. Once a root is withdrawn, no certificate below it opens a tunnel, not
// even one that whoever stole the intermediate has signed, and no tunnel that was
// opened with one takes new connections.
func TestRootRotation(t *testing.T) {
	lasts := 65 * time.Second
	if os.Getenv("SIGNET_TEST_LONG") != "" {
		lasts = 20 * time.Minute
	}
	m := rotating(t, rootTTL)
	ctx, cancel := context.WithTimeout(t.Context(), lasts)
	defer cancel()
	var rotations []rotated
	var wg sync.WaitGroup
	wg.Go(func() {
		for tick := time.NewTicker(rootEvery); ctx.Err() == nil; {
			one, err := rotateOnce(ctx, t, m)
			if err != nil {
				if ctx.Err() == nil {
					t.Errorf("rotation %d: %v", len(rotations)+1, err)
				}
				return
			}
			rotations = append(rotations, one)
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	})
	calls := underLoad(ctx, t, m)
	wg.Wait()
	if want := int(lasts / rootEvery); len(rotations) < want {
		t.Errorf("%d rotations in %s, want %d", len(rotations), lasts, want)
	}

	var records []audit.Record
	m.Eventually(20*time.Second, "the audit to hold every call", func() error {
		if records = m.Records(adminclient.AuditQuery{Side: audit.Destination, Verdicts: []audit.Verdict{audit.Allowed}}); len(records) < calls {
			return errors.New("some are missing")
		}
		return nil
	})
	issuer := issuersOf(t, m)
	used := map[string]bool{}
	for i := range records {
		r := &records[i]
		by := issuer[r.Source.Serial]
		used[by] = true
		for _, one := range rotations {
			if one.issuers[by] && r.Start.After(one.ended) {
				t.Errorf("%s was allowed %s after the root above its certificate %s was withdrawn", r.Source.ID, r.Start.Sub(one.ended), r.Source.Serial)
			}
		}
	}
	var longest time.Duration
	for i, one := range rotations {
		longest = max(longest, one.ended.Sub(one.began))
		if !one.accepted {
			t.Errorf("rotation %d: a certificate below the former root was refused before that was withdrawn, so its refusal later shows nothing", i+1)
		}
	}
	t.Logf("%d rotations, the longest took %s; %d calls were proven by certificates of %d issuers", len(rotations), longest.Round(10*time.Millisecond), len(records), len(used))
	if len(used) < len(rotations) {
		t.Errorf("certificates of %d issuers were used over %d rotations", len(used), len(rotations))
	}
}

// rotateOnce replaces the root, and tries a certificate below the former one
// before and after that is withdrawn.
func rotateOnce(ctx context.Context, t *testing.T, m *harness.Mesh) (rotated, error) {
	one := rotated{began: time.Now(), issuers: map[string]bool{}}
	stolen := stolenForge(t, m).sign(t, nil, "spiffe://mesh.test/ns/shop/sa/red")
	for _, by := range issuersOf(t, m) {
		one.issuers[by] = true
	}
	s, err := m.Client.RotateRoot(ctx, false)
	for said := adminv1.RotationStage(""); err == nil && s.Stage != adminv1.RotationIdle; s, err = m.Client.Authority(ctx) {
		if s.Stage != said {
			said = s.Stage
			t.Logf("%s: %s", time.Since(one.began).Round(10*time.Millisecond), s.Stage)
		}
		if s.Stage == adminv1.RotationRetiring && !one.accepted {
			one.accepted = opensTunnel(ctx, m, stolen)
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return one, ctx.Err()
		}
	}
	if err != nil {
		return one, err
	}
	// Withdrawn in the control plane; the node hears it at once.
	for opensTunnel(ctx, m, stolen) {
		if time.Since(one.began) > rootEvery {
			return one, errors.New("a certificate below a root that was withdrawn still opens tunnels")
		}
	}
	one.ended = time.Now()
	return one, nil
}

// opensTunnel reports whether the server's proxy lets in whoever shows a
// certificate.
func opensTunnel(ctx context.Context, m *harness.Mesh, cert *tls.Certificate) bool {
	raw, err := m.Pod("stranger").Dial(ctx, "tcp", "10.88.0.12:15008")
	if err != nil {
		return false
	}
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(5 * time.Second))
	conn := tls.Client(raw, &tls.Config{
		InsecureSkipVerify: true, //nolint:gosec // it is the server that is tested
		MinVersion:         tls.VersionTLS13, NextProtos: []string{"h2"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
	})
	if _, err := conn.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")); err != nil {
		return false
	}
	_, err = io.ReadFull(conn, make([]byte, 9)) // the server's SETTINGS
	return err == nil
}

// issuersOf returns, by serial number, which intermediate issued each certificate
// so far.
func issuersOf(t *testing.T, m *harness.Mesh) map[string]string {
	t.Helper()
	entries, err := ca.ReadLog(control.AuthorityDir(m.StateDir)).Entries(time.Time{})
	if err != nil {
		t.Error(err)
	}
	out := map[string]string{}
	for i := range entries {
		out[entries[i].Serial] = entries[i].Issuer
	}
	return out
}

// TestDistrust: a root that somebody else may have is replaced by one command.
// What was signed with the stolen key is refused, every connection from before
// ends, and new ones are served, all within seconds; those who were in a tunnel
// with a forged certificate are out.
func TestDistrust(t *testing.T) {
	m := rotating(t, time.Hour) // the life of certificates is no help
	stolen := stolenForge(t, m).sign(t, nil, "spiffe://mesh.test/ns/shop/sa/red")
	red, blue := hold(t, m.Pod("red"), serverAt), hold(t, m.Pod("blue"), serverAt)
	// A program that is not captured and hears of nothing: only the caller's node can
	// end what leads to it.
	m.Edit("direct.yaml", sdkWorkload(t, "direct")+speaker("direct", vipDirect, m.Pod("stranger").Addr.String(), sa("direct")))
	echoTLS(t, m.Pod("stranger"), spiffeSource(t, m, sa("direct")))
	direct := hold(t, m.Pod("red"), vipDirect+":81")
	thief, err := m.Pod("stranger").Dial(t.Context(), "tcp", "10.88.0.12:15008")
	if err != nil {
		t.Fatal(err)
	}
	defer thief.Close()
	tunnel := tls.Client(thief, &tls.Config{
		InsecureSkipVerify: true, //nolint:gosec // a thief does not care
		MinVersion:         tls.VersionTLS13, NextProtos: []string{"h2"},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return stolen, nil },
	})
	if _, err := tunnel.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(tunnel, make([]byte, 9)); err != nil {
		t.Fatalf("a forged certificate below the root is refused before anybody knows: %v", err)
	}
	if err := red.ping(); err != nil {
		t.Fatal(err)
	}

	began := time.Now()
	var issuers []string
	for _, by := range issuersOf(t, m) {
		issuers = append(issuers, by)
	}
	if out, code := m.CLI("ca", "distrust", "--yes"); code != 0 {
		t.Fatalf("signet ca distrust: %d\n%s", code, out)
	}
	t.Logf("the root was replaced within %s", time.Since(began).Round(10*time.Millisecond))
	m.Eventually(5*time.Second, "the forged certificate to be refused", func() error {
		if opensTunnel(t.Context(), m, stolen) {
			return errors.New("it still opens tunnels")
		}
		return nil
	})
	t.Logf("a forged certificate is refused %s after the command", time.Since(began).Round(10*time.Millisecond))
	_ = thief.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.Copy(io.Discard, tunnel); err == nil || timedOut(err) {
		t.Errorf("the thief's tunnel is still open: %v", err)
	}
	for name, h := range map[string]*held{"red": red, "blue": blue, "red, without a tunnel": direct} {
		if err := h.ping(); err == nil || timedOut(err) {
			t.Errorf("a connection of %s from before is still open: %v", name, err)
		}
	}
	t.Logf("every connection from before had ended after %s", time.Since(began).Round(10*time.Millisecond))
	for _, name := range []string{"red", "blue"} {
		if err := callEcho(t.Context(), m.Pod(name), serverAt); err != nil {
			t.Errorf("a new call of %s: %v", name, err)
		}
	}
	if err := callEcho(t.Context(), m.Pod("red"), vipDirect+":81"); err != nil {
		t.Errorf("a new call without a tunnel: %v", err)
	}
	t.Logf("new calls were served after %s", time.Since(began).Round(10*time.Millisecond))
	certs, err := m.Client.Certificates(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range certs {
		if slices.Contains(issuers, c.Issuer) {
			t.Errorf("%s still has a certificate from before", c.Holder)
		}
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %s, want some seconds", took)
	}

	// It ends tunnels once.
	again := hold(t, m.Pod("red"), serverAt)
	killAgent(t, m)
	time.Sleep(3 * time.Second)
	if err := again.ping(); err != nil {
		t.Errorf("a connection from afterwards ended when the agent was started again: %v", err)
	}
}

package e2e

import (
	"bufio"
	"context"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/control"
	"github.com/signet-mesh/signet/test/harness"
)

// envVerifier makes the test program the verifier of tokens for this audience.
const envVerifier = "SIGNET_E2E_VERIFIER"

var (
	appID    = spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/app")
	ledgerID = spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/ledger")
)

// verify reads tokens, one a line, and says of each whose it is: by its own
// JWTSource, and by asking the agent. Both must agree.
func verify(audience string) error {
	ctx := context.Background()
	src, err := workloadapi.NewJWTSource(ctx)
	if err != nil {
		return err
	}
	defer src.Close()
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		token := lines.Text()
		bySource, errSource := jwtsvid.ParseAndValidate(token, src, []string{audience})
		byAgent, errAgent := workloadapi.ValidateJWTSVID(ctx, token, audience)
		switch {
		case errSource == nil && errAgent == nil && bySource.ID == byAgent.ID:
			fmt.Println(bySource.ID)
		case errSource != nil && errAgent != nil:
			fmt.Println("refused:", status.Code(errAgent), status.Convert(errAgent).Message())
		default:
			fmt.Printf("they disagree: %v, %v\n", errSource, errAgent)
		}
	}
	return lines.Err()
}

// verifier is a running verifier, a program and a workload of its own.
type verifier struct {
	t   *testing.T
	in  io.Writer
	out *bufio.Reader
}

func startVerifier(t *testing.T, m *harness.Mesh, program, audience string) *verifier {
	t.Helper()
	c := exec.Command(program)
	c.Env = append(os.Environ(), envVerifier+"="+audience, "SPIFFE_ENDPOINT_SOCKET=unix://"+filepath.Join(m.RunDir, "api", "agent.sock"))
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := c.Wait(); err != nil {
			t.Errorf("the verifier: %v", err)
		}
	})
	return &verifier{t, in, bufio.NewReader(out)}
}

func (v *verifier) says(token string) string {
	v.t.Helper()
	if _, err := fmt.Fprintln(v.in, token); err != nil {
		v.t.Fatal(err)
	}
	line, err := v.out.ReadString('\n')
	if err != nil {
		v.t.Fatalf("the verifier: %v", err)
	}
	return strings.TrimSpace(line)
}

func (v *verifier) takes(what, token string) {
	v.t.Helper()
	if got := v.says(token); got != appID.String() {
		v.t.Errorf("%s: %s; want %s", what, got, appID)
	}
}

// copyOf copies the test program.
func copyOf(t *testing.T, exe string) string {
	t.Helper()
	raw, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "verifier-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "ledger")
	if err := os.WriteFile(path, raw, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// jwtKeyLife is how long a key signs in this test: the next is published after
// three quarters.
const jwtKeyLife = 24 * time.Second

// TestJWT: a workload gets a token through go-spiffe; another workload, a program
// of its own, takes it, by its own judgement and by the agent's. Over a rotation
// of the signing key, a crash of the control plane, one of the agent, and while
// the control plane does not answer, what was taken is taken still.
func TestJWT(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ledger := copyOf(t, exe)
	entry := func(name, path string) string {
		return harness.Program("shop", name, os.Geteuid(), path)
	}
	base := harness.Config("1h") + harness.Namespace("shop", "enforce")
	m := harness.Start(t, harness.Options{
		Documents: map[string]string{"mesh.yaml": base + entry("app", exe) + entry("ledger", ledger)},
		Args:      []string{"--jwt-key-life", jwtKeyLife.String()},
	})
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	src, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+filepath.Join(m.RunDir, "api", "agent.sock"))))
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	fetch := func(audience ...string) (*jwtsvid.SVID, error) {
		return src.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience[0], ExtraAudiences: audience[1:]})
	}
	v := startVerifier(t, m, ledger, ledgerID.String())

	first, err := fetch(ledgerID.String())
	if err != nil {
		t.Fatal(err)
	}
	if ttl := time.Until(first.Expiry); first.ID != appID || ttl > ca.DefaultJWTTTL || ttl < ca.DefaultJWTTTL-time.Minute {
		t.Fatalf("%s for %s", first.ID, ttl)
	}
	v.takes("a token", first.Marshal())
	forAnother, err := fetch("spiffe://mesh.test/ns/shop/sa/bank")
	if err != nil {
		t.Fatal(err)
	}
	if got := v.says(forAnother.Marshal()); !strings.HasPrefix(got, "refused: InvalidArgument") {
		t.Errorf("a token for another: %s", got)
	}
	parts := strings.Split(first.Marshal(), ".")
	if got := v.says(parts[0] + "." + parts[1] + "." + strings.Split(forAnother.Marshal(), ".")[2]); !strings.HasPrefix(got, "refused: InvalidArgument") {
		t.Errorf("a token with another's signature: %s", got)
	}

	// The rotation. The next key is with the verifier before anything is signed
	// with it. Each fetch is for an audience of its own: tokens are kept.
	keys := func() map[string]crypto.PublicKey {
		b, err := src.GetJWTBundleForTrustDomain(appID.TrustDomain())
		if err != nil {
			t.Fatal(err)
		}
		return b.JWTAuthorities()
	}
	if n := len(keys()); n != 1 {
		t.Fatalf("%d keys at the start", n)
	}
	var publishedAfter, switchedAfter time.Duration
	var next *jwtsvid.SVID
	for n := 0; switchedAfter == 0; n++ {
		known := keys()
		if len(known) > 1 && publishedAfter == 0 {
			publishedAfter = time.Since(began)
		}
		token, err := fetch(ledgerID.String(), fmt.Sprint("probe-", n))
		if err != nil {
			t.Fatalf("during the rotation: %v", err)
		}
		v.takes("a token during the rotation", token.Marshal())
		v.takes("the first token, during the rotation", first.Marshal())
		if kid(t, token) != kid(t, first) {
			switchedAfter, next = time.Since(began), token
			if known[kid(t, token)] == nil {
				t.Error("a token of a key that was not published before")
			}
		}
		if time.Since(began) > 3*jwtKeyLife {
			t.Fatalf("no rotation in %s; keys %v", time.Since(began), slices.Collect(maps.Keys(known)))
		}
		time.Sleep(200 * time.Millisecond)
	}
	t.Logf("the next key was published after %s and signed after %s", publishedAfter.Round(100*time.Millisecond), switchedAfter.Round(100*time.Millisecond))
	if ahead := switchedAfter - publishedAfter; publishedAfter == 0 || ahead < jwtKeyLife/8 {
		t.Errorf("the next key was published %s before it signed", ahead)
	}

	// Without the control plane: what is held is given out, and verified.
	pid := m.Pid("control")
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resume := func() { _ = syscall.Kill(pid, syscall.SIGCONT) } // else it could not be stopped in the ordinary way
	t.Cleanup(resume)
	if again, err := fetch(ledgerID.String()); err != nil || again.Marshal() != first.Marshal() {
		t.Errorf("the token that is held: %v, %v", again, err)
	}
	if token, err := fetch("never asked for"); status.Code(err) != codes.Unavailable {
		t.Errorf("a token that the control plane would have to sign: %v, %v", token, err)
	}
	m.Kill("agent")
	m.Eventually(20*time.Second, "the agent to be back", func() error {
		if got := v.says(first.Marshal()); got != appID.String() {
			return errors.New(got)
		}
		return nil
	})
	v.takes("the newer token, by an agent that started without a control plane", next.Marshal())

	// A new control plane has the keys of the one before.
	resume()
	m.Kill("control")
	m.Eventually(20*time.Second, "the control plane to be back", func() error {
		_, err := fetch(ledgerID.String(), "after the crash")
		return err
	})
	v.takes("the first token, after a crash of the control plane", first.Marshal())

	// Every token is in the issuance log under its jti, with whom it was for.
	entry1, ok, err := ca.ReadLog(control.AuthorityDir(m.StateDir)).Find(first.Claims["jti"].(string))
	if err != nil || !ok || entry1.Kind != ca.KindJWT || entry1.Workload != "shop/app" || entry1.Node != "n1" || entry1.Issuer != kid(t, first) || !slices.Equal(entry1.Audience, []string{ledgerID.String()}) {
		t.Errorf("%+v, %t, %v", entry1, ok, err)
	}
	if got := issuedHere(m, entry1.Serial); !slices.Equal(got, []string{"shop/app " + entry1.ID}) {
		t.Errorf("the node's audit has of the token %q", got)
	}

	if os.Getenv("SIGNET_TEST_LONG") != "" {
		for tick := time.Now(); time.Until(first.Expiry) > 2*time.Second; time.Sleep(time.Second) {
			v.takes("the first token, before it expires", first.Marshal())
			if time.Since(tick) > 10*time.Second {
				tick = time.Now()
				t.Logf("%d keys; the first token ends in %s", len(keys()), time.Until(first.Expiry).Round(time.Second))
			}
		}
		time.Sleep(time.Until(first.Expiry) + time.Second)
		// go-spiffe's own judgement grants a minute more; the agent's does not.
		if _, err := workloadapi.ValidateJWTSVID(ctx, first.Marshal(), ledgerID.String(), workloadapi.WithAddr("unix://"+filepath.Join(m.RunDir, "api", "agent.sock"))); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "expired") {
			t.Errorf("the first token, after it expired: %v", err)
		}
	}

	// The entitlement goes, and with it the tokens.
	m.Edit("mesh.yaml", base+entry("ledger", ledger))
	m.Eventually(10*time.Second, "the identity to be taken away", func() error {
		if _, err := fetch(ledgerID.String()); status.Code(err) != codes.PermissionDenied {
			return fmt.Errorf("got %w, want PermissionDenied", err)
		}
		return nil
	})
}

// kid is the key of a token.
func kid(t *testing.T, s *jwtsvid.SVID) string {
	t.Helper()
	raw, err := base64.RawURLEncoding.DecodeString(strings.Split(s.Marshal(), ".")[0])
	if err != nil {
		t.Fatal(err)
	}
	var header struct{ Kid string }
	if err := json.Unmarshal(raw, &header); err != nil {
		t.Fatal(err)
	}
	return header.Kid
}

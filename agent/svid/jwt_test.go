package svid

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/mesh"
)

var (
	webID = spiffeid.RequireFromString("spiffe://mesh.test/ns/default/sa/web")
	dbID  = spiffeid.RequireFromString("spiffe://mesh.test/ns/default/sa/db")
)

// tokens issues with a real authority, and may be told to do otherwise.
type tokens struct {
	authority *ca.Authority

	mu     sync.Mutex
	ids    map[string]spiffeid.ID                                   // guarded by mu; by workload
	asked  []string                                                 // guarded by mu; workloads
	answer func(workload string, audience []string) (string, error) // guarded by mu; nil: as it should
	delay  time.Duration                                            // guarded by mu
}

func newTokens(t *testing.T) *tokens {
	t.Helper()
	a, err := ca.Open(ca.Options{Dir: t.TempDir() + "/ca", TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return &tokens{authority: a, ids: map[string]spiffeid.ID{"default/web-1": webID, "default/web-2": webID, "default/db-1": dbID}}
}

func (i *tokens) IssueJWT(_ context.Context, workload string, audience []string) (string, error) {
	i.mu.Lock()
	i.asked = append(i.asked, workload)
	id, answer, delay := i.ids[workload], i.answer, i.delay
	i.mu.Unlock()
	time.Sleep(delay)
	if answer != nil {
		return answer(workload, audience)
	}
	return i.issue(id, audience)
}

func (i *tokens) issue(id spiffeid.ID, audience []string) (string, error) {
	p, err := i.authority.PrepareJWT(ca.JWTRequest{ID: id, Audience: audience})
	if err != nil {
		return "", err
	}
	issued, err := i.authority.IssueJWT(p)
	if err != nil {
		return "", err
	}
	return issued.Token, nil
}

func (i *tokens) set(answer func(string, []string) (string, error)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.answer = answer
}

func (i *tokens) count() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.asked)
}

func (i *tokens) keys() map[string]crypto.PublicKey {
	out := map[string]crypto.PublicKey{}
	keys, _ := i.authority.JWTKeys()
	for _, k := range keys {
		out[k.ID] = k.Key
	}
	return out
}

func (i *tokens) state(workloads ...string) State {
	s := State{TrustDomain: td, JWTKeys: i.keys()}
	for _, name := range workloads {
		s.Workloads = append(s.Workloads, mesh.Workload{Namespace: "default", Name: name, ID: i.ids["default/"+name]})
	}
	return s
}

// withTokens runs a test with a clock of its own: the manager holds web-1,
// which has the identity webID.
func withTokens(t *testing.T, f func(t *testing.T, m *Manager, i *tokens)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		i := newTokens(t)
		m := New(Config{JWTIssuer: i, Log: slog.New(slog.DiscardHandler), Jitter: func() float64 { return 0.5 }})
		m.Update(i.state("web-1"))
		f(t, m, i)
	})
}

func getToken(t *testing.T, m *Manager, audience ...string) *JWT {
	t.Helper()
	token, err := m.JWT(t.Context(), webID, audience)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// A token is given again until half of its life is over, to those who ask for
// the same audience, and then the next one.
func TestTokenIsKeptForHalfItsLife(t *testing.T) {
	withTokens(t, func(t *testing.T, m *Manager, i *tokens) {
		first := getToken(t, m, "ledger")
		if first.ID != webID || time.Until(first.ExpiresAt) < ca.DefaultJWTTTL-time.Second {
			t.Fatalf("%+v", first)
		}
		if other := getToken(t, m, "ledger", "bank"); other == first || len(other.Audience) != 2 {
			t.Errorf("for two audiences: %+v", other)
		}
		// One audience that looks like the join of two is another one.
		two := getToken(t, m, "a", "b")
		for _, one := range []string{"ab", `a""b`, `a","b`} {
			if getToken(t, m, one) == two {
				t.Errorf("one token for %q and for a and b", one)
			}
		}
		time.Sleep(ca.DefaultJWTTTL/2 - 2*time.Second)
		if again := getToken(t, m, "ledger"); again != first {
			t.Error("another token before half of its life is over")
		}
		time.Sleep(4 * time.Second)
		next := getToken(t, m, "ledger")
		if next == first || next.ExpiresAt.Sub(first.ExpiresAt) < ca.DefaultJWTTTL/3 {
			t.Errorf("after half of its life: %+v", next)
		}
		if n := i.count(); n != 7 {
			t.Errorf("asked %d times", n)
		}
	})
}

// Without the control plane a token is given until it expires, without asking
// at every call; then there is none.
func TestTokenWithoutTheIssuer(t *testing.T) {
	withTokens(t, func(t *testing.T, m *Manager, i *tokens) {
		first := getToken(t, m, "ledger")
		i.set(func(string, []string) (string, error) { return "", status.Error(codes.Unavailable, "away") })
		time.Sleep(ca.DefaultJWTTTL * 3 / 4)
		for range 100 {
			if got := getToken(t, m, "ledger"); got != first {
				t.Fatal("another token")
			}
		}
		if n := i.count(); n > 3 {
			t.Errorf("asked %d times", n)
		}
		time.Sleep(time.Until(first.ExpiresAt))
		if got, err := m.JWT(t.Context(), webID, []string{"ledger"}); status.Code(err) != codes.Unavailable {
			t.Errorf("after its expiry: %v, %v", got, err)
		}
		i.set(nil)
		if got := getToken(t, m, "ledger"); got == first {
			t.Error("still the token that expired")
		}
	})
}

// What the issuer answers is believed only after a look at it.
func TestTokenAnswers(t *testing.T) {
	withTokens(t, func(t *testing.T, m *Manager, i *tokens) {
		stranger := newTokens(t)
		for name, answer := range map[string]func(string, []string) (string, error){
			"another identity": func(_ string, a []string) (string, error) { return i.issue(dbID, a) },
			"another audience": func(string, []string) (string, error) { return i.issue(webID, []string{"bank"}) },
			"more audiences":   func(_ string, a []string) (string, error) { return i.issue(webID, append(a, "bank")) },
			"an unknown key":   func(_ string, a []string) (string, error) { return stranger.issue(webID, a) },
			"nothing":          func(string, []string) (string, error) { return "", nil },
			"no token":         func(string, []string) (string, error) { return "a.b.c", nil },
		} {
			i.set(answer)
			if got, err := m.JWT(t.Context(), webID, []string{"ledger"}); err == nil {
				t.Errorf("%s: taken: %+v", name, got)
			}
		}
	})
}

// Of many who ask at once one asks the issuer.
func TestTokenIsAskedForOnce(t *testing.T) {
	withTokens(t, func(t *testing.T, m *Manager, i *tokens) {
		i.delay = time.Second
		ask := func() {
			var wg sync.WaitGroup
			for range 50 {
				wg.Go(func() {
					if _, err := m.JWT(t.Context(), webID, []string{"ledger"}); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
		}
		ask()
		if n := i.count(); n != 1 {
			t.Errorf("asked %d times for the first", n)
		}
		// Renewing keeps nobody waiting but the one who asks.
		time.Sleep(ca.DefaultJWTTTL * 3 / 4)
		begin := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() { getToken(t, m, "ledger") })
		synctest.Wait()
		getToken(t, m, "ledger")
		if took := time.Since(begin); took != 0 {
			t.Errorf("waited %s for another's renewal", took)
		}
		wg.Wait()
		if n := i.count(); n != 2 {
			t.Errorf("asked %d times in all", n)
		}
		// Somebody who cannot wait does not spoil it for the others.
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		wg.Go(func() { getToken(t, m, "bank") })
		synctest.Wait()
		if _, err := m.JWT(ctx, webID, []string{"bank"}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
		wg.Wait()
	})
}

// One identity takes up no more than its share: of what is kept, and of what is
// asked for.
func TestTokenBounds(t *testing.T) {
	withTokens(t, func(t *testing.T, m *Manager, i *tokens) {
		kept := func() int {
			m.mu.Lock()
			defer m.mu.Unlock()
			return len(m.holders[webID].tokens)
		}
		var last error
		for n := range 2 * maxTokens {
			if _, last = m.JWT(t.Context(), webID, []string{fmt.Sprint("a", n)}); last != nil {
				break
			}
		}
		if n := i.count(); !errors.Is(last, ErrTooMany) || n != tokenBurst {
			t.Errorf("asked %d times, then %v", n, last)
		}
		for n := range 2 * maxTokens { // within the rate
			time.Sleep(time.Second / tokenRate)
			getToken(t, m, fmt.Sprint("b", n))
		}
		if n := kept(); n > maxTokens {
			t.Errorf("%d tokens kept", n)
		}
		// What is in use stays.
		before := i.count()
		getToken(t, m, fmt.Sprint("b", 2*maxTokens-1))
		if i.count() != before {
			t.Error("the newest token was forgotten")
		}
	})
}

// An identity that is gone has no token any more, also when it comes back; of
// several workloads with an identity one that is gone is no obstacle.
func TestTokenOfAnIdentityThatGoes(t *testing.T) {
	withTokens(t, func(t *testing.T, m *Manager, i *tokens) {
		first := getToken(t, m, "ledger")
		m.Update(i.state("db-1"))
		if _, err := m.JWT(t.Context(), webID, []string{"ledger"}); !errors.Is(err, ErrNotHeld) {
			t.Errorf("%v", err)
		}
		m.Update(i.state("web-1", "web-2"))
		i.set(func(workload string, a []string) (string, error) {
			if workload == "default/web-1" {
				return "", status.Error(codes.PermissionDenied, "not on this node")
			}
			return i.issue(webID, a)
		})
		if got := getToken(t, m, "ledger"); got == first {
			t.Error("the token from before")
		}
	})
}

// A key that is withdrawn takes its tokens with it, and whoever waits for a
// change is told; the same keys again are none.
func TestTokenOfAKeyThatIsWithdrawn(t *testing.T) {
	withTokens(t, func(t *testing.T, m *Manager, i *tokens) {
		first := getToken(t, m, "ledger")
		changed := m.Changed()
		m.Update(i.state("web-1"))
		select {
		case <-changed:
			t.Error("a change where there is none")
		default:
		}
		if again := getToken(t, m, "ledger"); again != first {
			t.Error("another token with the same keys")
		}
		next := newTokens(t)
		i.authority = next.authority
		m.Update(i.state("web-1"))
		select {
		case <-changed:
		default:
			t.Error("nobody is told of the new key")
		}
		if got := getToken(t, m, "ledger"); got.KeyID == first.KeyID || m.JWTBundle().HasJWTAuthority(first.KeyID) {
			t.Errorf("a token of the key that was withdrawn: %+v", got)
		}
	})
}

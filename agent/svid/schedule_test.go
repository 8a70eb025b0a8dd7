package svid

import (
	"encoding/pem"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func mustID(s string) spiffeid.ID { return spiffeid.RequireFromString(s) }

func pemOf(chain [][]byte) []byte {
	var out []byte
	for _, der := range chain {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

// Identities issued together do not come back together: ±10% of half life.
func TestRenewAt(t *testing.T) {
	now := time.Unix(1000, 0)
	for _, tc := range []struct {
		jitter float64
		want   time.Duration
	}{{0, 27 * time.Minute}, {0.5, 30 * time.Minute}, {1, 33 * time.Minute}} {
		if got := renewAt(now, now.Add(time.Hour), tc.jitter).Sub(now); got != tc.want {
			t.Errorf("jitter %v: renew after %v, want %v", tc.jitter, got, tc.want)
		}
	}
}

func TestBackoff(t *testing.T) {
	for _, tc := range []struct {
		failures  int
		remaining time.Duration
		jitter    float64
		want      time.Duration
	}{
		{1, 0, 0, 100 * time.Millisecond},
		{1, 0, 1, 50 * time.Millisecond},
		{4, time.Hour, 0, 800 * time.Millisecond},
		{1 << 30, time.Hour, 0, 30 * time.Second}, // bounded, and soon
		{50, time.Minute, 0, 6 * time.Second},     // a tenth of what is left
		{50, 2 * time.Second, 0, 200 * time.Millisecond},
		{50, time.Millisecond, 0, 100 * time.Millisecond}, // never a tight loop
		{50, -time.Hour, 0, 30 * time.Second},             // nothing left to lose
	} {
		if got := backoff(tc.failures, tc.remaining, tc.jitter); got != tc.want {
			t.Errorf("backoff(%d, %v, %v) = %v, want %v", tc.failures, tc.remaining, tc.jitter, got, tc.want)
		}
	}
}

package e2e

import (
	"errors"
	"net/http"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/xds"
)

// TestTunnelNamesWorkload: every answer to a CONNECT says which workload it is
// of: admitted, refused, and when the application is not there.
//
// What it defends: the caller's record names who answered and not who had the
// address before; see reached, in package accesslog.
func TestTunnelNamesWorkload(t *testing.T) {
	m := plainMesh(t)
	var served atomic.Int64
	serve(t, m.Pod("server"), "10.88.0.12:8080", greet(&served))
	serve(t, m.Pod("watched"), "10.88.0.13:8080", greet(&served))
	forge := stolenForge(t, m)
	const other = "spiffe://mesh.test/ns/shop/sa/server"
	for _, test := range []struct {
		name, id, addr, port, workload string
		status                         int
	}{
		{"admitted", idClient, "10.88.0.12", "8080", "shop/server", http.StatusOK},
		{"refused", other, "10.88.0.12", "8080", "shop/server", http.StatusForbidden},
		{"nobody listens", idClient, "10.88.0.12", "8099", "shop/server", http.StatusServiceUnavailable},
		{"observed", other, "10.88.0.13", "8080", "old/watched", http.StatusOK},
	} {
		t.Run(test.name, func(t *testing.T) {
			u := openTunnel(t, m.Pod("stranger"), test.addr, forge.sign(t, nil, test.id))
			authority := test.addr + ":" + test.port
			req := (&http.Request{Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: authority}, Host: authority, Header: http.Header{}}).WithContext(t.Context())
			resp, err := u.conn.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if got := resp.Header.Values(xds.HeaderWorkload); resp.StatusCode != test.status || len(got) != 1 || got[0] != test.workload {
				t.Errorf("%d by %q, want %d by %q", resp.StatusCode, got, test.status, test.workload)
			}
		})
	}
	if _, _, err := callGreeter(t.Context(), m.Pod("client"), "10.88.0.12:8080", "x"); err != nil {
		t.Fatal(err)
	}
	m.Eventually(15*time.Second, "the caller's record", func() error {
		for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Source}) {
			if r.Verdict == audit.Allowed && r.Destination.Workload == "shop/server" {
				return nil
			}
		}
		return errors.New("none")
	})
}

package control

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
)

// Defends: what somebody tries with a stolen node certificate is counted in the
// metric and durable in the issuance log, and trying often does not fill that.
func TestRefusals(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	dir := filepath.Join(t.TempDir(), "ca")
	authority, err := ca.Open(ca.Options{Dir: dir, TrustDomain: spiffeid.RequireTrustDomainFromString("mesh.example"), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	defer authority.Close()
	c := &control{refusals: newRefusals(), log: log}
	c.authority.Store(authority)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); c.refusals.keep(ctx, authority, log) }()

	const tries = 5000
	for range tries {
		c.refusals.add(caserver.Refusal{Call: "Issue", Node: "n1", Workload: "pay/ledger-1", From: "10.0.0.9", Reason: caserver.ReasonNode, Message: "not there"})
	}
	for range tries { // with ever new words
		c.refusals.add(caserver.Refusal{Call: "Issue", Node: "n2", Workload: strings.Repeat("x", int(time.Now().UnixNano()%9999)), Reason: caserver.ReasonNode, Message: strings.Repeat("long ", 5000)})
	}
	c.refusals.add(caserver.Refusal{Call: "Issue", Node: "n3", Reason: caserver.ReasonStarting})
	cancel()
	<-done

	list, err := c.refused("", "")
	if err != nil {
		t.Fatal(err)
	}
	count := map[string]uint64{}
	for _, r := range list.Refused {
		count[r.Node] += r.Count
		if len(r.Reason) > 1024 || len(r.Workload) > 1024 {
			t.Errorf("a reason of %d bytes", len(r.Reason))
		}
		if r.Node == "n1" && (r.Workload != "pay/ledger-1" || r.From != "10.0.0.9" || r.Why != "node" || r.Reason != "not there" || r.Call != "Issue") {
			t.Errorf("%+v", r)
		}
	}
	if count["n1"] != tries || count["n2"] != tries || count["n3"] != 0 || len(list.Refused) > 40 {
		t.Errorf("%v in %d lines", count, len(list.Refused))
	}
	if later, err := c.refused(time.Now().Add(time.Hour).Format(time.RFC3339), "5"); err != nil || len(later.Refused) != 0 {
		t.Errorf("%+v, %v", later, err)
	}
	for since, limit := range map[string]string{"yesterday": "", "": "-1"} {
		if _, err := c.refused(since, limit); err == nil {
			t.Errorf("since %q, limit %q is taken", since, limit)
		}
	}
	w := httptest.NewRecorder()
	promhttp.HandlerFor(c.metrics(), promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for _, want := range []string{`signet_control_refused_total{reason="node"} 10000`, `signet_control_refused_total{reason="starting"} 1`, `signet_control_refused_total{reason="rate"} 0`} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("%q is not in the metrics", want)
		}
	}
}

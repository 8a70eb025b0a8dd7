package agent

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/adminserver"
)

// admin answers an operator's questions.
func (a *agent) admin() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { adminserver.Answer(w, a.status(), nil) })
	mux.HandleFunc("GET /v1/certificates", func(w http.ResponseWriter, _ *http.Request) { adminserver.Answer(w, a.certificates(), nil) })
	mux.HandleFunc("GET /v1/audit", a.queryAudit)
	mux.HandleFunc("GET /v1/audit/verify", func(w http.ResponseWriter, r *http.Request) {
		v, err := a.store.Verify(r.Context())
		adminserver.Answer(w, v, err)
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.metrics(), promhttp.HandlerOpts{}))
	return mux
}

func (a *agent) status() adminv1.AgentStatus {
	a.mu.Lock()
	s := a.state
	a.mu.Unlock()
	connected, settled, _ := a.proxy(s)
	out := adminv1.AgentStatus{
		Node: a.cfg.Node, Version: a.cfg.Version, ControlConnected: a.connected.Load(), ProxyConnected: connected,
		Workloads: []adminv1.WorkloadStatus{}, Audit: a.store.Stats(),
	}
	if s == nil {
		return out
	}
	if settled {
		out.Revision = s.revision
	}
	problems := a.problems(s, connected)
	for i := range s.workloads {
		w := &s.workloads[i]
		problem := problems[w.Key()]
		out.Workloads = append(out.Workloads, adminv1.WorkloadStatus{
			Workload: w.Key(), ID: w.ID.String(), Mode: s.modes[w.Namespace].String(), Connections: a.live.count(w.Key()),
			Captured: w.Capture != nil && problem == "", Problem: problem,
		})
	}
	return out
}

// problems says, by workload, what was wrong with those that are to be captured
// when they were last looked at; "" if nothing was.
func (a *agent) problems(s *nodeState, connected bool) map[string]string {
	out := map[string]string{}
	lacking := a.svids.Missing()
	a.rules.mu.Lock()
	defer a.rules.mu.Unlock()
	for i := range s.workloads {
		w := &s.workloads[i]
		if w.Capture == nil {
			continue
		}
		problem, looked := a.rules.seen[w.Key()]
		switch {
		case !looked:
			problem = "not looked at yet"
		case problem == "" && (!connected || a.rules.proxy != a.relay.Generation()):
			problem = "the proxy is not connected, or has not been looked at yet"
		case problem == "":
			problem = a.probes.wrong(w)
			if why, lacks := lacking[w.ID]; lacks && problem == "" {
				problem = uncertified(why)
			}
		}
		out[w.Key()] = problem
	}
	return out
}

// uncertified is the problem of a pod that is captured, but has no valid
// certificate: it reaches nobody, and nobody reaches it.
func uncertified(why string) string {
	if why == "" {
		return "captured, but it has no certificate yet"
	}
	return "captured, but it has no valid certificate: " + why
}

func (a *agent) certificates() []adminv1.Certificate {
	out := a.svids.Status()
	if c, ok := a.node.status(); ok {
		out = append([]adminv1.Certificate{c}, out...)
	}
	return out
}

// queryAudit streams records as newline-delimited JSON, oldest first.
func (a *agent) queryAudit(w http.ResponseWriter, r *http.Request) {
	f, err := auditFilter(r)
	if err != nil {
		adminserver.Answer(w, nil, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	enc := json.NewEncoder(w)
	if err := a.tailer.Sync(r.Context()); err != nil { // what has happened is in the answer
		adminserver.Answer(w, nil, err)
		return
	}
	if err := a.store.Query(r.Context(), f, func(rec audit.Record) error { return enc.Encode(rec) }); err != nil {
		a.log.Error("audit query", "error", err)
		// The status is out; a line that is no record tells the client.
		_ = enc.Encode(map[string]string{"error": err.Error()})
	}
}

func auditFilter(r *http.Request) (audit.Filter, error) {
	q := r.URL.Query()
	f := audit.Filter{From: q.Get("from"), To: q.Get("to"), Side: audit.Side(q.Get("side")), ID: q.Get("id"), Serial: q.Get("serial")}
	for name, at := range map[string]*time.Time{"since": &f.Since, "until": &f.Until} {
		if s := q.Get(name); s != "" {
			t, err := time.Parse(time.RFC3339Nano, s)
			if err != nil {
				return f, fmt.Errorf("%s: %q is not a time like 2006-01-02T15:04:05Z", name, s)
			}
			*at = t
		}
	}
	if s := q.Get("limit"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 {
			return f, fmt.Errorf("limit: %q is not a number from 0", s)
		}
		f.Limit = n
	}
	for _, list := range q["verdict"] {
		for _, v := range strings.Split(list, ",") {
			if v == "" {
				continue
			}
			verdict, err := audit.ParseVerdict(v)
			if err != nil {
				return f, fmt.Errorf("verdict: %w", err)
			}
			f.Verdicts = append(f.Verdicts, verdict)
		}
	}
	if f.Side != "" && f.Side != audit.Source && f.Side != audit.Destination {
		return f, fmt.Errorf("side: %q is neither source nor destination", f.Side)
	}
	return f, nil
}

// metrics describes the node at the instant it is asked.
func (a *agent) metrics() *prometheus.Registry {
	r := prometheus.NewRegistry()
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
	}
	truth := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	gauge("signet_agent_control_connected", "1 while the control plane's stream is open.", func() float64 { return truth(a.connected.Load()) })
	gauge("signet_agent_proxy_connected", "1 while the proxy's stream is open.", func() float64 { c, _, _ := a.relay.Proxy(); return truth(c) })
	gauge("signet_audit_records", "Records in the audit store.", func() float64 { return float64(a.store.Stats().Records) })
	gauge("signet_audit_lost", "Records known to be missing.", func() float64 { return float64(a.store.Stats().Gaps) })
	if a.volumes != nil {
		gauge("signet_agent_volumes", "Volumes of csi.signet.dev that pods have mounted.", func() float64 { all, _ := a.volumes.Count(); return float64(all) })
		gauge("signet_agent_volumes_without_certificate", "Those of them whose certificate has expired without another.", func() float64 { _, empty := a.volumes.Count(); return float64(empty) })
	}
	gauge("signet_workloads_not_captured", "Workloads that ask for capture and are not captured.", func() float64 {
		n := 0
		for _, w := range a.status().Workloads {
			if w.Problem != "" {
				n++
			}
		}
		return float64(n)
	})
	r.MustRegister(refused{a.refusals})
	gauge("signet_svid_not_after_timestamp_seconds", "The earliest end of a certificate on this node.", func() float64 {
		var first time.Time
		for _, c := range a.certificates() {
			if first.IsZero() || !c.NotAfter.IsZero() && c.NotAfter.Before(first) {
				first = c.NotAfter
			}
		}
		return float64(first.Unix())
	})
	return r
}

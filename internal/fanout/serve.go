package fanout

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/adminserver"
)

// Register adds the questions about the whole mesh to the control plane's admin
// API; see package adminv1.
func (f *Fanout) Register(mux *http.ServeMux) {
	mux.HandleFunc("GET /v1/mesh/status", func(w http.ResponseWriter, r *http.Request) {
		s, err := f.Status(r.Context())
		adminserver.Answer(w, s, err)
	})
	mux.HandleFunc("GET /v1/mesh/certificates", func(w http.ResponseWriter, r *http.Request) {
		c, err := f.Certificates(r.Context(), r.FormValue("node"))
		adminserver.Answer(w, c, err)
	})
	mux.HandleFunc("GET /v1/mesh/audit/verify", func(w http.ResponseWriter, r *http.Request) {
		v, err := f.VerifyAudit(r.Context(), r.FormValue("node"))
		adminserver.Answer(w, v, err)
	})
	mux.HandleFunc("GET /v1/mesh/workload", func(w http.ResponseWriter, r *http.Request) {
		wl, err := f.workload(r.FormValue("name"))
		adminserver.Answer(w, wl, err)
	})
	mux.HandleFunc("GET /v1/mesh/audit", f.serveAudit)
}

// workload tells what a name stands for.
func (f *Fanout) workload(name string) (adminv1.Workload, error) {
	view := f.cfg.View()
	if view == nil {
		return adminv1.Workload{}, fmt.Errorf("no state is in force yet")
	}
	w := view.State.Workload(name)
	if w == nil {
		return adminv1.Workload{}, fmt.Errorf("name: %s is no workload of this mesh", name)
	}
	return adminv1.Workload{Workload: name, ID: w.ID.String(), Node: w.Node, Mode: view.State.Mode(w.Namespace).String()}, nil
}

func (f *Fanout) serveAudit(w http.ResponseWriter, r *http.Request) {
	q, err := auditQuery(r)
	if err != nil {
		adminserver.Answer(w, nil, err)
		return
	}
	if _, err := f.nodes(q.Node); err != nil {
		adminserver.Answer(w, nil, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	enc := json.NewEncoder(w)
	n := 0
	missing, err := f.Audit(r.Context(), q, func(rec audit.Record) error {
		n++
		return enc.Encode(rec)
	})
	if err != nil {
		// The status is out; a line that is no record tells the client.
		_ = enc.Encode(map[string]string{"error": err.Error()})
		return
	}
	_ = enc.Encode(adminv1.AuditLast{Complete: adminv1.AuditEnd{Records: n, Missing: missing}})
}

// maxLimit bounds the records that are held for a query with a limit; without
// one, none are.
const maxLimit = 100_000

// auditQuery reads what the nodes will be asked. They judge identities, sides
// and verdicts.
func auditQuery(r *http.Request) (adminclient.AuditQuery, error) {
	v := r.URL.Query()
	q := adminclient.AuditQuery{From: v.Get("from"), To: v.Get("to"), Side: audit.Side(v.Get("side")), Node: v.Get("node"), Serial: v.Get("serial")}
	if s := v.Get("since"); s != "" {
		at, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			return q, fmt.Errorf("since: %q is not a time like 2006-01-02T15:04:05Z", s)
		}
		q.Since = at
	}
	if s := v.Get("limit"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 || n > maxLimit {
			return q, fmt.Errorf("limit: %q is not a number from 0 to %d; 0 is all", s, maxLimit)
		}
		q.Limit = n
	}
	for _, list := range v["verdict"] {
		for verdict := range strings.SplitSeq(list, ",") {
			if verdict != "" {
				q.Verdicts = append(q.Verdicts, audit.Verdict(verdict))
			}
		}
	}
	return q, nil
}

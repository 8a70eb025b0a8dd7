package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/adminclient"
)

// Following asks again and again about times that overlap; each opening and
// each end must be told once, and no late one be missed.
func TestFollowTellsEachStateOnce(t *testing.T) {
	at := testNow
	open := audit.Record{ID: "a", Side: audit.Source, Start: at, Verdict: audit.Allowed}
	closed := open
	closed.End = at.Add(time.Second)
	other := open
	other.Side = audit.Destination
	late := audit.Record{ID: "b", Side: audit.Source, Start: at.Add(-time.Minute), End: at.Add(-time.Minute), Verdict: audit.Denied}
	answers := [][]audit.Record{{open, other}, {open, other, late}, {closed, other, late}, {closed, other, late}}

	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, adminclient.AgentSocket))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var asked atomic.Int32
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/audit", func(w http.ResponseWriter, r *http.Request) {
		n := int(asked.Add(1)) - 1
		since, limit := r.URL.Query().Get("since"), r.URL.Query().Get("limit")
		if n == 0 && (since != "2026-11-23T09:25:00Z" || limit != "5") || n > 0 && (since != "2026-11-23T09:28:00Z" || limit != "") {
			t.Errorf("question %d: since %s, limit %q", n, since, limit)
		}
		if n == len(answers) {
			cancel()
			return
		}
		for _, rec := range answers[n] {
			_ = json.NewEncoder(w).Encode(rec)
		}
	})
	s := &http.Server{Handler: mux, ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close(); <-done })

	var out, errs bytes.Buffer
	a := &app{out: &out, err: &errs, getenv: func(string) string { return "" }, now: func() time.Time { return testNow }}
	code := a.run(ctx, []string{"audit", "-f", "--since", "5m", "--limit", "5", "-o", "json", "--run-dir", dir})
	if code != exitGood || errs.Len() > 0 {
		t.Errorf("an interrupt is the ordinary end: code %d, %s", code, errs.String())
	}
	var got []string
	for line := range strings.Lines(out.String()) {
		var r struct {
			APIVersion, Kind string
			audit.Record
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil || r.APIVersion == "" || r.Kind != "AuditRecord" {
			t.Fatalf("line %q: %v", line, err)
		}
		state := "open"
		if !r.End.IsZero() {
			state = "end"
		}
		got = append(got, r.ID+" "+string(r.Side)+" "+state)
	}
	want := "a source open, a destination open, b source end, a source end"
	if strings.Join(got, ", ") != want {
		t.Errorf("told %v, want %s", got, want)
	}
}

// A stream that breaks must not look like the user's interrupt.
func TestFollowFailsWithTheAgent(t *testing.T) {
	if got := runIn(t, t.TempDir(), "audit", "-f"); got.code != exitFailed || !strings.Contains(got.err, "does not answer") {
		t.Errorf("%+v", got)
	}
}

func TestFollowForgets(t *testing.T) {
	seen := followed{}
	seen.fresh(audit.Record{ID: "old", End: testNow})
	seen.fresh(audit.Record{ID: "open"})
	seen.forget(testNow.Add(time.Second))
	if len(seen) != 1 {
		t.Errorf("remembers %v", seen)
	}
}

// While one follows, a node that goes silent is told once, and so is its
// return: its records are missing in between.
func TestFollowTellsSilentNodes(t *testing.T) {
	var errs bytes.Buffer
	a := &app{err: &errs}
	silent := map[string]bool{}
	gone := []adminv1.MissingNode{{Node: "n2", Error: "no answer within 5s"}}
	for _, missing := range [][]adminv1.MissingNode{nil, gone, gone, nil, nil} {
		a.tellSilent(silent, missing)
	}
	want := "signet: node n2 does not answer, its records are missing: no answer within 5s\nsignet: node n2 answers again\n"
	if errs.String() != want {
		t.Errorf("%q", errs.String())
	}
}

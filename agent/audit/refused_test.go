package audit

import (
	"errors"
	"log/slog"
	"testing"
	"time"
)

// A refusal is a record like others, chained and found by its verdict; what is
// half a refusal and half a connection is not stored.
func TestRefusedRecord(t *testing.T) {
	s, err := Open(t.TempDir(), "n1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	at := time.Now().UTC()
	good := func() Event {
		return Event{Final: true, Record: Record{ID: "refused:1", Start: at, End: at, Verdict: Refused, Reason: "no", Source: Party{Workload: "shop/web-1"}, Refusal: &Refusal{Kind: "stranger", Call: "FetchX509SVID", Count: 3}}}
	}
	for name, edit := range map[string]func(*Event){
		"open":               func(e *Event) { e.Final = false },
		"of a side":          func(e *Event) { e.Record.Side = Source },
		"without who":        func(e *Event) { e.Record.Refusal = nil },
		"of another verdict": func(e *Event) { e.Record.Verdict = Denied },
	} {
		e := good()
		edit(&e)
		if err := s.Add(t.Context(), []Event{e}); !errors.Is(err, ErrInvalidEvent) {
			t.Errorf("%s: %v, want ErrInvalidEvent", name, err)
		}
	}
	connection := Event{Record: Record{ID: "c", Side: Source, Start: at, Verdict: Denied, Source: Party{Workload: "shop/web-1"}}, Final: true}
	if err := s.Add(t.Context(), []Event{good(), connection}); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		filter Filter
		want   int
	}{
		"all":        {Filter{}, 2},
		"refused":    {Filter{Verdicts: []Verdict{Refused}}, 1},
		"denied":     {Filter{Verdicts: []Verdict{Denied}}, 1},
		"the caller": {Filter{Verdicts: []Verdict{Refused}, From: "shop/web-1"}, 1},
		"another":    {Filter{Verdicts: []Verdict{Refused}, From: "shop/db-1"}, 0},
		"of a side":  {Filter{Verdicts: []Verdict{Refused}, Side: Source}, 0},
		"open":       {Filter{Open: new(bool), Verdicts: []Verdict{Refused}}, 1},
	} {
		n := 0
		if err := s.Query(t.Context(), tc.filter, func(r Record) error {
			n++
			if r.Verdict == Refused && (r.Refusal == nil || r.Refusal.Count != 3) {
				t.Errorf("%+v", r)
			}
			return nil
		}); err != nil || n != tc.want {
			t.Errorf("%s: %d records, %v; want %d", name, n, err, tc.want)
		}
	}
	if v, err := s.Verify(t.Context()); err != nil || v.Fault != "" || v.Records != 2 {
		t.Errorf("%+v, %v", v, err)
	}
}

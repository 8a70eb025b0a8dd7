package audit

import (
	"errors"
	"log/slog"
	"testing"
	"time"
)

// An issuance is a record like others, chained; since it tells of no use of an
// identity, it is shown to who asks for it, by its verdict or its serial number.
func TestIssuedRecord(t *testing.T) {
	s, err := Open(t.TempDir(), "n1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	at := time.Now().UTC()
	const web = "spiffe://mesh.test/ns/shop/sa/web"
	good := func() Event {
		return Event{Final: true, Record: Record{
			ID: "issued:0a1b", Start: at, End: at, Verdict: Issued, Source: Party{ID: web, Workload: "shop/web-1", Serial: "0a1b"},
			Issuance: &Issuance{Kind: KindX509, NotBefore: at, NotAfter: at.Add(time.Hour)},
		}}
	}
	for name, edit := range map[string]func(*Event){
		"open":               func(e *Event) { e.Final = false },
		"of a side":          func(e *Event) { e.Record.Side = Source },
		"without what":       func(e *Event) { e.Record.Issuance = nil },
		"of another verdict": func(e *Event) { e.Record.Verdict = Allowed },
	} {
		e := good()
		edit(&e)
		if err := s.Add(t.Context(), []Event{e}); !errors.Is(err, ErrInvalidEvent) {
			t.Errorf("%s: %v, want ErrInvalidEvent", name, err)
		}
	}
	connection := Event{Record: Record{ID: "c", Side: Source, Start: at, Verdict: Allowed, Source: Party{ID: web, Serial: "0a1b"}}, Final: true}
	if err := s.Add(t.Context(), []Event{good(), connection}); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		filter Filter
		want   int
	}{
		"all":                {Filter{}, 1},
		"of the identity":    {Filter{From: "shop/web"}, 1},
		"by verdict":         {Filter{Verdicts: []Verdict{Issued}}, 1},
		"by verdicts":        {Filter{Verdicts: []Verdict{Issued, Allowed}}, 2},
		"to the identity":    {Filter{Verdicts: []Verdict{Issued}, From: "shop/web"}, 1},
		"to another":         {Filter{Verdicts: []Verdict{Issued}, From: "shop/db"}, 0},
		"by serial":          {Filter{Serial: "0A:1B"}, 2},
		"by serial, allowed": {Filter{Serial: "a1b", Verdicts: []Verdict{Allowed}}, 1},
		"by another serial":  {Filter{Serial: "0a1c"}, 0},
	} {
		n := 0
		if err := s.Query(t.Context(), tc.filter, func(Record) error { n++; return nil }); err != nil || n != tc.want {
			t.Errorf("%s: %d records, %v; want %d", name, n, err, tc.want)
		}
	}
	if v, err := s.Verify(t.Context()); err != nil || v.Fault != "" || v.Records != 2 {
		t.Errorf("the chain: %+v, %v", v, err)
	}
}

package ca

import (
	"os"
	"testing"
	"time"
)

// Defends: what was refused is in the issuance log, over a restart, and changes
// nothing about what was issued and revoked.
func TestLogRefused(t *testing.T) {
	dir := t.TempDir()
	start := time.Now().UTC().Truncate(time.Second)
	a := openTest(t, dir, nil)
	issued := issue(t, a, time.Hour).Serial
	list := []Refused{
		{First: start.Add(-time.Hour), Last: start.Add(-50 * time.Minute), Count: 7, Call: "Issue", Node: "one", Workload: "pay/ledger-1", From: "10.0.0.9", Why: "node", Reason: "not on node \"one\"\n"},
		{First: start, Last: start, Count: 1, Several: true, Call: "TLS", Why: "certificate", Reason: "expired"},
	}
	if err := a.LogRefused(list); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Revoke(issued, "lost"); err != nil {
		t.Fatal(err)
	}
	if err := a.LogRefused(nil); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	a = openTest(t, dir, nil)
	got, err := a.IssuanceLog().Refused(time.Time{}, 0)
	if err != nil || len(got) != 2 || got[0] != list[0] || got[1] != list[1] {
		t.Fatalf("%+v, %v", got, err)
	}
	for _, tc := range []struct {
		since time.Time
		limit int
	}{{start.Add(-time.Minute), 0}, {time.Time{}, 1}} {
		if got, err := a.IssuanceLog().Refused(tc.since, tc.limit); err != nil || len(got) != 1 || got[0] != list[1] {
			t.Errorf("since %s, limit %d: %+v, %v", tc.since, tc.limit, got, err)
		}
	}
	entries, err := a.IssuanceLog().Entries(time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Serial == "" {
			t.Errorf("a refusal is called an issuance: %+v", e)
		}
	}
	if e, ok, err := a.IssuanceLog().Find(issued); err != nil || !ok || e.Revoked.IsZero() {
		t.Errorf("%+v, %t, %v", e, ok, err)
	}
	if list, _, _ := a.Revoked(); len(list) != 1 {
		t.Errorf("%d are revoked after a restart", len(list))
	}
	// A line that cannot be read is said, and the others are read.
	path := a.IssuanceLog().path
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append([]byte(`{"event":"refused",x}`+"\n"), raw...), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := a.IssuanceLog().Refused(time.Time{}, 0); err == nil || len(got) != 2 {
		t.Errorf("%d of a damaged log, %v", len(got), err)
	}
}

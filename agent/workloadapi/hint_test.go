package workloadapi

import (
	"fmt"
	"testing"
)

// A process with several identities is told by hints which is which, with
// certificates and tokens alike. No hint is given twice, whatever the entries say,
// and of two entries with one identity, the hint counts.
func TestHints(t *testing.T) {
	a := startAgent(t, nil)
	a.setHinted(map[string]string{"web": "internal", "db": "external", "other": "internal", "same": "external"},
		rule{"web", "web", self(t)}, rule{"db", "db", self(t)}, rule{"plain", "plain", self(t)}, rule{"other", "zoo", self(t)},
		rule{"same", "same", self(t)}, rule{"again", "same", self(t)})
	want := map[string]string{"db": "external", "plain": "", "same": "", "web": "internal", "zoo": ""}
	got := map[string]string{}
	for s := a.stream(); len(got) < len(want); {
		m, _ := recv(t, s)
		for _, x := range m.Svids {
			got[x.SpiffeId] = x.Hint
		}
	}
	tokens := map[string]string{}
	m, err := a.fetch("", "ledger")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range m.Svids {
		tokens[s.SpiffeId] = s.Hint
	}
	for name, hint := range want {
		if id := sa(name).String(); got[id] != hint || tokens[id] != hint {
			t.Errorf("%s: the certificate has %q, the token %q; want %q", name, got[id], tokens[id], hint)
		}
	}
	if len(got) != len(want) || len(tokens) != len(want) {
		t.Error(fmt.Sprint(got, tokens))
	}
	one, err := a.fetch(sa("web").String(), "ledger")
	if err != nil || len(one.Svids) != 1 || one.Svids[0].Hint != "internal" {
		t.Errorf("the token that is named: %v, %v", one, err)
	}
}

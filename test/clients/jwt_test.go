package clients

import (
	"regexp"
	"strings"
	"testing"
	"time"
)

// invalid is InvalidArgument in the words of every library.
var invalid = regexp.MustCompile(`(?i)invalid.?argument`)

// TestJWT: a token that the library of one language fetched is good to every
// other, by the agent's judgement and by the library's own with the keys from
// the Workload API. For another audience, or with the signature of another
// token, it is good to none.
func TestJWT(t *testing.T) {
	const ledger, bank = "spiffe://mesh.test/ns/shop/sa/ledger", "spiffe://mesh.test/ns/shop/sa/bank"
	f := start(t, time.Hour)
	tokens, fetchers := map[*language]string{}, map[*language]*program{}
	for _, l := range f.languages { // all at once: interpreters take a while to start
		fetchers[l] = f.run(t, l, 0, "jwt", ledger)
	}
	for l, p := range fetchers {
		got := p.next(t)
		if got.Error != "" || got.ID != l.id() {
			t.Fatalf("%s got a token of %q, %s", l.name, got.ID, got.Error)
		}
		tokens[l] = got.Token
	}
	forge := func(token, signed string) string {
		return token[:strings.LastIndexByte(token, '.')] + signed[strings.LastIndexByte(signed, '.'):]
	}
	f.each(func(t *testing.T, l *language) {
		p := f.run(t, l, 0, "validate")
		for i, of := range f.languages {
			token := tokens[of]
			if got := p.ask(t, token, ledger); got.Agent != of.id() || got.Local != of.id() {
				t.Errorf("a token of %s: the agent %q %s; the library %q %s", of.name, got.Agent, got.AgentError, got.Local, got.LocalError)
			}
			refused := func(what string, got line) {
				t.Helper()
				if got.Agent != "" || got.Local != "" || !invalid.MatchString(got.AgentError) || got.LocalError == "" {
					t.Errorf("a token of %s %s: the agent %q %s; the library %q %s", of.name, what, got.Agent, got.AgentError, got.Local, got.LocalError)
				}
			}
			refused("for another", p.ask(t, token, bank))
			refused("with another's signature", p.ask(t, forge(token, tokens[f.languages[(i+1)%len(f.languages)]]), ledger))
		}
	})
}

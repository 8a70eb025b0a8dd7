package hostile

import (
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"testing"
	"time"
)

// leastHostile is how many distinct hostile cases there must be.
const leastHostile = 2000

// testCase is a certificate with its chain, and who presents it.
type testCase struct {
	family, name string
	chain        [][]byte // DER, leaf first
	// key is what the presenter proves, as the leaf's.
	key crypto.Signer
	// good is set for what everybody must accept, as id.
	good bool
	id   string
}

func (c *testCase) String() string { return c.family + "/" + c.name }

// corpus collects cases.
type corpus struct {
	*pki
	cases []testCase
}

// hostile adds a case with the mesh's intermediate behind the leaf.
func (c *corpus) hostile(family, name string, leaf []byte) {
	c.add(testCase{family: family, name: name, chain: [][]byte{leaf, c.intermediate.der}, key: c.keys.p256})
}

func (c *corpus) good(family, name, id string, leaf []byte) {
	c.add(testCase{family: family, name: name, chain: [][]byte{leaf, c.intermediate.der}, key: c.keys.p256, good: true, id: id})
}

func (c *corpus) add(tc testCase) { c.cases = append(c.cases, tc) }

// issue makes a leaf of the mesh's intermediate.
func (c *corpus) issue(id string, edits ...edit) []byte { return c.leaf(c.intermediate, id, edits...) }

// makeCorpus makes every case anew.
func makeCorpus(t *testing.T, now time.Time) *corpus {
	c := &corpus{pki: newPKI(now)}
	c.goodOnes()
	c.spellings()
	c.randomNames()
	c.names()
	c.usages()
	c.fields()
	c.times()
	c.signatures()
	c.publicKeys()
	c.extensions()
	c.encodings()
	c.chains()
	slices.SortStableFunc(c.cases, func(a, b testCase) int { return strings.Compare(a.String(), b.String()) }) // maps have no order
	seen := map[string]bool{}
	c.cases = slices.DeleteFunc(c.cases, func(tc testCase) bool { // two ways to the same certificate are one case
		d := digest(&tc)
		was := seen[d]
		seen[d] = true
		return was
	})
	return c
}

// hour is the clock that the corpus is made by: the same for all of a run.
func hour() time.Time { return time.Now().Truncate(time.Hour) }

// TestCorpus: the corpus is as large as it is said to be, without counting any
// case twice, and every run has the same.
func TestCorpus(t *testing.T) {
	now := hour()
	first, second := makeCorpus(t, now), makeCorpus(t, now)
	if len(first.cases) != len(second.cases) {
		t.Fatalf("%d cases, then %d", len(first.cases), len(second.cases))
	}
	names, hostile := map[string]bool{}, 0
	for i := range first.cases {
		c := &first.cases[i]
		if names[c.String()] {
			t.Errorf("%s is there twice", c)
		}
		names[c.String()] = true
		if digest(c) != digest(&second.cases[i]) {
			t.Errorf("%s differs from one run to the next", c)
		}
		if !c.good {
			hostile++
		}
	}
	if hostile < leastHostile {
		t.Errorf("%d hostile cases; want %d at least", hostile, leastHostile)
	}
	t.Logf("%d hostile certificates, %d good ones", hostile, len(first.cases)-hostile)
}

func digest(c *testCase) string {
	h := sha256.New()
	for _, der := range c.chain {
		h.Write(der)
	}
	h.Write(spki(c.key.Public()))
	return hex.EncodeToString(h.Sum(nil))
}

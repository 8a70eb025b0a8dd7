package clients

import (
	"strconv"
	"testing"
	"time"
)

// TestWatch: each library sees its certificate replaced, twice, while the former
// one is still valid, and has a valid one whenever it is asked.
func TestWatch(t *testing.T) {
	const ttl, wanted = 10 * time.Second, 3
	f := start(t, ttl)
	watchers := map[*language]*program{} // all at once: they wait, mostly
	for _, l := range f.languages {
		watchers[l] = f.run(t, l, 0, "watch", strconv.Itoa(wanted))
	}
	f.each(func(t *testing.T, l *language) {
		p := watchers[l]
		former := p.next(t).leaf(t)
		for range wanted - 1 {
			next := p.next(t)
			leaf := next.leaf(t)
			if leaf.SerialNumber.Cmp(former.SerialNumber) == 0 {
				t.Errorf("the serial %s twice", leaf.SerialNumber)
			}
			left := former.NotAfter.Sub(next.at)
			t.Logf("%x came when %x had %s left", leaf.SerialNumber, former.SerialNumber, left.Round(100*time.Millisecond))
			if left <= 0 || next.at.Before(leaf.NotBefore) {
				t.Errorf("the certificate came at %s; the former is valid until %s, this one from %s", next.at, former.NotAfter, leaf.NotBefore)
			}
			former = leaf
		}
		if end := p.next(t); end.Error != "" || len(end.Gaps) > 0 || end.Polls < 50 {
			t.Errorf("of %d questions %d had no valid certificate for an answer: %q %s", end.Polls, len(end.Gaps), end.Gaps, end.Error)
		}
	})
}

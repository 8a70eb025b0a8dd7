package kube

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// judge holds what callers were told, and what was recorded, against the book of
// who had which address when.
func (c *churn) judge() {
	c.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.book()
	c.answers()
	inVain := c.inVain()
	tally := map[string]int{}
	for _, key := range slices.Sorted(maps.Keys(c.records)) {
		r := c.records[key]
		if r.Start.Before(c.began) || !strings.HasPrefix(r.Source.Workload, c.in+"/") && !strings.HasPrefix(r.Destination.Workload, c.in+"/") {
			continue
		}
		look := c.atDestination
		if r.Side == "source" {
			look = c.atSource
		}
		wrong := look(&r)
		if wrong != "" && inVain[r.Destination.Workload] && c.beforeItsAddress(&r) {
			tally["refused at a pod that was begun in vain and then made again, with another address"]++
			wrong = ""
		}
		tally[r.Side+" "+r.Transport+" "+r.Verdict]++
		if strings.Contains(r.Reason, "did not prove") {
			tally["somebody else than wanted, and so not spoken to"]++
		}
		if late, ok := c.inPlain(&r); ok {
			tally["in plain toward a pod of the mesh, which refuses it"]++
			if late > time.Second {
				tally["in plain toward a pod of the mesh more than 1 s after its address was known"]++
			}
		}
		if wrong != "" {
			tally["WRONG"]++
			if tally["WRONG"] <= 20 {
				c.Errorf("a record is wrong: %s: %+v", wrong, r)
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(tally)) {
		c.Logf("%7d records: %s", tally[key], key)
	}
	for _, need := range []string{"source mtls allowed", "source mtls denied", "destination mtls allowed", "destination mtls denied", "destination plaintext denied"} {
		if tally[need] == 0 {
			c.Errorf("no record is of %q, so the test shows nothing of it", need)
		}
	}
	_, named := c.loads(c.in, "named", c.began)
	c.Logf("a caller of service a1 by its name: %d answered, %d failed, %d by others; %v", named.OK, named.Failed, named.Wrong, named.Errors)
	if named.Wrong > 0 {
		c.Errorf("the caller of a1: %+v", named)
	}
}

// inVain lists the pods whose network was set up in vain, by the events that tell
// so: the runtime begins anew then, and the pod gets another address. Until then
// the first one was its own.
func (c *churn) inVain() map[string]bool {
	c.Helper()
	events, err := c.client.CoreV1().Events(c.in).List(c.Context(), metav1.ListOptions{FieldSelector: "reason=FailedCreatePodSandBox"})
	if err != nil {
		c.Fatal(err)
	}
	out := map[string]bool{}
	for _, e := range events.Items {
		out[e.InvolvedObject.Namespace+"/"+e.InvolvedObject.Name] = true
	}
	c.Logf("%d pods were begun in vain", len(out))
	return out
}

// beforeItsAddress reports whether a record is of a plaintext connection that was
// refused before the pod had the address that it is known by.
func (c *churn) beforeItsAddress(r *record) bool {
	l := c.lives[r.Destination.Workload]
	return l != nil && r.Side == "destination" && r.Transport == "plaintext" && r.Verdict == "denied" && r.Start.Before(l.seen)
}

// book tells how addresses were used again.
func (c *churn) book() {
	c.Helper()
	byAddr := map[netip.Addr][]*life{}
	for _, l := range c.lives {
		for _, a := range l.addrs {
			if a.Is4() && !c.stays(l) {
				byAddr[a] = append(byAddr[a], l)
			}
		}
	}
	same, other := 0, 0
	for _, lives := range byAddr {
		slices.SortFunc(lives, func(a, b *life) int { return a.seen.Compare(b.seen) })
		for i := 1; i < len(lives); i++ {
			if lives[i-1].account == lives[i].account {
				same++
			} else {
				other++
			}
		}
	}
	c.Logf("%d addresses; %d times one went to a pod of another account, %d times to another pod of the same", len(byAddr), other, same)
	if want := perNode * len(c.cluster.Nodes()); len(byAddr) > want || other == 0 {
		c.Errorf("%d addresses were used, want at most %d, and again by others", len(byAddr), want)
	}
}

// stays reports whether a pod is one of those that do not go.
func (c *churn) stays(l *life) bool { return !strings.Contains(l.name, "-") }

// answers judges who answered, and that this is what the callers' records say.
func (c *churn) answers() {
	c.Helper()
	byCall := map[string][]record{} // by caller and the address that it called
	for _, r := range c.records {
		if key := r.Source.Workload + " " + r.Destination.Address; r.Side == "source" {
			byCall[key] = append(byCall[key], r)
		}
	}
	wrong := 0
	bad := func(format string, args ...any) {
		if wrong++; wrong <= 20 {
			c.Errorf(format, args...)
		}
	}
	meshed := 0
	for _, a := range c.calls {
		l := c.lives[c.in+"/"+a.answer]
		if l == nil {
			l = c.lives[c.out+"/"+a.answer]
		}
		addr := netip.MustParseAddrPort(a.to).Addr()
		switch {
		case l == nil:
			bad("%s called %s: an answer by nobody: %q", a.caller, a.to, a.answer)
			continue
		case l.meshed && !slices.Contains(mayCall[a.caller], l.account):
			bad("%s called %s and was served by %s, which it may not call", a.caller, a.to, a.answer)
		case a.account != "" && l.account != a.account:
			bad("%s called service %s and was served by %s", a.caller, a.account, a.answer)
		case a.account == "" && !slices.Contains(l.addrs, addr):
			bad("%s called %s and was served by %s, which has %v", a.caller, a.to, a.answer, l.addrs)
		}
		if l.meshed {
			meshed++
		}
		matches, wrongs := 0, ""
		for _, r := range byCall[c.in+"/"+a.caller+" "+a.to] {
			if r.Start.Before(a.began.Add(-10*time.Millisecond)) || r.Start.After(a.ended) {
				continue
			}
			says := ""
			switch {
			case l.meshed && (r.Transport != "mtls" || r.Verdict != "allowed" || r.Destination.Workload != l.key() || r.Destination.ID != id(c.in, l.account)),
				!l.meshed && (r.Transport != "plaintext" || r.Destination.Workload+r.Destination.ID != ""):
				says = fmt.Sprintf("%+v", r)
			}
			if matches++; r.Source.Address == a.local { // surely this call's
				matches, wrongs = 1, says
				break
			}
			// Another source: inside of a pod the kernel changes a connection's
			// port when one to another address has the same.
			wrongs += says
		}
		switch {
		case matches == 0:
			bad("%s called %s from %s at %s and %s answered, but no record says so", a.caller, a.to, a.local, a.began.Format(time.StampMilli), a.answer)
		case wrongs != "":
			bad("%s called %s from %s at %s and %s answered, but the record says %s", a.caller, a.to, a.local, a.began.Format(time.StampMilli), a.answer, wrongs)
		}
	}
	c.Logf("%d calls answered, %d of them by pods of the mesh; %d closed without an answer, %d failed; wrong: %d", len(c.calls), meshed, c.unserved.Load(), c.failed.Load(), wrong)
	if meshed == 0 {
		c.Error("no call was answered by a pod of the mesh")
	}
}

// atSource says what is wrong with a caller's record.
func (c *churn) atSource(r *record) string {
	source := c.lives[r.Source.Workload]
	if says := c.held(source, r.Source.Address, r.Start, r.Start); says != "" {
		return "source: " + says
	}
	if r.Source.ID != id(c.in, source.account) {
		return "the source is of account " + source.account
	}
	if r.Transport == "plaintext" {
		if r.Destination.ID+r.Destination.Workload != "" {
			return "the destination proved no identity"
		}
		return ""
	}
	if r.Verdict == "failed" && r.Destination.ID == "" {
		return "" // it names who was wanted, and that none has proved to be that
	}
	at := r.Destination.Via
	if at == "" {
		at = r.Destination.Address
	}
	target := c.lives[r.Destination.Workload]
	// What was dialed while nobody had the address waits for whoever gets it.
	until := r.Start.Add(connectTime)
	if !r.End.IsZero() && r.End.Before(until) {
		until = r.End
	}
	if says := c.held(target, at, r.Start, until); says != "" {
		return "destination: " + says
	}
	return c.verdict(r, source.account, target)
}

// inPlain reports whether a caller's record is of a connection in plain to an
// address that a pod of the mesh had by then, and how long that was known.
func (c *churn) inPlain(r *record) (late time.Duration, ok bool) {
	if r.Side != "source" || r.Transport != "plaintext" || r.Verdict != "allowed" {
		return 0, false
	}
	ap, err := netip.ParseAddrPort(r.Destination.Via)
	if err != nil {
		return 0, false
	}
	var last *life
	for _, l := range c.lives {
		if slices.Contains(l.addrs, ap.Addr()) && !l.seen.After(r.Start) && (last == nil || l.seen.After(last.seen)) {
			last = l
		}
	}
	if last == nil || !last.meshed || !last.gone.IsZero() && r.Start.After(last.gone) {
		return 0, false
	}
	return r.Start.Sub(last.seen), true
}

// atDestination says what is wrong with a destination's record.
func (c *churn) atDestination(r *record) string {
	target := c.lives[r.Destination.Workload]
	if says := c.held(target, r.Destination.Address, r.Start, r.Start); says != "" && r.Verdict != "failed" {
		return "destination: " + says
	}
	if target == nil {
		return "there is no such destination"
	}
	if r.Transport == "plaintext" {
		if r.Verdict != "denied" || r.Source.ID != "" {
			return "a caller without an identity is refused"
		}
		return ""
	}
	if r.Source.ID == "" {
		if r.Verdict != "failed" { // whoever makes tunnels here has an identity
			return "nobody has tried without an identity"
		}
		return ""
	}
	var says string
	for _, l := range c.lives {
		if l.meshed && id(c.in, l.account) == r.Source.ID {
			if says = c.held(l, r.Source.Address, r.Start, r.Start); says == "" {
				return c.verdict(r, l.account, target)
			}
		}
	}
	return "no pod of this account had the source's address then"
}

// verdict says whether a record's verdict and identity of the destination are not
// what they must be.
func (c *churn) verdict(r *record, caller string, target *life) string {
	if r.Destination.ID != "" && r.Destination.ID != id(c.in, target.account) {
		return "the destination is of account " + target.account
	}
	may := slices.Contains(mayCall[caller], target.account)
	if r.Verdict == "allowed" && !may || r.Verdict == "denied" && may {
		return fmt.Sprintf("that %s may call %s is %v", caller, target.account, may)
	}
	return ""
}

// connectTime is how long a caller's proxy waits for a destination to answer.
const connectTime = 5 * time.Second

// held says why a pod cannot have had an address at any instant from one to
// another, both included.
func (c *churn) held(l *life, address string, from, until time.Time) string {
	if l == nil {
		return "there is no such pod"
	}
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return err.Error()
	}
	addr := ap.Addr().Unmap()
	if !slices.Contains(l.addrs, addr) {
		return fmt.Sprintf("%s has %v and not %s", l.name, l.addrs, addr)
	}
	if !l.gone.IsZero() && from.After(l.gone.Add(c.linger)) {
		return fmt.Sprintf("%s was gone at %s", l.name, l.gone)
	}
	if until.Before(l.created) {
		return fmt.Sprintf("%s was not made before %s", l.name, l.created)
	}
	for _, last := range c.lives {
		if last != l && !last.seen.IsZero() && last.seen.Before(l.seen) && slices.Contains(last.addrs, addr) && (last.ending.IsZero() || until.Before(last.ending)) {
			return fmt.Sprintf("%s had this address until %s, before %s", last.name, last.ending, l.name)
		}
	}
	for _, next := range c.lives {
		if next != l && next.seen.After(l.seen) && next.seen.Before(from) && slices.Contains(next.addrs, addr) {
			return fmt.Sprintf("%s had this address from %s on, after %s", next.name, next.seen, l.name)
		}
	}
	return ""
}

package e2e

import (
	"context"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/test/harness"
)

// expectation is what the audit must say of attempts of one kind.
type expectation struct {
	kind     string
	answered bool // the client must get all that it asked for

	source, destination audit.Verdict // "" : no record on that side
	transport           string
	to                  string // the destination's service account; "" where nothing is proven
}

// What the load of the audit's test does, and what must be found of it.
var auditKinds = []expectation{
	{"allowed", true, audit.Allowed, audit.Allowed, "mtls", "server"},
	{"stream", true, audit.Allowed, audit.Allowed, "mtls", "server"},
	{"denied", false, audit.Denied, audit.Denied, "mtls", "server"},
	{"closed port", false, audit.Failed, audit.Failed, "mtls", "server"},
	{"plaintext", false, "", audit.Denied, "plaintext", ""},
	{"no such port", false, audit.Denied, "", "plaintext", ""},
	{"outside", true, audit.Allowed, "", "plaintext", ""},
}

// auditMesh is a mesh with every kind of connection that the audit knows.
type auditMesh struct {
	*harness.Mesh
	inside, outside *traffic // what the server in the mesh saw, and the one outside
}

func startAuditMesh(t *testing.T) *auditMesh {
	t.Helper()
	m := &auditMesh{inside: &traffic{}, outside: &traffic{}}
	m.Mesh = harness.Start(t, harness.Options{
		Pods: map[string]string{
			"client": "10.88.0.10", "second": "10.88.0.11", "other": "10.88.0.12",
			"server": "10.88.0.13", "stranger": "10.88.0.99",
		},
		Documents: map[string]string{"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", "enforce") +
			harness.Workload("shop", "client", "10.88.0.10") + harness.Workload("shop", "second", "10.88.0.11") +
			harness.Workload("shop", "other", "10.88.0.12") + harness.Workload("shop", "server", "10.88.0.13") +
			harness.Service("shop", "server", "10.96.0.1", 80, 8080, "server") +
			harness.Allow("shop", "allow", "server", []int{8080, 8081}, "client", "second")},
	})
	serve(t, m.Pod("server"), ":8080", m.inside.serve)
	serve(t, m.Pod("stranger"), ":9000", m.outside.serve)
	return m
}

// load makes attempts of every kind until stop, each with a size of its own.
func (m *auditMesh) load(ctx context.Context, wg *sync.WaitGroup) {
	// An attempt that has begun is finished: what its client saw must be known.
	patient := context.WithoutCancel(ctx)
	one := func(r *traffic, pod, kind string, class byte, addr string, perSecond int) {
		p := m.Pod(pod)
		every(ctx, wg, perSecond, 8, func() {
			up := headerSize + int(r.next.Add(1))
			r.exchange(patient, p, kind, class, addr, up, 100+up%97)
		})
	}
	one(m.inside, "client", "allowed", classShort, "10.96.0.1:80", 60)
	one(m.inside, "client", "allowed", classShort, "10.88.0.13:8080", 60)
	one(m.inside, "second", "allowed", classShort, "10.96.0.1:80", 60)
	one(m.inside, "other", "denied", classWrong, "10.96.0.1:80", 60)
	one(m.inside, "client", "closed port", classWrong, "10.88.0.13:8081", 20)
	one(m.inside, "stranger", "plaintext", classPlain, "10.88.0.13:8080", 20)
	one(m.inside, "second", "no such port", classWrong, "10.96.0.1:81", 10)
	one(m.outside, "client", "outside", classShort, "10.88.0.99:9000", 20)
}

// auditProblems compares everything that clients and servers wrote down with
// the records, and returns what does not fit.
type auditProblems struct {
	lines      []string
	count      int
	translated int // attempts that were found by their content alone
}

func (p *auditProblems) add(format string, args ...any) {
	if p.count++; len(p.lines) < 12 {
		p.lines = append(p.lines, fmt.Sprintf(format, args...))
	}
}

func sa(name string) string { return "spiffe://mesh.test/ns/shop/sa/" + name }

// meshed lists the pods that have an identity.
var meshed = []string{"client", "second", "other", "server"}

// identity is what the audit must call a pod.
func identity(pod string) string {
	if slices.Contains(meshed, pod) {
		return sa(pod)
	}
	return ""
}

// compare checks the records against what clients and servers wrote down. Each
// record is used up by exactly one connection; none may remain.
func (m *auditMesh) compare(records []audit.Record) *auditProblems {
	p := &auditProblems{}
	ids, seqs := map[string]bool{}, map[uint64]bool{}
	bySource := map[string][]audit.Record{}       // source side, by the client's address and the dialled one
	byPlain := map[string][]audit.Record{}        // destination side without a tunnel, by the caller's address
	byVia := map[string][]audit.Record{}          // destination side, by the proxy's address towards the server
	refused := map[string]map[audit.Verdict]int{} // destination side, not served: by caller
	for _, r := range records {
		if id := string(r.Side) + " " + r.ID; ids[id] {
			p.add("connection %s has two records", id)
		} else {
			ids[id] = true
		}
		if seqs[r.Seq] {
			p.add("two records have number %d", r.Seq)
		}
		seqs[r.Seq] = true
		switch {
		case r.Side == audit.Source:
			key := r.Source.Address + " " + r.Destination.Address
			bySource[key] = append(bySource[key], r)
		case r.Transport == "plaintext":
			byPlain[r.Source.Address] = append(byPlain[r.Source.Address], r)
		case r.Verdict == audit.Allowed:
			byVia[r.Destination.Via] = append(byVia[r.Destination.Via], r)
		default:
			if refused[r.Source.ID] == nil {
				refused[r.Source.ID] = map[audit.Verdict]int{}
			}
			refused[r.Source.ID][r.Verdict]++
			m.checkRefused(p, &r)
		}
	}
	var translated []attempt // without a record under their own address
	pods := map[uint64]attempt{}
	for _, log := range []*traffic{m.inside, m.outside} {
		for _, a := range log.attempts {
			if log == m.inside {
				pods[a.number] = a
			}
			e := auditKinds[slices.IndexFunc(auditKinds, func(e expectation) bool { return e.kind == a.kind })]
			if e.answered != (a.err == nil) {
				p.add("%s: %+v: answered %t, want %t", a.kind, a, a.err == nil, e.answered)
			}
			if e.source != "" {
				if r, ok := takeFitting(bySource, a, a.own+" "+a.to); ok {
					m.checkSource(p, e, a, &r)
				} else {
					translated = append(translated, a)
				}
			}
			switch {
			case e.destination == "" || e.destination == audit.Allowed: // below, by what the server saw
			case e.transport == "plaintext":
				if r, ok := takeFitting(byPlain, a, a.own); ok {
					m.checkPlain(p, e, a, &r)
				} else {
					translated = append(translated, a)
				}
			default:
				refused[identity(a.pod)][e.destination]--
			}
		}
	}
	for _, a := range translated {
		m.compareTranslated(p, a, bySource, byPlain)
	}
	p.translated = len(translated)
	for _, s := range m.inside.served {
		a, known := pods[s.number]
		if !known {
			p.add("the server saw %+v, which no client made", s)
			continue
		}
		var r audit.Record
		if rs := byVia[s.via]; len(rs) > 0 { // of one address they are in the order of the records
			r, byVia[s.via] = rs[0], rs[1:]
		}
		switch {
		case r.ID == "":
			p.add("no destination record of %+v, served as %+v", a, s)
		case r.Source.ID != sa(a.pod) || r.Destination.ID != sa("server") || r.Destination.Workload != "shop/server" || r.Policy != "shop/allow":
			p.add("the destination record of %+v names the wrong ends or policy: %+v", a, r)
		case r.BytesSent != s.sent || r.BytesReceived != s.received || s.sent != a.sent || s.received != a.received:
			p.add("bytes of %+v: the server saw %d and %d, the record has %d and %d", a, s.sent, s.received, r.BytesSent, r.BytesReceived)
		case r.Start.Before(a.begin.Add(-time.Second)) || r.End.After(a.end.Add(2*time.Second)):
			p.add("the destination record of %+v is from another time: %+v", a, r)
		}
	}
	for side, left := range map[string]map[string][]audit.Record{"source": bySource, "plaintext": byPlain, "destination": byVia} {
		for key, rs := range left {
			for _, r := range rs {
				p.add("%s: a record that no attempt explains: %s: %+v", side, key, r)
			}
		}
	}
	for id, n := range refused {
		for v, left := range n {
			if left != 0 {
				p.add("destination: %d more %s records of %q than attempts", left, v, id)
			}
		}
	}
	return p
}

func (m *auditMesh) checkSource(p *auditProblems, e expectation, a attempt, r *audit.Record) {
	to := ""
	if e.to != "" {
		to = sa(e.to)
	}
	switch {
	case r.Verdict != e.source || r.Transport != e.transport:
		p.add("%s: %+v has the source record %+v; want %s, %s", a.kind, a, r, e.source, e.transport)
	case r.Source.ID != sa(a.pod) || r.Source.Workload != "shop/"+a.pod || r.Destination.ID != to && r.Verdict != audit.Failed:
		p.add("%s: the source record of %+v names the wrong ends: %+v", a.kind, a, r)
	case r.Verdict == audit.Allowed && (r.BytesSent != a.sent || r.BytesReceived != a.received):
		p.add("%s: bytes of %+v: the source record has %d and %d", a.kind, a, r.BytesSent, r.BytesReceived)
	case r.Verdict != audit.Allowed && (r.BytesSent != 0 || r.BytesReceived != 0):
		p.add("%s: %+v was refused, but its source record has %d and %d bytes", a.kind, a, r.BytesSent, r.BytesReceived)
	case r.Reason == "":
		p.add("%s: the source record of %+v has no reason", a.kind, a)
	case r.Start.Before(a.begin.Add(-time.Second)) || r.End.After(a.end.Add(2*time.Second)):
		p.add("%s: the source record of %+v is from another time: %+v", a.kind, a, r)
	}
}

func (m *auditMesh) checkPlain(p *auditProblems, e expectation, a attempt, r *audit.Record) {
	if r.Verdict != e.destination || r.Source.ID != "" || r.BytesSent != 0 || r.BytesReceived != 0 || r.Destination.Workload != "shop/server" || r.Destination.Address != a.to {
		p.add("%s: %+v has the destination record %+v", a.kind, a, r)
	}
}

// takeFitting takes the record of an attempt out of those under some keys. It has to
// fit the attempt: under the client's own address there may be another's, whose port
// the kernel translated to this one. Of several that fit, the nearest in time is taken:
// attempts of one kind differ in nothing else when nobody answered them.
func takeFitting(from map[string][]audit.Record, a attempt, keys ...string) (audit.Record, bool) {
	best, bestKey, bestIndex := time.Duration(math.MaxInt64), "", 0
	for _, key := range keys {
		for i := range from[key] {
			r := &from[key][i]
			fits := r.Source.ID == identity(a.pod) && r.Destination.Address == a.to && !r.Start.Before(a.begin.Add(-time.Second)) && !r.Start.After(a.end.Add(time.Second)) &&
				(r.Verdict != audit.Allowed || r.BytesSent == a.sent && r.BytesReceived == a.received)
			if away := r.Start.Sub(a.begin).Abs() + r.End.Sub(a.end).Abs(); fits && away < best {
				best, bestKey, bestIndex = away, key, i
			}
		}
	}
	if bestKey == "" {
		return audit.Record{}, false
	}
	r := from[bestKey][bestIndex]
	from[bestKey] = slices.Delete(slices.Clone(from[bestKey]), bestIndex, bestIndex+1)
	return r, true
}

// compareTranslated finds the record of an attempt that has none under its
// client's address. When a client uses one port towards two destinations, the
// kernel, which redirects both to the proxy, gives the second another port; and
// a client whose connect was reset does not know its port. What the record says
// of everything else must fit one attempt and no other.
func (m *auditMesh) compareTranslated(p *auditProblems, a attempt, bySource, byPlain map[string][]audit.Record) {
	e := auditKinds[slices.IndexFunc(auditKinds, func(e expectation) bool { return e.kind == a.kind })]
	from, check := bySource, m.checkSource
	if e.source == "" {
		from, check = byPlain, m.checkPlain
	}
	if r, ok := takeFitting(from, a, slices.Collect(maps.Keys(from))...); ok {
		check(p, e, a, &r)
		return
	}
	p.add("%s: no record of %+v", a.kind, a)
}

// checkRefused checks a destination record of a tunnelled connection that
// reached no application.
func (m *auditMesh) checkRefused(p *auditProblems, r *audit.Record) {
	if r.BytesSent != 0 || r.BytesReceived != 0 || r.Destination.ID != sa("server") || r.Destination.Workload != "shop/server" || r.Reason == "" {
		p.add("destination: a refused connection's record is wrong: %+v", r)
	}
}

// TestAuditIsComplete: clients and servers write down every attempt, and the
// audit has each, once per side, with the right identities, verdict and
// bytes, although the agent is killed again and again meanwhile. Without the
// spool file, or if its position were not committed together with the records,
// records would be missing or double.
func TestAuditIsComplete(t *testing.T) {
	m := startAuditMesh(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	m.load(ctx, &wg)
	// Three generations of streams: over all restarts, and over one each.
	for range 5 {
		wg.Go(func() { m.inside.stream(ctx, m.Pod("client"), "10.96.0.1:80") })
	}
	time.Sleep(2 * time.Second)
	for range 3 {
		part, end := context.WithCancel(ctx)
		var streams sync.WaitGroup
		for range 3 {
			streams.Go(func() { m.inside.stream(part, m.Pod("second"), "10.88.0.13:8080") })
		}
		time.Sleep(time.Second)
		killAgent(t, m.Mesh)
		time.Sleep(time.Second)
		end()
		streams.Wait()
	}
	cancel()
	wg.Wait()

	records := m.quiet()
	counts := map[string]int{}
	for _, a := range slices.Concat(m.inside.attempts, m.outside.attempts) {
		counts[a.kind]++
	}
	for _, e := range auditKinds {
		if counts[e.kind] < 5 {
			t.Errorf("only %d attempts of kind %s: the test shows too little", counts[e.kind], e.kind)
		}
	}
	// A certificate's serial number leads from a connection to whom it was issued
	// for, and to the others that it was shown in.
	for _, r := range records {
		if r.Source.Serial == "" || r.Verdict != audit.Allowed {
			continue
		}
		out, code := m.CLI("audit", "--serial", strings.ToUpper(r.Source.Serial), "--limit", "5")
		if code != 0 || !strings.Contains(out, "certificate "+r.Source.Serial+" of "+r.Source.ID) || !strings.Contains(out, "issued at") || !strings.Contains(out, r.Start.UTC().Format("2006-01-02")) {
			t.Errorf("signet audit --serial: %d\n%s", code, out)
		}
		break
	}
	p := m.compare(records)
	if p.count > 0 {
		t.Errorf("%d problems; the first:\n%s", p.count, strings.Join(p.lines, "\n"))
	}
	m.intact(t)
	t.Logf("attempts %v, records %d, the agent was killed 3 times; %d attempts had another port at the proxy than at the client", counts, len(records), p.translated)
}

// quiet returns the records once none is open and nothing is added any more.
func (m *auditMesh) quiet() []audit.Record {
	var last []audit.Record
	m.Eventually(60*time.Second, "the audit to be complete", func() error {
		now := m.Records(adminclient.AuditQuery{})
		open := 0
		for _, r := range now {
			if r.End.IsZero() {
				open++
			}
		}
		same := len(now) == len(last)
		last = now
		if open > 0 || !same {
			time.Sleep(300 * time.Millisecond)
			return fmt.Errorf("%d records, %d open", len(now), open)
		}
		return nil
	})
	return last
}

// intact checks the store's own statements.
func (m *auditMesh) intact(t *testing.T) {
	t.Helper()
	if out, code := m.CLI("audit", "verify"); code != 0 {
		t.Errorf("signet audit verify: %d, %s", code, out)
	}
	s, err := m.Client.AgentStatus(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if s.Audit.Gaps != 0 || s.Audit.Open != 0 {
		t.Errorf("the audit has %d gaps and %d open connections, want none", s.Audit.Gaps, s.Audit.Open)
	}
}

// spoolDelay bounds how old a line can be that the proxy has not written yet:
// its flush interval is 20 ms; the rest is for a busy machine.
const spoolDelay = time.Second

// TestAuditAfterProxyDeath: what the proxy had open when it was killed is
// closed in the audit as proxy-lost; what had ended before is there in full.
func TestAuditAfterProxyDeath(t *testing.T) {
	m := startAuditMesh(t)
	held := make([]net.Conn, 20)
	for i := range held {
		c, err := m.Pod("client").Dial(t.Context(), "tcp", "10.96.0.1:80")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		h := header(classStream, m.inside.next.Add(1), 0, 0)
		if _, err := c.Write(append(h, '!')); err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		held[i] = c
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	m.load(ctx, &wg)
	time.Sleep(3 * time.Second)
	before, killed := m.Pid("envoy"), time.Now()
	m.Kill("envoy")
	m.Eventually(30*time.Second, "the proxy to be back", func() error {
		if m.Pid("envoy") == before {
			return fmt.Errorf("still %d", before)
		}
		s, err := m.Client.AgentStatus(t.Context())
		if err == nil && !s.ProxyConnected {
			err = fmt.Errorf("not connected")
		}
		return err
	})
	time.Sleep(2 * time.Second)
	cancel()
	wg.Wait()

	records := m.quiet()
	byOwn := map[string]audit.Record{}
	// The content finds those whose port the kernel translated, too: each
	// attempt has a size of its own.
	content := func(from, to string, sent, received uint64) string { return fmt.Sprint(from, to, sent, received) }
	byContent := map[string]bool{}
	lost := map[audit.Side]int{}
	for _, r := range records {
		if r.Side == audit.Source {
			byOwn[r.Source.Address+" "+r.Destination.Address] = r
			if r.Verdict == audit.Allowed && !r.End.IsZero() && r.Ended == "" {
				byContent[content(r.Source.ID, r.Destination.Address, r.BytesSent, r.BytesReceived)] = true
			}
		}
		if r.Ended == "proxy-lost" {
			lost[r.Side]++
		}
	}
	for _, c := range held {
		r, ok := byOwn[c.LocalAddr().String()+" 10.96.0.1:80"]
		if !ok || r.Ended != "proxy-lost" || r.End.Before(killed.Add(-time.Second)) || r.Source.ID != sa("client") || r.Verdict != audit.Allowed {
			t.Errorf("a connection that was open when the proxy died has the record %+v, want one that ended as proxy-lost", r)
		}
	}
	if lost[audit.Destination] < len(held) {
		t.Errorf("%d destination records ended as proxy-lost, want at least %d", lost[audit.Destination], len(held))
	}
	missing, checked := 0, 0
	for _, a := range m.inside.attempts {
		if a.kind != "allowed" || a.err != nil {
			continue
		}
		near := a.end.After(killed.Add(-spoolDelay)) && a.begin.Before(killed)
		switch {
		case byContent[content(sa(a.pod), a.to, a.sent, a.received)]:
			checked++
		case near: // its last line, or both, were not written any more
			missing++
		default:
			t.Errorf("no record of %+v with its bytes; it ended %s before the proxy was killed; under its address: %+v", a, killed.Sub(a.end), byOwn[a.own+" "+a.to])
		}
	}
	if checked < 200 {
		t.Errorf("only %d connections were checked", checked)
	}
	m.intact(t)
	t.Logf("%d connections have exact records; %d that ended within %s of the kill do not; proxy-lost: %v", checked, missing, spoolDelay, lost)
}

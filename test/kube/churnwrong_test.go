package kube

import (
	"net/netip"
	"testing"
	"time"
)

// The judge of churn finds every kind of wrong record that a mesh would write
// which takes an address for an identity: the owner before, the owner after, one
// that never had the address, another account, a verdict that no policy says.
//
// What it defends: that the tests of churn can fail.
func TestChurnJudge(t *testing.T) {
	zero := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(seconds int) time.Time { return zero.Add(time.Duration(seconds) * time.Second) }
	addr := netip.MustParseAddr
	c := &churn{in: "in", out: "out", linger: time.Second, lives: map[string]*life{}}
	for _, l := range []*life{
		{namespace: "in", name: "green", account: "green", meshed: true, addrs: []netip.Addr{addr("10.0.1.1")}},
		{namespace: "in", name: "keeper", account: "keeper", meshed: true, addrs: []netip.Addr{addr("10.0.1.2")}},
		// One address, of three pods in turn, and a fourth pod that is made
		// while the first lives.
		{namespace: "in", name: "a0-1", account: "a0", meshed: true, addrs: []netip.Addr{addr("10.0.1.9")}, created: at(10), seen: at(12), ending: at(20), gone: at(22)},
		{namespace: "in", name: "a3-2", account: "a3", meshed: true, addrs: []netip.Addr{addr("10.0.1.9")}, created: at(18), seen: at(30), ending: at(40), gone: at(42)},
		{namespace: "in", name: "a1-3", account: "a1", meshed: true, addrs: []netip.Addr{addr("10.0.1.9")}, created: at(45), seen: at(50)},
	} {
		c.lives[l.key()] = l
	}
	source := func(seconds int, to, account, verdict string) record {
		return record{Side: "source", Transport: "mtls", Verdict: verdict, Start: at(seconds),
			Source:      end{ID: id("in", "green"), Workload: "in/green", Address: "10.0.1.1:4000"},
			Destination: end{ID: id("in", account), Workload: "in/" + to, Address: "10.0.1.9:8080"}}
	}
	destination := func(seconds int, account, verdict string) record {
		return record{Side: "destination", Transport: "mtls", Verdict: verdict, Start: at(seconds),
			Source:      end{ID: id("in", account), Address: "10.0.1.9:4000"},
			Destination: end{ID: id("in", "keeper"), Workload: "in/keeper", Address: "10.0.1.2:8080"}}
	}
	with := func(r record, change func(*record)) record {
		change(&r)
		return r
	}
	ends := func(seconds int) func(*record) { return func(r *record) { r.End = at(seconds) } }
	for name, test := range map[string]struct {
		record record
		wrong  bool
	}{
		"source: its owner":                         {source(15, "a0-1", "a0", "allowed"), false},
		"source: its next owner":                    {source(35, "a3-2", "a3", "denied"), false},
		"source: known late":                        {source(28, "a3-2", "a3", "denied"), false},
		"source: the owner before":                  {source(35, "a0-1", "a0", "allowed"), true},
		"source: the owner before, long gone":       {source(25, "a0-1", "a0", "allowed"), true},
		"source: the owner after":                   {source(15, "a1-3", "a1", "allowed"), true},
		"source: the owner after, made by then":     {with(source(19, "a3-2", "a3", "denied"), ends(19)), true},
		"source: it waited for the owner after":     {with(source(19, "a3-2", "a3", "denied"), ends(22)), false},
		"source: it did not wait for that long":     {with(source(14, "a3-2", "a3", "denied"), ends(60)), true},
		"source: another account":                   {source(15, "a0-1", "a1", "allowed"), true},
		"source: allowed what no policy allows":     {source(35, "a3-2", "a3", "allowed"), true},
		"source: denied what a policy allows":       {source(15, "a0-1", "a0", "denied"), true},
		"source: one that never had it":             {source(15, "keeper", "keeper", "denied"), true},
		"source: nobody":                            {source(15, "x-9", "a0", "allowed"), true},
		"source: the caller is another":             {with(source(15, "a0-1", "a0", "allowed"), func(r *record) { r.Source.ID = id("in", "blue") }), true},
		"source: in plain, and yet an identity":     {with(source(15, "a0-1", "a0", "allowed"), func(r *record) { r.Transport = "plaintext" }), true},
		"destination: its owner":                    {destination(15, "a0", "allowed"), false},
		"destination: its next owner":               {destination(35, "a3", "denied"), false},
		"destination: the owner before":             {destination(35, "a0", "allowed"), true},
		"destination: the owner after":              {destination(15, "a1", "allowed"), true},
		"destination: allowed what no policy says":  {destination(35, "a3", "allowed"), true},
		"destination: denied what a policy allows":  {destination(15, "a0", "denied"), true},
		"destination: another account":              {with(destination(15, "a0", "allowed"), func(r *record) { r.Destination.ID = id("in", "a1") }), true},
		"destination: allowed at another's address": {with(destination(15, "a0", "allowed"), func(r *record) { r.Destination.Address = "10.0.1.9:8080" }), true},
		"destination: denied at another's address":  {with(destination(35, "a3", "denied"), func(r *record) { r.Destination.Address = "10.0.1.9:8080" }), true},
		"destination: plain and not refused":        {with(destination(15, "", "allowed"), func(r *record) { r.Transport, r.Source.ID = "plaintext", "" }), true},
		"destination: plain and an identity":        {with(destination(15, "a0", "denied"), func(r *record) { r.Transport = "plaintext" }), true},
	} {
		look := c.atDestination
		if test.record.Side == "source" {
			look = c.atSource
		}
		if says := look(&test.record); (says != "") != test.wrong {
			t.Errorf("%s: judged %q, want wrong %v", name, says, test.wrong)
		}
	}
}

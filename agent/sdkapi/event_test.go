package sdkapi

import (
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/agent/audit"
	sdkv1 "github.com/signet-mesh/signet/api/sdk/v1"
	"github.com/signet-mesh/signet/internal/mesh"
)

var webWorkload = &mesh.Workload{Namespace: "shop", Name: "web-1", ServiceAccount: "web", ID: web}

// texts are the fields that a workload fills with text, and the most bytes of each.
var texts = map[string]struct {
	of   func(*sdkv1.Event) *string
	most int
}{
	"reason":      {func(e *sdkv1.Event) *string { return &e.Reason }, maxText},
	"policy":      {func(e *sdkv1.Event) *string { return &e.Policy }, maxName},
	"revision":    {func(e *sdkv1.Event) *string { return &e.Revision }, 64},
	"ended":       {func(e *sdkv1.Event) *string { return &e.Ended }, 64},
	"tls_version": {func(e *sdkv1.Event) *string { return &e.TlsVersion }, 64},
	"tls_cipher":  {func(e *sdkv1.Event) *string { return &e.TlsCipher }, 64},
	"tls_group":   {func(e *sdkv1.Event) *string { return &e.TlsGroup }, 64},
	"serial":      {func(e *sdkv1.Event) *string { return &e.Serial }, 40},
	"peer_serial": {func(e *sdkv1.Event) *string { return &e.PeerSerial }, 40},
}

// Defends whoever reads the audit, on a terminal too: every text of an event is
// bounded and can be printed, and is taken up to its bound.
func TestEventTexts(t *testing.T) {
	for name, f := range texts {
		for text, good := range map[string]bool{
			"": true, strings.Repeat("a", f.most): true, strings.Repeat("a", f.most+1): false,
			"a\n": false, "\x1b[2J": false, "\x00": false, "a\u202e": false,
		} {
			e := testEvent()
			*f.of(e) = text
			_, err := event(e, webWorkload, make([]byte, sessionBytes), time.Now())
			if good != (err == nil) || err != nil && !strings.HasPrefix(err.Error(), name+": ") {
				t.Errorf("%s %.20q: %v", name, text, err)
			}
		}
	}
}

func testEvent() *sdkv1.Event { return good(1) }

// Defends them against the zone of an IPv6 address, which for Go can be any text.
func TestEventAddresses(t *testing.T) {
	for text, good := range map[string]bool{
		"": true, "10.0.0.1:80": true, "[fe80::1%eth0]:80": true,
		"10.0.0.1": false, "web:80": false, "[fe80::1%\x1b[2J]:80": false, "[fe80::1%a\n]:80": false,
		"[fe80::1%" + strings.Repeat("a", maxAddress) + "]:80": false,
	} {
		for name, set := range map[string]func(*sdkv1.Event){
			"address":      func(e *sdkv1.Event) { e.Address = text },
			"peer_address": func(e *sdkv1.Event) { e.PeerAddress = text },
		} {
			e := testEvent()
			set(e)
			_, err := event(e, webWorkload, make([]byte, sessionBytes), time.Now())
			if good != (err == nil) || err != nil && !strings.HasPrefix(err.Error(), name+": ") {
				t.Errorf("%s %.30q: %v", name, text, err)
			}
		}
	}
}

// Defends the verdicts of the audit: a workload says how its connections did, and
// nothing else, at a time that has been, and counts nothing for one that was refused.
func TestEventVerdicts(t *testing.T) {
	now := time.Now()
	for verdict, bytes := range map[string]bool{"allowed": true, "observed": true, "denied": false, "failed": false} {
		e := testEvent()
		e.Verdict, e.Sent, e.Received = verdict, 7, 8
		got, err := event(e, webWorkload, make([]byte, sessionBytes), now)
		if err != nil || (got.Record.BytesSent == 7 && got.Record.BytesReceived == 8) != bytes || string(got.Record.Verdict) != verdict {
			t.Errorf("%s: %+v, %v", verdict, got.Record, err)
		}
	}
	for name, change := range map[string]func(*sdkv1.Event){
		"verdict":       func(e *sdkv1.Event) { e.Verdict = string(audit.Refused) }, // the agent's own
		"verdict: \"\"": func(e *sdkv1.Event) { e.Verdict = "" },
		"start":         func(e *sdkv1.Event) { e.Start = 0 },
		"start: 19":     func(e *sdkv1.Event) { e.Start = -1 },
		"end":           func(e *sdkv1.Event) { e.End = now.Add(time.Minute).UnixNano() },
		"end: 19":       func(e *sdkv1.Event) { e.End = 0 },
		"address":       func(e *sdkv1.Event) { e.Address = "10.0.0.1" },
		"peer":          func(e *sdkv1.Event) { e.Peer = web.String() + "," + web.String() },
	} {
		e := testEvent()
		change(e)
		if _, err := event(e, webWorkload, make([]byte, sessionBytes), now); err == nil || !strings.HasPrefix(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	e := testEvent()
	e.Final, e.End = false, now.Add(time.Hour).UnixNano() // it has not ended: what it says of that is nothing
	if got, err := event(e, webWorkload, make([]byte, sessionBytes), now); err != nil || !got.Record.End.IsZero() || got.Final {
		t.Errorf("an open connection: %+v, %v", got, err)
	}
}

// FuzzEvent: whatever a workload reports, what is taken of it is the workload's own
// record, with nothing in it that cannot be printed or is not what it is said to be.
func FuzzEvent(f *testing.F) {
	g := good(1)
	f.Add(g.GetReason(), g.GetPolicy(), g.GetPeer(), g.GetPeerAddress(), g.GetPeerSerial(), g.GetVerdict(), g.GetConnection(), g.GetStart(), g.GetEnd(), true, true)
	f.Add("\x1b[2J", "pay/allow", "spiffe://mesh.test/ns/shop/sa/bank,", "[::1%eth0]:1", "0A", "refused", uint64(0), int64(-1), int64(1)<<62, false, true)
	f.Fuzz(func(t *testing.T, reason, policy, peer, address, serial, verdict string, connection uint64, start, end int64, final, accepted bool) {
		for _, text := range []string{reason, policy, peer, address, serial, verdict} {
			if !utf8.ValidString(text) {
				return // gRPC refuses it
			}
		}
		now := time.Now()
		got, err := event(&sdkv1.Event{
			Connection: connection, Final: final, Accepted: accepted, Start: start, End: end, Verdict: verdict, Reason: reason, Policy: policy,
			Peer: peer, PeerAddress: address, PeerSerial: serial,
		}, webWorkload, make([]byte, sessionBytes), now)
		if err != nil {
			if !utf8.ValidString(err.Error()) {
				t.Errorf("the error is no text: %q", err)
			}
			return
		}
		r := got.Record
		own, other := r.Source, r.Destination
		if accepted {
			own, other = other, own
		}
		if !Owns(&r) || r.Proxy != reporter || own.ID != web.String() || own.Workload != "shop/web-1" || other.Workload != "" {
			t.Errorf("whose record: %+v", r)
		}
		if id, err := spiffeid.FromString(other.ID); other.ID != "" && (err != nil || id.String() != other.ID) {
			t.Errorf("the peer is %q", other.ID)
		}
		if _, err := netip.ParseAddrPort(other.Address); other.Address != "" && err != nil {
			t.Errorf("its address is %q", other.Address)
		}
		for _, text := range []string{r.ID, r.Reason, r.Policy, other.ID, other.Address, other.Serial} {
			if strings.ContainsFunc(text, func(c rune) bool { return !unicode.IsPrint(c) }) || !utf8.ValidString(text) || len(text) > 2*maxName {
				t.Errorf("%q was taken", text)
			}
		}
		if r.Start.After(now.Add(tolerance)) || final != !r.End.IsZero() || final && r.End.Before(r.Start) || r.Verdict == audit.Refused {
			t.Errorf("%+v", r)
		}
	})
}

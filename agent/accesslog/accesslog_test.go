package accesslog

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/authz"
)

// lines reads the proxy's own lines, by name. They were written by Envoy
// 1.40.0 in a mesh of shop (enforce) and lab (observe).
func lines(t testing.TB) map[string][]byte {
	t.Helper()
	b, err := os.ReadFile("testdata/lines.txt")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]byte{}
	for entry := range strings.SplitSeq(strings.TrimPrefix(string(b), "# "), "\n# ") {
		name, text, _ := strings.Cut(entry, "\n")
		out[name] = []byte(strings.TrimSpace(text))
	}
	return out
}

func sa(namespace, name string) string { return "spiffe://mesh.test/ns/" + namespace + "/sa/" + name }

const defaultDeny = "default deny: 1 policy protects shop/server, it does not admit this caller"

// TestDecode: what each of the proxy's lines says. One row per kind of line
// and verdict.
func TestDecode(t *testing.T) {
	client, server, other, bench := sa("shop", "client"), sa("shop", "server"), sa("shop", "other"), sa("lab", "bench")
	type want struct {
		final      bool
		side       audit.Side
		verdict    audit.Verdict
		transport  string
		from, to   string // identities
		policy     string
		reason     string // a part of it
		sent, back uint64
		ended      string
	}
	rows := map[string]*want{
		"in-allowed-open":          {false, audit.Destination, audit.Allowed, "mtls", client, server, "shop/allow", "shop/allow", 0, 0, ""},
		"in-allowed-end":           {true, audit.Destination, audit.Allowed, "mtls", client, server, "shop/allow", "shop/allow", 100, 50, ""},
		"in-denied":                {true, audit.Destination, audit.Denied, "mtls", other, server, "", defaultDeny, 0, 0, ""},
		"in-expired":               {true, audit.Destination, audit.Denied, "mtls", client, server, "", authz.CallerExpired, 0, 0, ""},
		"in-closed-port":           {true, audit.Destination, audit.Failed, "mtls", client, server, "", "Connection_refused", 0, 0, "UF"},
		"in-client-reset":          {true, audit.Destination, audit.Allowed, "mtls", client, server, "shop/allow", "shop/allow", 37, 5, "DR"},
		"in-ended-at-the-server":   {true, audit.Destination, audit.Allowed, "mtls", client, server, "shop/allow", "shop/allow", 3296, 3264, "UC"},
		"in-observed-allowed-open": {false, audit.Destination, audit.Allowed, "mtls", client, bench, "lab/some", "lab/some", 0, 0, ""},
		"in-observed-allowed-end":  {true, audit.Destination, audit.Allowed, "mtls", client, bench, "lab/some", "lab/some", 100, 50, ""},
		"in-observed-denied-open":  {false, audit.Destination, audit.Observed, "mtls", other, bench, "", "default deny: 1 policy protects lab/bench", 0, 0, ""},
		"in-observed-denied-end":   {true, audit.Destination, audit.Observed, "mtls", other, bench, "", "default deny: 1 policy protects lab/bench", 100, 50, ""},
		"tunnel-allowed-open":      {false, audit.Source, audit.Allowed, "mtls", client, server, "shop/allow", "shop/allow", 0, 0, ""},
		"tunnel-allowed-end":       {true, audit.Source, audit.Allowed, "mtls", client, server, "shop/allow", "shop/allow", 100, 50, ""},
		// Several names are nobody's: only the wanted one was looked for.
		"tunnel-several-names":         {true, audit.Source, audit.Allowed, "mtls", client, server, "shop/allow", "shop/allow", 100, 50, ""},
		"tunnel-denied":                {true, audit.Source, audit.Denied, "mtls", other, server, "", defaultDeny, 0, 0, ""},
		"tunnel-closed-port":           {true, audit.Source, audit.Failed, "mtls", client, "", "", "could not be reached: tunnel_response:503", 0, 0, "UF,URX"},
		"tunnel-unreachable":           {true, audit.Source, audit.Failed, "mtls", client, "", "", "No_route_to_host", 0, 0, "UF,URX"},
		"tunnel-observed-denied-end":   {true, audit.Source, audit.Observed, "mtls", other, bench, "", "enforce would deny", 100, 50, ""},
		"tunnel-observed-allowed-open": nil, "tunnel-observed-allowed-end": nil, "tunnel-observed-denied-open": nil,
		"tunnel-with-certificate": {false, audit.Source, audit.Allowed, "mtls", sa("shop", "web"), sa("shop", "server"), "shop/web-to-server", "shop/web-to-server", 0, 0, ""},
		// What the application showed inside the tunnel is not in the tunnel's line.
		"out-inside-wrong":              {true, audit.Source, audit.Failed, "mtls", client, "", "", "inside the tunnel, the application did not prove by mutual TLS that it is " + server, 0, 0, ""},
		"out-inside-no-tls":             {true, audit.Source, audit.Failed, "mtls", client, "", "", "WRONG_VERSION_NUMBER", 0, 0, ""},
		"out-inside-refused":            {}, // the tunnel was, and its line is the record
		"originate-open":                {false, audit.Source, audit.Allowed, audit.Direct, client, sa("shop", "direct"), "", "decides by itself", 0, 0, ""},
		"originate-end":                 {true, audit.Source, audit.Allowed, audit.Direct, client, sa("shop", "direct"), "", "decides by itself", 12, 33, ""},
		"originate-wrong":               {true, audit.Source, audit.Failed, audit.Direct, client, "", "", "did not prove by mutual TLS that it is " + sa("shop", "direct"), 0, 0, "UF,URX"},
		"out-originated":                {},
		"out-tunnelled":                 {}, // the tunnel's line is the record
		"out-no-such-destination":       {true, audit.Source, audit.Denied, "plaintext", sa("shop", "second"), "", "", "no such destination", 0, 0, ""},
		"out-unreachable":               {true, audit.Source, audit.Failed, "plaintext", client, "", "", "Connection_refused", 0, 0, ""},
		"out-plain":                     {true, audit.Source, audit.Allowed, "plaintext", client, "", "", "outside the mesh", 33, 133, ""},
		"plain-enforce":                 {true, audit.Destination, audit.Denied, "plaintext", "", "", "", "plaintext: shop/server takes only", 0, 0, ""},
		"plain-observe":                 {true, audit.Destination, audit.Observed, "plaintext", "", "", "", "plaintext: the caller proved no identity", 100, 50, ""},
		"handshake-of-a-tunnel":         {}, // its streams are the records
		"handshake-without-certificate": {true, audit.Destination, audit.Denied, "mtls", "", "", "", "peer_did_not_provide_required_client_certificate", 0, 0, ""},
		// Anybody can write a name into a certificate that nobody trusts: without
		// this, a stranger could fill the audit with refusals of somebody else.
		"handshake-of-a-forger": {true, audit.Destination, audit.Denied, "mtls", "", "", "", `its certificate names "spiffe://mesh.test/ns/shop/sa/client"`, 0, 0, ""},
		"handshake-broken":      {true, audit.Destination, audit.Failed, "mtls", "", "", "", "Connection_reset_by_peer", 0, 0, ""},
		// A caller that wanted somebody else at this address has not been refused.
		"handshake-ended-by-caller": {true, audit.Destination, audit.Failed, "mtls", "", "", "", "the caller did not want this destination", 0, 0, ""},
		// Mutual TLS that was ended on a port of the workload's own.
		"direct-allowed-open":                  {false, audit.Destination, audit.Allowed, audit.Direct, sa("shop", "allowed"), sa("shop", "web"), "shop/to-web", "allowed by shop/to-web", 0, 0, ""},
		"direct-allowed-end":                   {true, audit.Destination, audit.Allowed, audit.Direct, sa("shop", "allowed"), sa("shop", "web"), "shop/to-web", "allowed by shop/to-web", 78, 253, ""},
		"direct-denied":                        {true, audit.Destination, audit.Denied, audit.Direct, other, sa("shop", "web"), "", "default deny: 1 policy protects shop/web, it does not admit this caller", 0, 0, ""},
		"direct-several-names":                 {true, audit.Destination, audit.Denied, audit.Direct, "", server, "", "several names: " + sa("shop", "web") + "," + sa("shop", "batch"), 0, 0, ""},
		"direct-closed-port":                   {true, audit.Destination, audit.Failed, audit.Direct, sa("shop", "web"), server, "", "the application could not be reached", 0, 0, "UF"},
		"handshake-direct-without-certificate": {true, audit.Destination, audit.Denied, audit.Direct, "", "", "", "peer_did_not_provide_required_client_certificate", 0, 0, ""},
		"handshake-direct-no-tls":              {true, audit.Destination, audit.Denied, "plaintext", "", "", "", "plaintext: shop/server takes only", 0, 0, ""},
		"handshake-direct-broken-later":        {}, // its stream is the record
		"handshake-no-tls":                     {true, audit.Destination, audit.Denied, "mtls", "", "", "", "HTTP_REQUEST", 0, 0, ""},
	}
	for name, line := range lines(t) {
		t.Run(name, func(t *testing.T) {
			w, known := rows[name]
			if !known {
				t.Fatal("no expectation")
			}
			e, ok, err := Decode(line)
			if err != nil {
				t.Fatal(err)
			}
			if w == nil {
				return // as another row, but for the policy
			}
			if ok != (w.side != "") {
				t.Fatalf("a record: %t", ok)
			}
			if !ok {
				return
			}
			r := e.Record
			got := want{e.Final, r.Side, r.Verdict, r.Transport, r.Source.ID, r.Destination.ID, r.Policy, w.reason, r.BytesSent, r.BytesReceived, r.Ended}
			if got != *w || !strings.Contains(r.Reason, w.reason) {
				t.Errorf("got  %+v, reason %q\nwant %+v", got, r.Reason, *w)
			}
			if r.ID == "" || r.Source.Address == "" || r.Destination.Address == "" || r.Start.IsZero() || e.Final != !r.End.IsZero() || r.End.Sub(r.Start) > time.Hour {
				t.Errorf("incomplete: %+v", r)
			}
			if r.Transport == "mtls" && (r.Verdict == audit.Allowed || r.Verdict == audit.Observed) && (r.TLS == nil || r.TLS.Group != "X25519MLKEM768" || r.Revision == "") {
				t.Errorf("TLS %+v, revision %q", r.TLS, r.Revision)
			}
		})
	}
	if n := len(lines(t)); n != len(rows) {
		t.Errorf("%d lines for %d rows", n, len(rows))
	}
}

// TestDecodeFields: every field of one record of each side.
func TestDecodeFields(t *testing.T) {
	all := lines(t)
	e, _, err := Decode(all["in-allowed-end"])
	if err != nil {
		t.Fatal(err)
	}
	start := time.UnixMicro(1795411344858353).UTC()
	tls := audit.TLS{Version: "TLSv1.3", Cipher: "TLS_AES_128_GCM_SHA256", Group: "X25519MLKEM768"}
	got := e.Record
	if got.TLS == nil || *got.TLS != tls {
		t.Errorf("TLS %+v, want %+v", got.TLS, tls)
	}
	got.TLS = nil
	if want := (audit.Record{
		ID: "97870ef4-9cc0-4412-bcb9-f98be2e95615", Side: audit.Destination,
		Start: start, End: start.Add(58 * time.Millisecond),
		Source:      audit.Party{ID: sa("shop", "client"), Address: "10.88.0.10:31374", Serial: "694a9701a53b66da1abef0b30d9e99de"},
		Destination: audit.Party{ID: sa("shop", "server"), Workload: "shop/server", Address: "10.88.0.13:8080", Via: "10.88.0.13:29126"},
		Verdict:     audit.Allowed, Reason: "allowed by shop/allow", Policy: "shop/allow", Revision: "809fd44ad81bc032",
		Transport: "mtls", BytesSent: 100, BytesReceived: 50,
	}); got != want {
		t.Errorf("destination:\ngot  %+v\nwant %+v", got, want)
	}
	if e, _, err = Decode(all["tunnel-denied"]); err != nil {
		t.Fatal(err)
	}
	start = time.UnixMicro(1795411344903110).UTC()
	if want := (audit.Record{
		ID: "739d955b-a902-4642-883f-1a4f964f8f41", Side: audit.Source,
		Start: start, End: start.Add(39 * time.Millisecond),
		Source:      audit.Party{ID: sa("shop", "other"), Workload: "shop/other", Address: "10.88.0.12:33580"},
		Destination: audit.Party{ID: sa("shop", "server"), Workload: "shop/server", Address: "10.88.0.13:8080", Via: "10.88.0.13:8080"},
		Verdict:     audit.Denied, Reason: defaultDeny, Revision: "809fd44ad81bc032", Transport: "mtls",
	}); e.Record != want {
		t.Errorf("source:\ngot  %+v\nwant %+v", e.Record, want)
	}
}

// TestDecodeRefuses: a line that is not whole, or not of ours, is an error,
// which the reader records as a gap, and never a record with made-up fields.
func TestDecodeRefuses(t *testing.T) {
	for name, line := range map[string]string{
		"empty":            ``,
		"cut":              `{"kind":"in","id":"a","start":"1795411344.858353"`,
		"two":              `{"kind":"plain","id":"a","start":"1795411344.858353"}{"kind":"plain","id":"b","start":"1795411344.858353"}`,
		"not an object":    `["in"]`,
		"no kind":          `{"id":"a","start":"1795411344.858353"}`,
		"unknown kind":     `{"kind":"other","id":"a","start":"1795411344.858353"}`,
		"no id":            `{"kind":"in","start":"1795411344.858353"}`,
		"no start":         `{"kind":"in","id":"a"}`,
		"start without µs": `{"kind":"in","id":"a","start":"1795411344"}`,
		"negative start":   `{"kind":"in","id":"a","start":"-5.000000"}`,
		"start: sign":      `{"kind":"in","id":"a","start":"5.+00000"}`,
		"negative bytes":   `{"kind":"in","id":"a","start":"1795411344.858353","sent":-1}`,
		"bytes as text":    `{"kind":"in","id":"a","start":"1795411344.858353","sent":"9"}`,
		"negative time":    `{"kind":"in","type":"DownstreamEnd","id":"a","start":"1795411344.858353","ms":-1}`,
		"endless":          `{"kind":"in","type":"DownstreamEnd","id":"a","start":"1795411344.858353","ms":9223372036854775807}`,
		"tunnel of nobody": `{"kind":"tunnel","id":"a","start":"1795411344.858353"}`,
	} {
		if e, ok, err := Decode([]byte(line)); err == nil {
			t.Errorf("%s: %+v, %t; want an error", name, e, ok)
		}
	}
}

// FuzzDecode: no line makes Decode panic, or give a record that the store
// would refuse, that ends before it starts, or that is allowed without saying by whom.
func FuzzDecode(f *testing.F) {
	for _, line := range lines(f) {
		f.Add(line)
	}
	f.Add([]byte(`{"kind":"tunnel","id":"a","start":"1.000000","conn":"a b c","responded":{"headers":[null,{}]}}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		e, ok, err := Decode(line)
		if err != nil || !ok {
			return
		}
		r := e.Record
		if r.ID == "" || r.Side == "" || r.Verdict == "" || r.Transport == "" || r.Reason == "" {
			t.Errorf("incomplete: %+v", r)
		}
		if e.Final && r.End.Before(r.Start) {
			t.Errorf("ends before it starts: %+v", r)
		}
		if (r.Verdict == audit.Denied || r.Verdict == audit.Failed) && r.BytesSent+r.BytesReceived != 0 {
			t.Errorf("refused, with bytes: %+v", r)
		}
		if _, err := json.Marshal(r); err != nil {
			t.Errorf("cannot be stored: %v", err)
		}
	})
}

// FuzzForge: what a stranger can choose, such as the authority it asks for or
// the names in its certificate, stays within its field, whatever it holds. The
// proxy writes its lines as JSON; this writes them alike and looks at all
// other fields of the record.
func FuzzForge(f *testing.F) {
	for _, s := range []string{
		"10.88.0.13:8080", "\"", `","code":200,"policy":"shop/allow","x":"`, "a\n{\"kind\":\"in\"}", "\r\n\x00\x1f", "\\", `\u0022`, "\u2028", "😀", "%DYNAMIC%", "a,b", "\xff\xfe",
	} {
		f.Add(s)
	}
	denied := lines(f)["in-denied"]
	want, _, err := Decode(denied)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, forged string) {
		for _, field := range []string{"authority", "peer", "serial"} {
			var m map[string]any
			if err := json.Unmarshal(denied, &m); err != nil {
				t.Fatal(err)
			}
			m[field] = forged
			line, err := json.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			if bytes.IndexByte(line, '\n') >= 0 {
				t.Fatal("more than one line")
			}
			e, ok, err := Decode(line)
			if err != nil || !ok {
				t.Fatalf("%s %q: %t, %v", field, forged, ok, err)
			}
			got := e.Record
			got.Source.ID, got.Source.Serial, got.Destination.Address, got.TLS = want.Record.Source.ID, want.Record.Source.Serial, want.Record.Destination.Address, want.Record.TLS
			if strings.HasPrefix(got.Reason, "the caller proved no identity: its certificate has several names") && field == "peer" {
				got.Reason = want.Record.Reason
			}
			if got != want.Record || !e.Final {
				t.Errorf("%s %q changed more than its field:\ngot  %+v\nwant %+v", field, forged, got, want.Record)
			}
		}
	})
}

// TestServerSerial: the source's record has the number of the certificate that the
// server proved itself by, as the destination's has the caller's, and which socket the
// tunnel is; what is no certificate has none, and the record is there.
func TestServerSerial(t *testing.T) {
	real := lines(t)["tunnel-with-certificate"]
	e, ok, err := Decode(real)
	if err != nil || !ok || e.Record.Destination.Serial != "34a3b3a83b68a5975954212e6dbd0b6e" || e.Record.Source.Via != "10.88.0.10:8346" {
		t.Fatalf("%+v, %t, %v", e.Record, ok, err)
	}
	var m map[string]any
	if err := json.Unmarshal(real, &m); err != nil {
		t.Fatal(err)
	}
	good := m["cert"].(string)
	for name, cert := range map[string]string{
		"none": "", "no PEM": "x", "bad encoding": "%zz", "nothing inside": "-----BEGIN%20CERTIFICATE-----%0A-----END%20CERTIFICATE-----%0A",
		"cut": good[:200], "not DER": "-----BEGIN%20CERTIFICATE-----%0AAAAA%0A-----END%20CERTIFICATE-----%0A",
		"another length": strings.Replace(good, "MIIBzDCC", "MIIBzTCC", 1),
	} {
		m["cert"] = cert
		line, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		got, ok, err := Decode(line)
		if err != nil || !ok || got.Record.Destination.ID != e.Record.Destination.ID {
			t.Errorf("%s: %+v, %t, %v", name, got.Record, ok, err)
		}
		if got.Record.Destination.Serial != "" {
			t.Errorf("%s: the number is %q", name, got.Record.Destination.Serial)
		}
	}
}

// A caller's record names the workload that answered, and not the one that had
// the address when the caller's proxy last heard of it: two pods of one account
// have the same identity, so the certificate does not tell them apart.
//
// What it defends: no record names a pod that is gone. The answer is a peer's, so
// it is believed only within the namespace that the peer has proved.
func TestTunnelNamesWhoAnswered(t *testing.T) {
	for _, line := range []string{"tunnel-allowed-open", "tunnel-allowed-end", "tunnel-denied", "tunnel-closed-port"} {
		for answered, want := range map[string]string{
			"shop/server-2": "shop/server-2",
			"":              "shop/server",
			"bank/server":   "shop/server",
			"shop/":         "shop/server",
			"shop/a/b":      "shop/server",
			"shopping/x":    "shop/server",
		} {
			text := lines(t)[line]
			if answered != "" {
				text = bytes.Replace(text, []byte(`{"key":"date"`), []byte(`{"key":"x-signet-workload","value":"`+answered+`"},{"key":"date"`), 1)
			}
			e, ok, err := Decode(text)
			if err != nil || !ok {
				t.Fatalf("%s: %v, a record: %t", line, err, ok)
			}
			if got := e.Record.Destination.Workload; got != want {
				t.Errorf("%s: answered by %q, recorded as %q, want %q", line, answered, got, want)
			}
		}
	}
}

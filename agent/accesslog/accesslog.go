// Package accesslog reads the lines that the node proxy writes about
// connections and turns them into audit events. The lines' fields are defined
// in package xds.
package accesslog

import (
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math"
	"math/big"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/xds"
)

// line is one access log line; which fields are set depends on its kind.
type line struct {
	Proxy    string `json:"proxy"` // put in by its parent; see internal/proxy
	Kind     string `json:"kind"`
	Type     string `json:"type"`
	ID       string `json:"id"`
	Start    string `json:"start"` // seconds since the epoch, with microseconds
	MS       int64  `json:"ms"`
	Flags    string `json:"flags"`
	Sent     uint64 `json:"sent"`
	Received uint64 `json:"received"`

	Workload  string `json:"workload"`
	Mode      string `json:"mode"`
	Src       string `json:"src"`
	Dst       string `json:"dst"`
	Upstream  string `json:"upstream"`
	Conn      string `json:"conn"`
	Self      string `json:"self"`
	Client    string `json:"client"`
	Peer      string `json:"peer"`
	Cert      string `json:"cert"` // the server's, PEM, URL-encoded
	PeerDNS   string `json:"peerDNS"`
	Want      string `json:"want"`
	Endpoint  string `json:"endpoint"`
	Authority string `json:"authority"`
	Local     string `json:"local"`
	Serial    string `json:"serial"`
	Code      int    `json:"code"`
	Details   string `json:"details"`
	Failure   string `json:"failure"`
	Policy    string `json:"policy"`
	Shadow    string `json:"shadow"`
	Shadowed  string `json:"shadowed"`
	Revision  string `json:"revision"`
	Deny      string `json:"deny"`
	Cluster   string `json:"cluster"`
	// Quarantine cuts the listener's own workload off.
	Quarantine string `json:"quarantine"`
	TLS        string `json:"tls"`
	Cipher     string `json:"cipher"`
	Group      string `json:"group"`
	// Direct describes a connection whose TLS was ended on the workload's own
	// port; in a line about a handshake that was to be one it is what was dialled.
	Direct string `json:"direct"`

	Responded struct {
		Headers []struct {
			Key   string `json:"key"`
			Value string `json:"value"`
		} `json:"headers"`
	} `json:"responded"`
}

// maxMS is the longest connection that a line is believed, in milliseconds: 68 years.
const maxMS = math.MaxInt32 * 1000

// Decode reads one line. It reports false for a line that carries no record of
// its own, because another line describes the same connection.
func Decode(b []byte) (audit.Event, bool, error) {
	var l line
	if err := json.Unmarshal(b, &l); err != nil {
		return audit.Event{}, false, fmt.Errorf("access log: %w", err)
	}
	start, err := parseTime(l.Start)
	if err != nil {
		return audit.Event{}, false, fmt.Errorf("access log: start: %w", err)
	}
	if l.MS < 0 || l.MS > maxMS {
		return audit.Event{}, false, fmt.Errorf("access log: ms: %d is not a duration from 0 to %d ms", l.MS, int64(maxMS))
	}
	e := audit.Event{Record: audit.Record{
		ID: l.ID, Proxy: l.Proxy, Start: start, BytesSent: l.Sent, BytesReceived: l.Received,
	}}
	switch l.Kind {
	case xds.LineInbound:
		inbound(&l, &e)
	case xds.LineDirect:
		if err := direct(&l, &e); err != nil {
			return audit.Event{}, false, err
		}
	case xds.LineTunnel:
		if err := tunnel(&l, &e); err != nil {
			return audit.Event{}, false, err
		}
	case xds.LineOriginate:
		if err := originate(&l, &e); err != nil {
			return audit.Event{}, false, err
		}
	case xds.LineOutbound:
		endpoint, tunnelled := strings.CutPrefix(l.Upstream, xds.UpstreamTunnel)
		switch {
		case tunnelled && unproven(l.Failure):
			insideTunnel(&l, &e, endpoint)
		case strings.HasPrefix(l.Upstream, xds.UpstreamInside):
			return audit.Event{}, false, nil // the line of where it went on is the record
		default:
			outbound(&l, &e)
		}
	case xds.LinePlain:
		plain(&l, &e)
	case xds.LineHandshake:
		if l.Failure == "" || l.Direct != "" && l.Upstream != "" {
			return audit.Event{}, false, nil // the streams in it are the records, also when it broke later
		}
		handshake(&l, &e)
	default:
		return audit.Event{}, false, fmt.Errorf("access log: unknown kind %q", l.Kind)
	}
	if e.Record.ID == "" {
		return audit.Event{}, false, fmt.Errorf("access log: a %s line without an id", l.Kind)
	}
	if e.Final {
		e.Record.End = start.Add(time.Duration(l.MS) * time.Millisecond)
	}
	if v := e.Record.Verdict; v == audit.Denied || v == audit.Failed {
		// What was counted is the proxy's own answer; the applications
		// exchanged nothing.
		e.Record.BytesSent, e.Record.BytesReceived = 0, 0
	}
	return e, true, nil
}

// inbound is a CONNECT stream at the destination.
func inbound(l *line, e *audit.Event) {
	r := &e.Record
	e.Final = l.Type == "DownstreamEnd"
	r.Side, r.Transport = audit.Destination, "mtls"
	r.Source = audit.Party{ID: l.Peer, Address: l.Src, Serial: l.Serial}
	r.Destination = audit.Party{ID: l.Self, Workload: l.Workload, Address: l.Authority, Via: l.Local}
	r.TLS = negotiated(l)
	r.Revision = l.Revision
	switch {
	case l.Code == 403 && severalNames(l):
		// None of the names is the caller's.
		r.Source.ID = ""
		r.Verdict, r.Reason = audit.Denied, "the caller proved no identity: its certificate has several names: "+strings.Trim(l.Peer+","+l.PeerDNS, ",")
	case l.Code == 403 && quarantine(l) != "":
		r.Verdict, r.Reason = audit.Denied, authz.CallerCutOff(quarantine(l), l.Peer)
	case l.Code == 403 && deniedBy(l, xds.PolicyRevoked):
		r.Verdict, r.Reason = audit.Denied, authz.CallerRevoked
	case l.Code == 403 && (deniedBy(l, xds.PolicyExpired) || deniedBy(l, xds.PolicyUndated)):
		r.Verdict, r.Reason = audit.Denied, authz.CallerExpired
	case l.Code == 403:
		r.Verdict, r.Reason = audit.Denied, l.Deny
		if r.Reason == "" {
			r.Reason = "default deny: no policy is in force yet"
		}
	case l.Code != 200:
		r.Verdict, r.Reason = audit.Failed, "the application could not be reached: "+words(l.Details, l.Flags)
	case l.Shadow == "denied":
		r.Verdict, r.Reason = audit.Observed, l.Deny
	case l.Shadow == "allowed":
		r.Verdict, r.Policy, r.Reason = audit.Allowed, l.Shadowed, authz.Allowed(l.Shadowed)
	default:
		r.Verdict, r.Policy, r.Reason = audit.Allowed, l.Policy, authz.Allowed(l.Policy)
	}
	if e.Final && r.Verdict != audit.Denied {
		r.Ended = flags(l.Flags)
	}
}

// direct is a connection whose TLS was ended on the workload's own port. What is
// known of it beyond its CONNECT stream is in one field; see package xds.
func direct(l *line, e *audit.Event) error {
	conn := strings.Fields(l.Direct)
	if len(conn) != 6 {
		return fmt.Errorf("access log: direct %q: want number, source, own identity and TLS version, cipher and group", l.Direct)
	}
	l.Src, l.Self, l.TLS, l.Cipher, l.Group = conn[1], conn[2], conn[3], conn[4], conn[5]
	l.Peer, l.PeerDNS = strings.TrimPrefix(l.Peer, "-"), strings.TrimPrefix(l.PeerDNS, "-") // no such name
	inbound(l, e)
	e.Record.Transport = audit.Direct
	return nil
}

// deniedBy reports whether a rule of the proxy's own refused the caller.
func deniedBy(l *line, rule string) bool {
	return strings.Contains(l.Details, "rbac_access_denied_matched_policy["+rule+"]")
}

// quarantine returns the name of the quarantine that refused the caller.
func quarantine(l *line) string {
	_, after, _ := strings.Cut(l.Details, "rbac_access_denied_matched_policy["+xds.PolicyQuarantine)
	name, _ := strings.CutSuffix(after, "]")
	return name
}

// severalNames reports whether a certificate names more than one identity, as
// the proxy sees it; see package xds.
func severalNames(l *line) bool {
	return strings.Contains(l.Peer, ",") || strings.Contains(l.PeerDNS, ":")
}

// tunnel is a connection that left, or should have left, through a tunnel.
func tunnel(l *line, e *audit.Event) error {
	conn, err := captured(l)
	if err != nil {
		return err
	}
	r := &e.Record
	e.Final = l.Type == "TcpConnectionEnd"
	r.Side, r.Transport = audit.Source, "mtls"
	r.Source = audit.Party{ID: l.Client, Workload: conn[0], Address: conn[1], Via: l.Local}
	r.Destination = audit.Party{ID: l.Peer, Workload: l.Workload, Address: conn[2], Via: l.Endpoint, Serial: serial(l.Cert)}
	if strings.Contains(l.Peer, ",") {
		// The proxy made sure that the wanted identity is among the names, and
		// several names are nobody's.
		r.Destination.ID = l.Want
	}
	r.TLS = negotiated(l)
	header := map[string]string{}
	for _, h := range l.Responded.Headers {
		header[h.Key] = h.Value
	}
	r.Revision = header[xds.HeaderRevision]
	r.Destination.Workload = reached(l.Workload, header[xds.HeaderWorkload])
	switch {
	case header[":status"] == "403", header[":status"] == "401": // 401: a ztunnel's refusal
		r.Verdict, r.Reason = audit.Denied, header[xds.HeaderReason]
		// The peer proved its identity before it refused, or the handshake
		// would not have ended.
		r.Destination.ID = l.Want
		if r.Reason == "" {
			r.Reason = "refused by the destination"
		}
	case header[":status"] == "200":
		r.Verdict, r.Policy = audit.Allowed, header[xds.HeaderPolicy]
		r.Reason = authz.Allowed(r.Policy)
		if header[xds.HeaderShadow] == "denied" {
			r.Verdict, r.Policy, r.Reason = audit.Observed, "", "allowed by observe mode; enforce would deny"
		} else if r.Policy == "" {
			r.Reason = "accepted by the destination"
		}
	case e.Final:
		r.Verdict = audit.Failed
		if strings.Contains(l.Failure, "TLS") || strings.Contains(l.Failure, "CERTIFICATE") {
			r.Reason = "the peer did not prove that it is " + l.Want + ": " + l.Failure
		} else {
			r.Reason = "the destination could not be reached: " + words(l.Failure, l.Flags)
		}
	default:
		r.Verdict, r.Reason = audit.Allowed, "accepted by the destination"
	}
	if e.Final && r.Verdict != audit.Denied {
		r.Ended = flags(l.Flags)
	}
	return nil
}

// captured is what the captured connection said of itself: workload, source and
// destination.
func captured(l *line) ([]string, error) {
	conn := strings.Fields(l.Conn)
	if len(conn) != 3 {
		return nil, fmt.Errorf("access log: conn %q: want workload, source and destination", l.Conn)
	}
	return conn, nil
}

// originate is a connection that left, or should have left, as mutual TLS with an
// application that is not captured.
func originate(l *line, e *audit.Event) error {
	conn, err := captured(l)
	if err != nil {
		return err
	}
	r := &e.Record
	e.Final = l.Type == "TcpConnectionEnd"
	r.Side, r.Transport = audit.Source, audit.Direct
	r.Source = audit.Party{ID: l.Client, Workload: conn[0], Address: conn[1], Via: l.Local}
	r.Destination = audit.Party{Address: conn[2], Via: l.Endpoint}
	r.TLS = negotiated(l)
	switch {
	case r.TLS != nil:
		r.Destination.ID, r.Destination.Serial = l.Want, serial(l.Cert)
		r.Verdict, r.Reason = audit.Allowed, "the application proved who it is; whom it admits it decides by itself"
	case unproven(l.Failure):
		r.Verdict, r.Reason = audit.Failed, notWanted(l)
	default:
		r.Verdict, r.Reason = audit.Failed, "the application could not be reached: "+words(l.Failure, l.Flags)
	}
	if e.Final {
		r.Ended = flags(l.Flags)
	}
	return nil
}

// insideTunnel is a connection whose application was to speak mutual TLS inside the
// tunnel, and did not, or as somebody else. The tunnel has a record of its own.
func insideTunnel(l *line, e *audit.Event, endpoint string) {
	r := &e.Record
	e.Final = true
	r.Side, r.Transport = audit.Source, "mtls"
	r.Source = audit.Party{ID: l.Self, Workload: l.Workload, Address: l.Src}
	r.Destination = audit.Party{Address: l.Dst, Via: endpoint}
	r.Verdict, r.Reason = audit.Failed, "inside the tunnel, "+notWanted(l)
}

// unproven reports whether a handshake failed over what the application showed, and
// not because the connection broke.
func unproven(failure string) bool { return strings.Contains(failure, "SSL_routines") }

func notWanted(l *line) string {
	return "the application did not prove by mutual TLS that it is " + l.Want + ": " + l.Failure
}

// reached returns the workload that answered a tunnel. The certificate proves an
// account; which of its workloads has the address now only the answer says, for
// what the caller's proxy wanted may have been deleted. An answer that names a
// workload of another namespace than the proved one is not believed; a ztunnel's
// names none.
func reached(wanted, answered string) string {
	namespace, _, _ := strings.Cut(wanted, "/")
	if name, ok := strings.CutPrefix(answered, namespace+"/"); !ok || name == "" || strings.Contains(name, "/") {
		return wanted
	}
	return answered
}

// outbound is a connection that did not go into a tunnel.
func outbound(l *line, e *audit.Event) {
	r := &e.Record
	e.Final = true
	r.Side, r.Transport = audit.Source, "plaintext"
	r.Source = audit.Party{ID: l.Self, Workload: l.Workload, Address: l.Src}
	r.Destination = audit.Party{Address: l.Dst, Via: l.Upstream}
	switch {
	case l.Quarantine != "":
		r.Verdict, r.Reason = audit.Denied, authz.CallerCutOff(l.Quarantine, l.Self)
	case strings.Contains(l.Flags, "NC"), l.Cluster == xds.ClusterRefused:
		r.Verdict, r.Reason = audit.Denied, "no such destination in the mesh"
	case l.Upstream == "":
		r.Verdict, r.Reason = audit.Failed, "the destination has no endpoint: "+words(l.Failure, l.Flags)
	case strings.Contains(l.Flags, "UF"):
		r.Verdict, r.Reason = audit.Failed, "the destination could not be reached: "+words(l.Failure, l.Flags)
	default:
		r.Verdict, r.Reason = audit.Allowed, "the destination is outside the mesh"
		r.Ended = flags(l.Flags)
	}
}

// plain is a connection that reached a workload without a tunnel.
func plain(l *line, e *audit.Event) {
	r := &e.Record
	e.Final = true
	r.Side, r.Transport = audit.Destination, "plaintext"
	r.Source = audit.Party{Address: l.Src}
	r.Destination = audit.Party{Workload: l.Workload, Address: l.Dst, Via: l.Local}
	if l.Quarantine != "" {
		r.Verdict, r.Reason = audit.Denied, "quarantined by "+strconv.Quote(l.Quarantine)+": "+l.Workload+" is cut off"
		return
	}
	if l.Mode == "observe" {
		r.Verdict, r.Reason = audit.Observed, "plaintext: the caller proved no identity"
		r.Ended = flags(l.Flags)
		return
	}
	r.Verdict, r.Reason = audit.Denied, plaintextRefused(l.Workload)
}

func plaintextRefused(workload string) string {
	return "plaintext: " + workload + " takes only connections whose caller proves an identity"
}

// noTLS reports whether a handshake failed because what came is no TLS.
func noTLS(failure string) bool {
	for _, sign := range []string{"HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "WRONG_VERSION_NUMBER"} {
		if strings.Contains(failure, ":"+sign) {
			return true
		}
	}
	return false
}

// handshake is a connection to the tunnel port that did not become a tunnel, or
// one to a port of the workload's own on which TLS is ended.
func handshake(l *line, e *audit.Event) {
	r := &e.Record
	e.Final = true
	if r.ID == "" {
		// Envoy gives raw connections no stream id.
		r.ID = fmt.Sprintf("handshake-%s-%s", l.Src, l.Start)
	}
	r.Side, r.Transport = audit.Destination, "mtls"
	if l.Direct != "" {
		r.Transport, l.Dst = audit.Direct, l.Direct
	}
	// What the caller's certificate names is no identity: anybody can make one
	// that names anybody. It is told, and the record is nobody's.
	r.Source = audit.Party{Address: l.Src}
	r.Destination = audit.Party{Workload: l.Workload, Address: l.Dst}
	r.Verdict, r.Reason = audit.Denied, "the caller proved no identity: "+l.Failure
	if l.Peer != "" {
		r.Reason += fmt.Sprintf("; its certificate names %.256q", l.Peer)
	}
	switch {
	case l.Direct != "" && noTLS(l.Failure):
		r.Transport, r.Reason = "plaintext", plaintextRefused(l.Workload)
	case strings.Contains(l.Failure, "_ALERT_CERTIFICATE_UNKNOWN"):
		// The alert is the caller's, for whom this certificate is not that of
		// whoever it wanted: the address had another workload before.
		r.Verdict, r.Reason = audit.Failed, "the caller did not want this destination: it ended the handshake over the certificate that it was shown: "+l.Failure
	case strings.Contains(l.Failure, "system_library") && !strings.Contains(l.Failure, "CERTIFICATE"):
		// Nobody was judged: a caller that ends, for one, takes its handshakes along.
		r.Verdict, r.Reason = audit.Failed, "the connection broke in the handshake: "+l.Failure
	}
}

// serial reads the serial number of a certificate, as the proxy writes that of a
// caller. Whose the certificate is has been verified; of one that cannot be read there
// is none.
func serial(encoded string) string {
	text, err := url.PathUnescape(encoded)
	if err != nil {
		return ""
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return ""
	}
	// RFC 5280, section 4.1: Certificate, TBSCertificate, version, which one with names
	// has, serialNumber.
	var cert, tbs, version asn1.RawValue
	var number *big.Int
	if _, err := asn1.Unmarshal(block.Bytes, &cert); err != nil {
		return ""
	}
	if _, err := asn1.Unmarshal(cert.Bytes, &tbs); err != nil {
		return ""
	}
	rest, err := asn1.Unmarshal(tbs.Bytes, &version)
	if err != nil || version.Class != asn1.ClassContextSpecific {
		return ""
	}
	if _, err := asn1.Unmarshal(rest, &number); err != nil || number.Sign() <= 0 {
		return ""
	}
	return hex.EncodeToString(number.Bytes())
}

func negotiated(l *line) *audit.TLS {
	if l.TLS == "" {
		return nil
	}
	return &audit.TLS{Version: l.TLS, Cipher: l.Cipher, Group: l.Group}
}

func flags(f string) string {
	if f == "-" {
		return ""
	}
	return f
}

func words(text, f string) string {
	switch {
	case text == "":
		return flags(f)
	case flags(f) == "":
		return text
	}
	return text + " (" + f + ")"
}

func parseTime(s string) (time.Time, error) {
	sec, frac, ok := strings.Cut(s, ".")
	n, err := strconv.ParseInt(sec, 10, 64)
	if err != nil || !ok || len(frac) != 6 || n < 0 || n > math.MaxInt32*4 {
		return time.Time{}, fmt.Errorf("%q is not seconds and microseconds", s)
	}
	micro, err := strconv.ParseUint(frac, 10, 32) // takes no sign
	if err != nil {
		return time.Time{}, fmt.Errorf("%q is not seconds and microseconds", s)
	}
	return time.Unix(n, int64(micro)*1000).UTC(), nil
}

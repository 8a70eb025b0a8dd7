package sdkapi

import (
	"context"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"
	"time"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/agent/audit"
	sdkv1 "github.com/signet-mesh/signet/api/sdk/v1"
	"github.com/signet-mesh/signet/internal/mesh"
)

const (
	// MaxEvents is the most events of one report.
	MaxEvents = 128

	maxText    = 512             // bytes of a reason
	maxName    = 1024            // bytes of any other text
	maxAddress = 128             // bytes of ip:port
	tolerance  = 5 * time.Second // of an event's time
	prefix     = "sdk:"
	// reporter is Record.Proxy: the workload itself made the record.
	reporter = "sdk"
)

// Owns reports whether a record was made by a workload, and not by a proxy.
func Owns(r *audit.Record) bool { return strings.HasPrefix(r.ID, prefix) }

// recordPrefix begins the id of every record of a session. No proxy's and no
// other workload's ids begin so.
func recordPrefix(workload string, session []byte) string {
	return prefix + workload + ":" + hex.EncodeToString(session) + ":"
}

// Report implements the service.
func (s *Server) Report(ctx context.Context, req *sdkv1.ReportRequest) (*sdkv1.ReportResponse, error) {
	p, err := s.cfg.Caller(ctx)
	if err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	if _, known := s.cfg.Rules(); !known {
		return nil, status.Error(codes.Unavailable, "the agent is starting")
	}
	w, err := s.attest(ctx, "Report", p, req.GetSpiffeId())
	if err != nil {
		return nil, err
	}
	if n := len(req.GetEvents()); n > MaxEvents {
		return nil, status.Errorf(codes.InvalidArgument, "events: %d in one report; at most %d are taken", n, MaxEvents)
	}
	if req.GetFirst() == 0 || req.GetFirst()+uint64(len(req.GetEvents())) < req.GetFirst() {
		return nil, status.Errorf(codes.InvalidArgument, "first: %d is not the number of an event, which begin with 1", req.GetFirst())
	}
	var events []audit.Event
	for i, e := range req.GetEvents() {
		event, err := event(e, w, req.GetSession(), time.Now())
		if err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "events[%d].%v", i, err)
		}
		events = append(events, event)
	}
	open, may, err := s.session(w.Key(), req.GetSession(), 0)
	if err != nil {
		return nil, err
	}
	if !may.events.AllowN(time.Now(), len(events)+1) {
		return nil, status.Errorf(codes.ResourceExhausted, "%s has made too many connections at once; its events are taken later, %d a second", w.Key(), eventsSecond)
	}
	open.reporting.Lock()
	defer open.reporting.Unlock()
	return s.store(ctx, open, w, req, events)
}

// store stores what has not been stored. open.reporting is held.
func (s *Server) store(ctx context.Context, open *session, w *mesh.Workload, req *sdkv1.ReportRequest, events []audit.Event) (*sdkv1.ReportResponse, error) {
	if s.cfg.Store == nil {
		return &sdkv1.ReportResponse{}, nil
	}
	after := req.GetFirst() + uint64(len(events))
	if open.next != 0 && after <= open.next && len(events) > 0 {
		return &sdkv1.ReportResponse{}, nil
	}
	switch {
	case open.next > req.GetFirst():
		events = events[open.next-req.GetFirst():]
	case open.next == 0 && len(events) > 0:
		// An earlier run of this agent may have stored some of them, and died
		// before it could say so.
		ended, err := s.ended(ctx, recordPrefix(w.Key(), req.GetSession()), events)
		if err != nil {
			return nil, status.Error(codes.Unavailable, err.Error())
		}
		kept := events[:0]
		for _, e := range events {
			if !ended[e.Record.ID] {
				kept = append(kept, e)
			}
		}
		events = kept
	}
	if len(events) > 0 {
		if err := s.cfg.Store.Add(ctx, events); err != nil {
			s.cfg.Log.Error("storing what a workload reported", "workload", w.Key(), "error", err)
			return nil, status.Error(codes.Unavailable, "the audit store does not take it now")
		}
	}
	if n := req.GetLost(); n > 0 {
		if err := s.cfg.Store.Gap(ctx, "", min(n, 1<<32), fmt.Sprintf("%s had no room for the events of its connections while the agent did not take them", w.Key())); err != nil {
			return nil, status.Error(codes.Unavailable, "the audit store does not take it now")
		}
	}
	open.next = max(open.next, after)
	return &sdkv1.ReportResponse{}, nil
}

// ended returns which of the records that begin with the prefix are at their
// end already.
func (s *Server) ended(ctx context.Context, prefix string, events []audit.Event) (map[string]bool, error) {
	since := events[0].Record.Start
	for _, e := range events {
		if e.Record.Start.Before(since) {
			since = e.Record.Start
		}
	}
	out := map[string]bool{}
	err := s.cfg.Store.Query(ctx, audit.Filter{Since: since}, func(r audit.Record) error {
		if strings.HasPrefix(r.ID, prefix) && !r.End.IsZero() && r.Ended != lostWorkload {
			out[r.ID] = true
		}
		return nil
	})
	return out, err
}

// event checks an event, and says in it who reported it. The error begins with
// the field's name.
func event(e *sdkv1.Event, w *mesh.Workload, session []byte, now time.Time) (audit.Event, error) {
	for _, f := range []struct {
		name, text string
		most       int
	}{
		{"reason", e.GetReason(), maxText}, {"policy", e.GetPolicy(), maxName}, {"revision", e.GetRevision(), 64}, {"ended", e.GetEnded(), 64},
		{"tls_version", e.GetTlsVersion(), 64}, {"tls_cipher", e.GetTlsCipher(), 64}, {"tls_group", e.GetTlsGroup(), 64},
		{"serial", e.GetSerial(), 40}, {"peer_serial", e.GetPeerSerial(), 40},
		{"address", e.GetAddress(), maxAddress}, {"peer_address", e.GetPeerAddress(), maxAddress}, // a zone can be any text
	} {
		if len(f.text) > f.most {
			return audit.Event{}, fmt.Errorf("%s: %d bytes; at most %d are taken", f.name, len(f.text), f.most)
		}
		if strings.ContainsFunc(f.text, func(r rune) bool { return !unicode.IsPrint(r) }) {
			return audit.Event{}, fmt.Errorf("%s: has characters that cannot be printed", f.name)
		}
		if strings.HasSuffix(f.name, "serial") && strings.Trim(f.text, "0123456789abcdef") != "" {
			return audit.Event{}, fmt.Errorf("%s: %q is not hexadecimal", f.name, f.text)
		}
	}
	if e.GetPeer() != "" {
		if _, err := spiffeid.FromString(e.GetPeer()); err != nil {
			return audit.Event{}, fmt.Errorf("peer: %w", err)
		}
	}
	for _, f := range [][2]string{{"address", e.GetAddress()}, {"peer_address", e.GetPeerAddress()}} {
		if _, err := netip.ParseAddrPort(f[1]); err != nil && f[1] != "" {
			return audit.Event{}, fmt.Errorf("%s: %.64q is not ip:port", f[0], f[1])
		}
	}
	if e.GetConnection() == 0 {
		return audit.Event{}, fmt.Errorf("connection: 0 is no connection's number; they begin with 1")
	}
	start, end := time.Unix(0, e.GetStart()).UTC(), time.Time{}
	if e.GetStart() <= 0 || start.After(now.Add(tolerance)) {
		return audit.Event{}, fmt.Errorf("start: %s is not in the past", start)
	}
	if e.GetFinal() {
		end = time.Unix(0, e.GetEnd()).UTC()
		if end.Before(start) || end.After(now.Add(tolerance)) {
			return audit.Event{}, fmt.Errorf("end: %s is not between the start and now", end)
		}
	}
	verdict := audit.Verdict(e.GetVerdict())
	switch verdict {
	case audit.Allowed, audit.Denied, audit.Observed, audit.Failed:
	default:
		return audit.Event{}, fmt.Errorf("verdict: %.64q is none of allowed, denied, observed, failed", e.GetVerdict())
	}
	r := audit.Record{
		ID: fmt.Sprintf("%s%d", recordPrefix(w.Key(), session), e.GetConnection()), Proxy: reporter, Start: start, End: end,
		Verdict: verdict, Reason: e.GetReason(), Policy: e.GetPolicy(), Revision: e.GetRevision(), Transport: "mtls", Ended: e.GetEnded(),
	}
	own := audit.Party{ID: w.ID.String(), Workload: w.Key(), Address: e.GetAddress(), Serial: e.GetSerial()}
	peer := audit.Party{ID: e.GetPeer(), Address: e.GetPeerAddress(), Serial: e.GetPeerSerial()}
	if r.Side, r.Source, r.Destination = audit.Source, own, peer; e.GetAccepted() {
		r.Side, r.Source, r.Destination = audit.Destination, peer, own
	}
	if verdict == audit.Allowed || verdict == audit.Observed {
		r.BytesSent, r.BytesReceived = e.GetSent(), e.GetReceived()
	}
	if e.GetTlsVersion() != "" {
		r.TLS = &audit.TLS{Version: e.GetTlsVersion(), Cipher: e.GetTlsCipher(), Group: e.GetTlsGroup()}
	}
	return audit.Event{Record: r, Final: e.GetFinal()}, nil
}

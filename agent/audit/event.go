package audit

import (
	"errors"
	"fmt"
	"time"
)

// ErrInvalidEvent is wrapped by every error that says an event cannot be
// stored as it is: trying it again cannot help.
var ErrInvalidEvent = errors.New("invalid audit event")

// Event is news about the connection that Record.ID and Record.Side name.
//
// The first event about a connection gives it its Seq. One that is not final
// opens the connection, or changes fields of an open one. A final event ends
// it; a refused connection, a refusal and an issuance have only that one. Fields
// that an event sets win; those it leaves empty are kept. The store sets Seq and
// Node itself.
type Event struct {
	Record Record
	Final  bool
}

func (e Event) check() error {
	r := &e.Record
	if r.ID == "" {
		return fmt.Errorf("%w: id is empty; each connection needs one", ErrInvalidEvent)
	}
	if len(r.ID) > 1024 {
		return fmt.Errorf("%w: id has %d bytes; use at most 1024", ErrInvalidEvent, len(r.ID))
	}
	if refused := r.Verdict == Refused; refused != (r.Refusal != nil) || refused && (r.Side != "" || !e.Final) {
		return fmt.Errorf("%w: a refusal has the verdict %q, no side, and is final", ErrInvalidEvent, Refused)
	}
	if issued := r.Verdict == Issued; issued != (r.Issuance != nil) || issued && (r.Side != "" || !e.Final) {
		return fmt.Errorf("%w: an issuance has the verdict %q, no side, and is final", ErrInvalidEvent, Issued)
	}
	if r.Side != Source && r.Side != Destination && r.Refusal == nil && r.Issuance == nil {
		return fmt.Errorf("%w: side is %q; use %q or %q", ErrInvalidEvent, r.Side, Source, Destination)
	}
	if !marshals(r.Start) || !marshals(r.End) {
		return fmt.Errorf("%w: start or end is outside the years 0 to 9999", ErrInvalidEvent)
	}
	return nil
}

// marshals reports whether JSON can hold t.
func marshals(t time.Time) bool { y := t.UTC().Year(); return y >= 0 && y <= 9999 }

// connKey names a connection in the index of open ones.
func connKey(r *Record) []byte { return []byte(string(r.Side) + "\x00" + r.ID) }

// merge returns old with every field that news sets.
func merge(old, news Record) Record {
	out := old
	set(&out.Start, news.Start)
	set(&out.End, news.End)
	set(&out.Proxy, news.Proxy)
	mergeParty(&out.Source, news.Source)
	mergeParty(&out.Destination, news.Destination)
	set(&out.Verdict, news.Verdict)
	set(&out.Reason, news.Reason)
	set(&out.Policy, news.Policy)
	set(&out.Revision, news.Revision)
	set(&out.Transport, news.Transport)
	if news.TLS != nil {
		out.TLS = news.TLS
	}
	set(&out.BytesSent, news.BytesSent)
	set(&out.BytesReceived, news.BytesReceived)
	set(&out.Ended, news.Ended)
	return out
}

func mergeParty(p *Party, news Party) {
	set(&p.ID, news.ID)
	set(&p.Workload, news.Workload)
	set(&p.Address, news.Address)
	set(&p.Serial, news.Serial)
	set(&p.Via, news.Via)
}

// set copies v to field unless it is the zero value.
func set[T comparable](field *T, v T) {
	var zero T
	if v != zero {
		*field = v
	}
}

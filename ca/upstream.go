package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"time"
)

// Upstream is an authority above, which certifies intermediates for keys that are
// made here. It is safe for concurrent use.
type Upstream interface {
	// Ask hands a request in, or looks what has become of it: a request is known by
	// its key, also after a restart, and to other replicas. It does not wait for a
	// decision; an error is best an *UpstreamError.
	Ask(ctx context.Context, req UpstreamRequest) (*UpstreamAnswer, error)
	// String names it, such as "Issuer signet-system/mesh".
	String() string
}

// UpstreamRequest asks for an intermediate.
type UpstreamRequest struct {
	CSR []byte        // PKCS#10 in DER
	TTL time.Duration // the lifetime that is wanted; the answer's may differ
}

// UpstreamAnswer is what an authority above has certified. Nothing of it is believed
// before it is checked.
type UpstreamAnswer struct {
	// Chain begins with the intermediate. What else there is stands above it.
	Chain []*x509.Certificate
	// Roots are what the chain may end at.
	Roots []*x509.Certificate
}

// UpstreamReason says in a word how it stands with an authority above.
type UpstreamReason string

// The reasons.
const (
	UpstreamReady          UpstreamReason = "Ready"          // nothing is asked for
	UpstreamPending        UpstreamReason = "Pending"        // not decided yet
	UpstreamDenied         UpstreamReason = "Denied"         // decided: no
	UpstreamFailed         UpstreamReason = "Failed"         // decided: it cannot be done
	UpstreamIssuerNotFound UpstreamReason = "IssuerNotFound" // not decided: who should is not there
	UpstreamUnreachable    UpstreamReason = "Unreachable"    // not asked
	UpstreamUnusable       UpstreamReason = "Unusable"       // certified, and of no use
)

// final reports whether asking for the same again would have the same answer.
func (r UpstreamReason) final() bool {
	return r == UpstreamDenied || r == UpstreamFailed || r == UpstreamUnusable
}

// UpstreamError is why there is no answer, or none yet.
type UpstreamError struct {
	Reason  UpstreamReason
	Message string // names what was asked, and what to do
}

// Error is the message.
func (e *UpstreamError) Error() string { return e.Message }

// Final reports whether it was decided: asking again at once has the same answer.
func (e *UpstreamError) Final() bool { return e.Reason.final() }

// asUpstreamError takes an error that does not say for one of the way there.
func asUpstreamError(err error) *UpstreamError {
	var e *UpstreamError
	if errors.As(err, &e) {
		return e
	}
	return &UpstreamError{Reason: UpstreamUnreachable, Message: err.Error()}
}

// UpstreamStatus is how it stands with an authority above.
type UpstreamStatus struct {
	Upstream string // its name
	Reason   UpstreamReason
	Message  string // for people; names the authority and what to do
	// Wanted says why another intermediate is asked for; empty: none is.
	Wanted string
	// NotAfter is when the intermediate ends that signs; zero: none does. RenewAt is
	// when the next is asked for by itself.
	NotAfter, RenewAt time.Time
	// RetryAt is when it is asked again after it said no; zero: it did not.
	RetryAt time.Time
	// Leaves says why workloads' certificates do not come, where each comes from the
	// authority above; zero: they do.
	Leaves UpstreamError
}

// Said is the reason and the message of what an operator should know first.
func (s *UpstreamStatus) Said() (UpstreamReason, string) {
	if s.Leaves.Reason == "" {
		return s.Reason, s.Message
	}
	message := "workloads' certificates do not come: " + s.Leaves.Message + "; those that are there go on until they expire"
	if s.Reason != UpstreamReady {
		message += "; of the intermediate: " + s.Message
	}
	return s.Leaves.Reason, message
}

// Signs reports whether there is an intermediate to sign with.
func (s *UpstreamStatus) Signs(now time.Time) bool { return now.Before(s.NotAfter) }

package ca

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	eventRevoked = "revoked"
	// MaxRevoked bounds the certificates that are revoked at a time: every proxy
	// compares every new connection with all of them.
	MaxRevoked = 256
	// maxReason bounds the reason of one, in bytes.
	maxReason = 256
	// revokeSkew is for how long after its end a certificate may still be taken
	// by somebody whose clock is behind.
	revokeSkew = time.Minute
)

// RevokeGrace is how long the holder of a revoked certificate has to renew it
// before it is refused.
const RevokeGrace = 2 * time.Second

// Why a certificate cannot be revoked.
var (
	ErrNotIssued   = errors.New("ca: this authority has issued no certificate with that serial number")
	ErrNotRevoked  = errors.New("ca: not revoked")
	ErrRevokedFull = fmt.Errorf("ca: %d certificates are revoked and have not expired, which is the most; replace the root (`signet ca distrust`), or wait until the first has expired", MaxRevoked)
)

// Revoked is a certificate, or a token, that nobody is to take any more.
type Revoked struct {
	Serial   string // or jti; lower-case hexadecimal, two digits for each byte, as proxies write it
	ID       string
	Reason   string
	At       time.Time // zero: long ago
	NotAfter time.Time // of the certificate; zero: it is not known
}

// Refused reports whether its holder's time to renew is over.
func (r *Revoked) Refused(now time.Time) bool { return !now.Before(r.At.Add(RevokeGrace)) }

func (r *Revoked) over(now time.Time) bool {
	return !r.NotAfter.IsZero() && now.After(r.NotAfter.Add(revokeSkew))
}

// revocations are those in force: the authority's own, which the issuance log
// keeps, and those that are declared elsewhere.
type revocations struct {
	adding   sync.Mutex // held while one is added; taken before mu
	mu       sync.Mutex
	own      []Revoked     // guarded by mu; oldest first, also some that are over
	declared []Revoked     // guarded by mu; replaced whole; also some that are over
	changed  chan struct{} // guarded by mu; closed and replaced when one was added; nil: nobody waits
}

// current returns those that are not over, forgets the others, and says when that
// or which of them are refused changes by itself; zero: never. mu is held.
func (r *revocations) current(now time.Time) (list []Revoked, next time.Time) {
	r.own = inForce(r.own, now)
	list = slices.Clone(r.own)
	for _, one := range inForce(r.declared, now) {
		if !slices.ContainsFunc(list, func(had Revoked) bool { return had.Serial == one.Serial }) {
			list = append(list, one)
		}
	}
	slices.SortStableFunc(list, func(a, b Revoked) int { return a.At.Compare(b.At) })
	for _, one := range list {
		var at time.Time
		switch {
		case !one.Refused(now):
			at = one.At.Add(RevokeGrace)
		case !one.NotAfter.IsZero():
			at = one.NotAfter.Add(revokeSkew + 1)
		default:
			continue
		}
		if next.IsZero() || at.Before(next) {
			next = at
		}
	}
	return list, next
}

func inForce(all []Revoked, now time.Time) (list []Revoked) {
	for _, one := range all {
		if !one.over(now) {
			list = append(list, one)
		}
	}
	return list
}

// notify wakes who waits for a change. mu is held.
func (r *revocations) notify() {
	if r.changed != nil {
		close(r.changed)
		r.changed = nil
	}
}

// DeclareRevoked replaces the list of what is revoked elsewhere, where all
// replicas of the control plane read it. What this authority has revoked itself
// stays revoked.
func (a *Authority) DeclareRevoked(list []Revoked) {
	r := &a.revoked
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, one := range list {
		if !slices.ContainsFunc(r.declared, func(had Revoked) bool { return had.Serial == one.Serial }) {
			a.log.Warn("revocation declared", "serial", one.Serial, "id", one.ID, "reason", one.Reason, "not_after", one.NotAfter)
		}
	}
	if slices.Equal(r.declared, list) {
		return
	}
	r.declared = slices.Clone(list)
	r.notify()
}

// Revoked lists what is revoked and has not expired, oldest first. The channel is closed when one is added; next is when the list, or which
// of it are refused, changes by itself; zero: never.
func (a *Authority) Revoked() (list []Revoked, changed <-chan struct{}, next time.Time) {
	r := &a.revoked
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.changed == nil {
		r.changed = make(chan struct{})
	}
	list, next = r.current(a.now())
	return list, r.changed, next
}

// IsRevoked reports whether a certificate of this authority is revoked, by its
// serial number in bytes.
func (a *Authority) IsRevoked(serial []byte) bool {
	r, text, now := &a.revoked, fmt.Sprintf("%x", serial), a.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	is := func(one Revoked) bool { return one.Serial == text && !one.over(now) }
	return slices.ContainsFunc(r.own, is) || slices.ContainsFunc(r.declared, is)
}

// Revoke revokes a certificate, or a token, that this authority has issued, until
// it has expired. It returns when that is durable. One that is revoked already stays as
// it is.
func (a *Authority) Revoke(serial, reason string) (Revoked, error) {
	if normalSerial(serial) == "" || strings.Trim(normalSerial(serial), "0123456789abcdef") != "" {
		return Revoked{}, fmt.Errorf("ca: serial: %.64q is no serial number; give hexadecimal digits, as `signet certs -o wide` and `signet audit -o json` show them", serial)
	}
	if err := checkReason(reason); err != nil {
		return Revoked{}, err
	}
	a.revoked.adding.Lock()
	defer a.revoked.adding.Unlock()
	e, found, err := a.issuance.Find(serial)
	now := a.now().UTC()
	switch {
	case !found && err != nil:
		return Revoked{}, err
	case !found:
		return Revoked{}, fmt.Errorf("%w: %.64q", ErrNotIssued, serial)
	}
	one := Revoked{Serial: e.Serial, ID: e.ID, Reason: reason, At: now, NotAfter: e.NotAfter}
	if one.over(now) {
		return Revoked{}, fmt.Errorf("%w: %s of %s has expired at %s, nobody takes it any more", ErrNotRevoked, e.Serial, e.ID, e.NotAfter.Format(time.RFC3339))
	}
	all, err := a.revoke([]Revoked{one})
	if err != nil {
		return Revoked{}, err
	}
	return all[0], nil
}

// RevokeIdentity revokes every certificate that this authority has issued to an
// identity and that has not expired. It returns when that is durable; when it
// fails, some may be revoked, and it may be tried again.
func (a *Authority) RevokeIdentity(id spiffeid.ID, reason string) ([]Revoked, error) {
	if err := checkReason(reason); err != nil {
		return nil, err
	}
	a.revoked.adding.Lock()
	defer a.revoked.adding.Unlock()
	now := a.now().UTC()
	entries, _, err := a.issuance.Of(id, now)
	switch {
	case err != nil:
		return nil, fmt.Errorf("ca: not every certificate of %s may be known: %w", id, err)
	case len(entries) == 0:
		return nil, fmt.Errorf("%w: none of %s that has not expired", ErrNotIssued, id)
	}
	var wanted []Revoked
	for _, e := range entries {
		wanted = append(wanted, Revoked{Serial: e.Serial, ID: e.ID, Reason: reason, At: now, NotAfter: e.NotAfter})
	}
	return a.revoke(wanted)
}

func checkReason(reason string) error {
	switch {
	case strings.TrimSpace(reason) == "":
		return errors.New("ca: reason: is missing; say why, for who looks at the list")
	case len(reason) > maxReason || strings.ContainsFunc(reason, func(c rune) bool { return c < ' ' || c == 0x7f }):
		return fmt.Errorf("ca: reason: at most %d bytes, without control characters", maxReason)
	}
	return nil
}

// revoke puts revocations in force and returns them; those that were in force
// already, as they were. revoked.adding is held.
func (a *Authority) revoke(wanted []Revoked) ([]Revoked, error) {
	r := &a.revoked
	r.mu.Lock()
	list, _ := r.current(a.now())
	own := r.own // never edited, only replaced
	r.mu.Unlock()
	var news []Revoked
	for i, w := range wanted {
		if at := slices.IndexFunc(list, func(had Revoked) bool { return had.Serial == w.Serial }); at >= 0 {
			wanted[i] = list[at]
		} else {
			news = append(news, w)
		}
	}
	if len(news) == 0 {
		return wanted, nil
	}
	if len(list)+len(news) > MaxRevoked {
		return nil, ErrRevokedFull
	}
	var last uint64
	var err error
	for _, w := range news {
		if last, err = a.issuance.append(line{Event: eventRevoked, Time: w.At, Serial: w.Serial, ID: w.ID, NotAfter: w.NotAfter, Reason: w.Reason}); err != nil {
			return nil, err
		}
	}
	if err := a.issuance.sync(last); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.own = slices.Concat(own, news)
	r.notify()
	for _, w := range news {
		a.log.Warn("certificate revoked", "serial", w.Serial, "id", w.ID, "reason", w.Reason, "not_after", w.NotAfter)
	}
	return wanted, nil
}

// openRevoked takes up what is revoked from the issuance log.
func (a *Authority) openRevoked() error {
	f, err := os.Open(a.issuance.path)
	if err != nil {
		return err
	}
	defer f.Close()
	now := a.now()
	for r := bufio.NewReader(f); ; {
		data, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if !isEvent(data, eventRevoked) {
			continue
		}
		var e line
		if err := json.Unmarshal(data, &e); err != nil {
			return fmt.Errorf("%w: a revocation cannot be read: %w", ErrDamaged, err)
		}
		one := Revoked{Serial: e.Serial, ID: e.ID, Reason: e.Reason, At: e.Time, NotAfter: e.NotAfter}
		if !one.over(now) {
			a.revoked.own = append(a.revoked.own, one) // nobody else has it yet
		}
	}
}

package ca

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/wholefile"
)

// Outcome is what became of an intent to issue.
type Outcome string

// The outcomes.
const (
	OutcomeIssued Outcome = "issued" // signed and handed to the caller
	OutcomeFailed Outcome = "failed" // not handed out; Entry.Error says why
	// OutcomeUnknown means that the process ended, or is still busy, between
	// intent and outcome: the certificate may exist.
	OutcomeUnknown Outcome = "unknown"
)

// KindJWT is the kind of a JWT-SVID; a certificate's is empty.
const KindJWT = "jwt"

// KindRequest is the kind of a request to the authority above for which no certificate
// has come. Its serial is the request's own number; a certificate takes its place.
const KindRequest = "request"

// Entry is one issuance.
type Entry struct {
	Time     time.Time `json:"time"`           // of the intent
	Kind     string    `json:"kind,omitempty"` // empty, KindJWT or KindRequest
	Serial   string    `json:"serial"`         // lower-case hexadecimal; a token's jti
	ID       string    `json:"id"`
	Node     string    `json:"node,omitempty"`     // on whose behalf
	Workload string    `json:"workload,omitempty"` // namespace/name

	NotBefore time.Time `json:"notBefore"`
	NotAfter  time.Time `json:"notAfter"`
	// Issuer is the subject key id of the signing certificate, hexadecimal, or
	// the kid of a token.
	Issuer string `json:"issuer"`
	// KeySHA256 is the digest of the certified public key (SPKI), hexadecimal.
	KeySHA256 string `json:"keySHA256,omitempty"`
	// Audience is who a token is for.
	Audience []string `json:"audience,omitempty"`

	Outcome Outcome `json:"outcome"`
	// CertSHA256 is the digest of the certificate, hexadecimal, once issued.
	CertSHA256 string `json:"certSHA256,omitempty"`
	Error      string `json:"error,omitempty"`

	// Revoked is when the certificate was revoked, zero: it was not, and
	// Reason why.
	Revoked time.Time `json:"revoked,omitzero"`
	Reason  string    `json:"reason,omitempty"`
}

// line is one line of the file. An intent has all but the last three fields, an
// outcome has time, serial and, of a certificate or a failure, one of the first
// two of those. A revocation has time, serial, id, notAfter and the reason.
// A refusal has what Refused has.
type line struct {
	Event      string    `json:"event"` // intent, issued, failed, revoked, refused; first, see isEvent
	Time       time.Time `json:"time"`
	Kind       string    `json:"kind,omitempty"`
	Serial     string    `json:"serial,omitempty"`
	ID         string    `json:"id,omitempty"`
	Node       string    `json:"node,omitempty"`
	Workload   string    `json:"workload,omitempty"`
	NotBefore  time.Time `json:"notBefore,omitzero"`
	NotAfter   time.Time `json:"notAfter,omitzero"`
	Issuer     string    `json:"issuer,omitempty"`
	KeySHA256  string    `json:"keySHA256,omitempty"`
	Audience   []string  `json:"audience,omitempty"`
	Was        string    `json:"was,omitempty"` // the serial of the request that this takes the place of
	CertSHA256 string    `json:"certSHA256,omitempty"`
	Error      string    `json:"error,omitempty"`
	Reason     string    `json:"reason,omitempty"`
	Last       time.Time `json:"last,omitzero"`
	Count      uint64    `json:"count,omitempty"`
	Several    bool      `json:"several,omitempty"`
	Call       string    `json:"call,omitempty"`
	From       string    `json:"from,omitempty"`
	Why        string    `json:"why,omitempty"`
}

// isEvent says whether a line is of a kind, without reading it.
func isEvent(data []byte, event string) bool {
	return bytes.HasPrefix(data, []byte(`{"event":"`+event+`"`))
}

// ErrDamaged is returned, with all that could be read, when the issuance log
// holds lines that are not its own.
var ErrDamaged = errors.New("ca: the issuance log is damaged")

// Log is the issuance log, which also has what was refused: JSON lines in a file that only grows. It is safe
// for concurrent use.
type Log struct {
	path string

	mu      sync.Mutex
	f       *os.File // guarded by mu; nil when closed or opened for reading
	written uint64   // guarded by mu; lines handed to the kernel
	err     error    // guarded by mu; once a write or sync failed, for good

	syncMu sync.Mutex // held while syncing; taken before mu
	synced uint64     // guarded by syncMu; lines known to be durable
}

// ReadLog opens the issuance log in an authority's directory for reading
// only, also while the authority runs.
func ReadLog(dir string) *Log { return &Log{path: filepath.Join(dir, logFile)} }

// openLog opens the log for writing. A last line that a crash tore is cut
// off: its intent was not durable, so nothing was signed for it.
func openLog(path string, log *slog.Logger) (*Log, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	if err := cutTornLine(f, log); err != nil {
		f.Close()
		return nil, err
	}
	if err := wholefile.SyncDir(filepath.Dir(path)); err != nil {
		f.Close()
		return nil, err
	}
	return &Log{path: path, f: f}, nil
}

func cutTornLine(f *os.File, log *slog.Logger) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	end := info.Size()
	buf := make([]byte, 4096)
	for end > 0 {
		n := min(int64(len(buf)), end)
		if _, err := f.ReadAt(buf[:n], end-n); err != nil {
			return err
		}
		if i := bytes.LastIndexByte(buf[:n], '\n'); i >= 0 {
			end = end - n + int64(i) + 1
			break
		}
		end -= n
	}
	if end == info.Size() {
		return nil
	}
	log.Warn("cut a torn last line off the issuance log", "path", f.Name(), "bytes", info.Size()-end)
	if err := f.Truncate(end); err != nil {
		return err
	}
	return f.Sync()
}

// intent appends intents and returns when all of them are durable.
func (l *Log) intent(list ...line) error {
	for i := range list {
		list[i].Event = "intent"
	}
	n, err := l.append(list...)
	if err != nil {
		return err
	}
	return l.sync(n)
}

// outcome appends outcomes. They become durable with the next intent; a crash
// before that leaves them unknown, never wrong.
func (l *Log) outcome(list ...line) error {
	for i := range list {
		list[i].Event = string(OutcomeIssued)
		if list[i].Error != "" {
			list[i].Event = string(OutcomeFailed)
		}
	}
	_, err := l.append(list...)
	return err
}

// append writes lines, all at once.
func (l *Log) append(list ...line) (uint64, error) {
	var data []byte
	for i := range list {
		one, err := json.Marshal(&list[i])
		if err != nil {
			return 0, err
		}
		data = append(append(data, one...), '\n')
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.err != nil:
		return 0, l.err
	case l.f == nil:
		return 0, errClosed
	}
	if _, err := l.f.Write(data); err != nil {
		l.err = fmt.Errorf("issuance log can no longer be written, restart the control plane: %w", err)
		return 0, l.err
	}
	l.written += uint64(len(list))
	return l.written, nil
}

// sync returns when line n is durable. Callers that come while one syncs
// share the next sync.
func (l *Log) sync(n uint64) error {
	l.syncMu.Lock()
	defer l.syncMu.Unlock()
	if l.synced >= n {
		return nil
	}
	l.mu.Lock()
	f, upTo, err := l.f, l.written, l.err
	l.mu.Unlock()
	if err != nil {
		return err
	}
	if f == nil {
		return errClosed
	}
	if err := f.Sync(); err != nil {
		// What the kernel dropped is not known, so nothing more is signed.
		l.mu.Lock()
		l.err = fmt.Errorf("issuance log can no longer be synced, restart the control plane: %w", err)
		l.mu.Unlock()
		return err
	}
	l.synced = upTo
	return nil
}

func (l *Log) close() error {
	l.syncMu.Lock()
	defer l.syncMu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return nil
	}
	err := errors.Join(l.f.Sync(), l.f.Close())
	l.f = nil
	return err
}

// Entries returns the issuances whose intent is not before since, oldest
// first. It reads the whole file. With ErrDamaged it returns what it could
// read.
func (l *Log) Entries(since time.Time) ([]Entry, error) {
	return l.read(func(e *line) bool { return !e.Time.Before(since) })
}

// Find returns the issuance with a serial number, and false when there is
// none. The number is hexadecimal in either case, with or without colons and
// leading zeros, as tools write it.
func (l *Log) Find(serial string) (Entry, bool, error) {
	want := normalSerial(serial)
	entries, err := l.read(func(e *line) bool { return normalSerial(e.Serial) == want })
	if len(entries) == 0 {
		return Entry{}, false, err
	}
	return entries[0], true, err
}

// Of returns the issuances to an identity of what has not expired, oldest first,
// but for tokens, and since when all are known: from when the log begins.
func (l *Log) Of(id spiffeid.ID, now time.Time) (out []Entry, since time.Time, err error) {
	since = now
	first := true
	out, err = l.read(func(e *line) bool {
		if first {
			since, first = e.Time, false
		}
		return e.ID == id.String() && e.Kind == "" && !(&Revoked{NotAfter: e.NotAfter}).over(now)
	})
	return out, since, err
}

func normalSerial(s string) string {
	return strings.TrimLeft(strings.ToLower(strings.ReplaceAll(s, ":", "")), "0")
}

func (l *Log) read(want func(*line) bool) ([]Entry, error) {
	f, err := os.Open(l.path)
	if err != nil {
		return nil, fmt.Errorf("ca: open the issuance log: %w", err)
	}
	defer f.Close()
	var (
		out     []Entry
		index   = make(map[string]int) // serial -> position in out
		damaged []error
		r       = bufio.NewReader(f)
	)
	for n := 1; ; n++ {
		data, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) { // what has no newline is torn or being written
			return out, errors.Join(damaged...)
		}
		if err != nil {
			return out, fmt.Errorf("ca: read the issuance log: %w", err)
		}
		var e line
		if err := json.Unmarshal(data, &e); err != nil {
			damaged = append(damaged, fmt.Errorf("%w: %s:%d: %w", ErrDamaged, l.path, n, err))
			continue
		}
		switch e.Event {
		case "intent":
			request, asked := index[e.Was]
			delete(index, e.Was)
			if i, again := index[e.Serial]; again { // what was decided is asked for again
				out[i].Outcome, out[i].Error = OutcomeUnknown, ""
				continue
			}
			if !asked && !want(&e) {
				continue
			}
			if !asked {
				request, out = len(out), append(out, Entry{})
			}
			index[e.Serial] = request
			out[request] = Entry{
				Time: e.Time, Kind: e.Kind, Serial: e.Serial, ID: e.ID, Node: e.Node, Workload: e.Workload,
				NotBefore: e.NotBefore, NotAfter: e.NotAfter, Issuer: e.Issuer, KeySHA256: e.KeySHA256, Audience: e.Audience,
				Outcome: OutcomeUnknown,
			}
		case string(OutcomeIssued), string(OutcomeFailed):
			if i, ok := index[e.Serial]; ok {
				out[i].Outcome, out[i].CertSHA256, out[i].Error = Outcome(e.Event), e.CertSHA256, e.Error
			}
		case eventRevoked:
			if i, ok := index[e.Serial]; ok {
				out[i].Revoked, out[i].Reason = e.Time, e.Reason
			}
		case eventRefused: // of nothing that was issued
		default:
			damaged = append(damaged, fmt.Errorf("%w: %s:%d: event %q", ErrDamaged, l.path, n, e.Event))
		}
	}
}

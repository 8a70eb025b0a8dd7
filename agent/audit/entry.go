package audit

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// Gap states that records are missing, and why. It is an entry of the log
// like any other, so it is chained and cannot be removed unseen.
type Gap struct {
	// At is when the store learned of the gap.
	At time.Time `json:"at"`
	// Side is the side whose records are missing; empty when unknown.
	Side Side `json:"side,omitempty"`
	// Count is how many records are known to be missing. 0 means at least
	// one, number unknown.
	Count uint64 `json:"count"`
	// Reason is one line for a person.
	Reason string `json:"reason"`
}

// counted is what the gap adds to the total of missing records.
func (g Gap) counted() uint64 { return max(g.Count, 1) }

// A kind is the first byte of an entry.
type kind byte

const (
	kindOpen   kind = 'o' // a connection opened
	kindUpdate kind = 'u' // an open connection's fields changed
	kindEnd    kind = 'e' // a connection ended, or was refused; a refusal or an issuance
	kindCarry  kind = 'c' // still open when this segment file began
	kindGap    kind = 'g' // records are missing
	kindRetire kind = 'r' // an old segment file was deleted by retention
)

// retirement is the body of a kindRetire entry.
type retirement struct {
	Segment uint64 `json:"segment"`
	// Hash is the hash of the segment's last batch.
	Hash hash `json:"hash"`
}

// A hash is a SHA-256 sum; hexadecimal in JSON.
type hash [sha256.Size]byte

func (h hash) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h[:])), nil }

func (h *hash) UnmarshalText(b []byte) error {
	if hex.DecodedLen(len(b)) != len(h) {
		return fmt.Errorf("a hash has %d hexadecimal digits, not %d", 2*len(h), len(b))
	}
	_, err := hex.Decode(h[:], b)
	return err
}

// encodeEntry is the stored, and hashed, form of an entry: its kind and then
// its body as JSON.
func encodeEntry(k kind, body any) ([]byte, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("encode audit entry: %w", err)
	}
	out := make([]byte, 0, len(b)+1)
	return append(append(out, byte(k)), b...), nil
}

// entryKind returns the kind of a stored entry and its body.
func entryKind(v []byte) (kind, []byte, error) {
	if len(v) < 2 {
		return 0, nil, fmt.Errorf("entry of %d bytes", len(v))
	}
	switch k := kind(v[0]); k {
	case kindOpen, kindUpdate, kindEnd, kindCarry, kindGap, kindRetire:
		return k, v[1:], nil
	}
	return 0, nil, fmt.Errorf("entry of unknown kind %q", v[0])
}

// decodeRecord reads an entry that describes a connection.
func decodeRecord(v []byte) (kind, Record, error) {
	k, body, err := entryKind(v)
	if err != nil {
		return 0, Record{}, err
	}
	if k == kindGap || k == kindRetire {
		return 0, Record{}, fmt.Errorf("entry of kind %q where a connection was expected", byte(k))
	}
	var r Record
	if err := json.Unmarshal(body, &r); err != nil {
		return 0, Record{}, fmt.Errorf("decode audit entry: %w", err)
	}
	return k, r, nil
}

// batchDigest computes the hash of a batch: over the hash before it, its
// number, its time, and each entry framed by its length, so that no two
// different batches feed it the same bytes.
type batchDigest struct {
	buf   []byte
	first uint64
	count uint64
}

func newBatchDigest(prev hash, number, first uint64) *batchDigest {
	d := &batchDigest{first: first}
	d.buf = append(d.buf, prev[:]...)
	d.buf = binary.BigEndian.AppendUint64(d.buf, number)
	d.buf = binary.BigEndian.AppendUint64(d.buf, first)
	return d
}

func (d *batchDigest) add(entry []byte) {
	d.count++
	d.buf = binary.BigEndian.AppendUint64(d.buf, uint64(len(entry)))
	d.buf = append(d.buf, entry...)
}

// sum returns the batch's stored description, which ends in its hash.
func (d *batchDigest) sum(at time.Time) batch {
	d.buf = binary.BigEndian.AppendUint64(d.buf, d.count)
	d.buf = binary.BigEndian.AppendUint64(d.buf, uint64(at.UnixNano()))
	return batch{First: d.first, Count: d.count, At: at.UnixNano(), Hash: sha256.Sum256(d.buf)}
}

// batch describes the entries that one transaction added.
type batch struct {
	First uint64 // number of its first entry
	Count uint64
	At    int64 // nanoseconds since 1970
	Hash  hash
}

func (b batch) time() time.Time { return time.Unix(0, b.At) }

const batchSize = 8 + 8 + 8 + sha256.Size

func (b batch) encode() []byte {
	out := make([]byte, 0, batchSize)
	out = binary.BigEndian.AppendUint64(out, b.First)
	out = binary.BigEndian.AppendUint64(out, b.Count)
	out = binary.BigEndian.AppendUint64(out, uint64(b.At))
	return append(out, b.Hash[:]...)
}

func decodeBatch(v []byte) (batch, error) {
	if len(v) != batchSize {
		return batch{}, fmt.Errorf("batch of %d bytes, want %d", len(v), batchSize)
	}
	b := batch{
		First: binary.BigEndian.Uint64(v),
		Count: binary.BigEndian.Uint64(v[8:]),
		At:    int64(binary.BigEndian.Uint64(v[16:])),
	}
	copy(b.Hash[:], v[24:])
	return b, nil
}

// number is a big-endian key, so that keys sort as their numbers do.
func number(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

func parseNumber(k []byte) (uint64, error) {
	if len(k) != 8 {
		return 0, fmt.Errorf("key of %d bytes, want 8", len(k))
	}
	return binary.BigEndian.Uint64(k), nil
}

// decodeGap reads a gap entry.
func decodeGap(v []byte) (Gap, error) {
	k, body, err := entryKind(v)
	if err != nil {
		return Gap{}, err
	}
	if k != kindGap {
		return Gap{}, fmt.Errorf("entry of kind %q where a gap was expected", byte(k))
	}
	var g Gap
	if err := json.Unmarshal(body, &g); err != nil {
		return Gap{}, fmt.Errorf("decode gap entry: %w", err)
	}
	return g, nil
}

package adminclient

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
)

// AuditQuery chooses audit records; zero fields do not restrict.
type AuditQuery struct {
	Since time.Time // connections that were open at or after this
	// From and To name the ends: a SPIFFE ID, "namespace/service-account",
	// or "namespace/" for all of a namespace.
	From, To string
	Verdicts []audit.Verdict // any of these
	Side     audit.Side
	Limit    int // the newest so many
	// Serial chooses the connections that a certificate was shown in.
	Serial string
	// Node chooses the records of one node.
	Node string
}

func (q AuditQuery) values() url.Values {
	v := url.Values{}
	set := func(key, value string) {
		if value != "" {
			v.Set(key, value)
		}
	}
	if !q.Since.IsZero() {
		v.Set("since", q.Since.UTC().Format(time.RFC3339Nano))
	}
	var verdicts []string
	for _, verdict := range q.Verdicts {
		verdicts = append(verdicts, string(verdict))
	}
	set("from", q.From)
	set("to", q.To)
	set("verdict", strings.Join(verdicts, ","))
	set("side", string(q.Side))
	set("serial", q.Serial)
	if q.Limit > 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	return v
}

// Audit asks the agent for records. The sequence ends after its first error.
func (c *Client) Audit(ctx context.Context, q AuditQuery) iter.Seq2[audit.Record, error] {
	return c.agent.audit(ctx, "/v1/audit", q.values(), nil)
}

// MeshAudit asks for the records of every node, oldest first, and fills missing
// with the nodes whose records are not, or not all, among them, once the
// sequence has ended. The sequence ends after its first error.
func (c *Client) MeshAudit(ctx context.Context, q AuditQuery, missing *[]adminv1.MissingNode) iter.Seq2[audit.Record, error] {
	*missing = nil
	if c.cluster {
		v := q.values()
		if q.Node != "" {
			v.Set("node", q.Node)
		}
		return c.control.audit(ctx, "/v1/mesh/audit", v, missing)
	}
	return func(yield func(audit.Record, error) bool) {
		if err := c.isNode(ctx, q.Node); err != nil {
			yield(audit.Record{}, err)
			return
		}
		c.Audit(ctx, q)(yield)
	}
}

// audit reads a stream of records. With missing, it has to have an end.
func (e *endpoint) audit(ctx context.Context, path string, q url.Values, missing *[]adminv1.MissingNode) iter.Seq2[audit.Record, error] {
	return func(yield func(audit.Record, error) bool) {
		body, err := e.open(ctx, path, q)
		if err != nil {
			yield(audit.Record{}, err)
			return
		}
		defer func() { _ = body.Close() }()
		n := 0
		var end *adminv1.AuditEnd
		for r, err := range records(body, &end) {
			if err == nil {
				n++
			} else {
				err = fmt.Errorf("%s: audit records: %w", e.part, err)
			}
			if !yield(r, err) || err != nil {
				return
			}
		}
		switch {
		case missing == nil:
		case end == nil || end.Records != n:
			yield(audit.Record{}, fmt.Errorf("%s: audit records: the answer broke off after %d of them", e.part, n))
		default:
			*missing = end.Missing
		}
	}
}

// records reads newline-delimited records. A cut line is an error, and so is a
// line by which the answerer says that it cannot go on. A line that is the end
// is put into end.
func records(r io.Reader, end **adminv1.AuditEnd) iter.Seq2[audit.Record, error] {
	return func(yield func(audit.Record, error) bool) {
		in := newLineReader(r, maxRecord)
		for {
			line, err := in.next()
			if err == io.EOF {
				return
			}
			if err == nil && len(bytes.TrimSpace(line)) == 0 {
				continue
			}
			var rec struct {
				audit.Record
				Complete *adminv1.AuditEnd `json:"complete"`
				Error    string            `json:"error"`
			}
			if err == nil {
				err = json.Unmarshal(line, &rec)
			}
			if err == nil && rec.Error != "" {
				err = errors.New(rec.Error)
			}
			if err == nil && *end != nil {
				err = errors.New("there is more after the end")
			}
			if err == nil && rec.Complete != nil {
				*end = rec.Complete
				continue
			}
			if !yield(rec.Record, err) || err != nil {
				return
			}
		}
	}
}

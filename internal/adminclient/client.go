// Package adminclient asks a running mesh about itself, over the admin sockets
// in its run directory.
package adminclient

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
)

// The sockets in the run directory.
const (
	AgentSocket   = "admin.sock"
	ControlSocket = "control-admin.sock"
)

// maxBody bounds one answer, except a stream of records, and maxRecord one
// record of such a stream.
const (
	maxBody   = 64 << 20
	maxRecord = 1 << 20
)

// UnreachableError says that nothing answers on a socket, or that the caller
// may not ask.
type UnreachableError struct {
	Part   string // "agent" or "control plane"
	Socket string // path
	Err    error
}

func (e *UnreachableError) Error() string {
	return fmt.Sprintf("the %s does not answer on %s: %s", e.Part, e.Socket, e.why())
}

func (e *UnreachableError) why() string {
	switch {
	case errors.Is(e.Err, fs.ErrNotExist):
		return "there is no such socket, so no mesh runs with this run directory; start one with `signet up -c DIR`, or name its directory with --run-dir or SIGNET_RUN_DIR"
	case errors.Is(e.Err, fs.ErrPermission):
		return "permission denied; only root may ask, so run the command as root"
	case errors.Is(e.Err, syscall.ECONNREFUSED):
		return "the socket is there but nobody listens, so the process died; look at the log of `signet up`, or start it again"
	}
	return e.Err.Error()
}

// Unwrap returns the cause.
func (e *UnreachableError) Unwrap() error { return e.Err }

// AnswerError is an error that the mesh itself answered with.
type AnswerError struct {
	Part    string // "agent" or "control plane"
	Status  int    // HTTP status, 4xx or 5xx
	Message string
}

func (e *AnswerError) Error() string { return e.Part + ": " + e.Message }

// Client asks one mesh. It is safe for concurrent use.
type Client struct {
	agent, control endpoint
}

type endpoint struct {
	part   string
	socket string
	http   *http.Client
}

// New returns a client of the mesh whose sockets are in a directory. It does
// not connect yet. Close it after use.
func New(runDir string) *Client {
	return &Client{
		agent:   newEndpoint("agent", filepath.Join(runDir, AgentSocket)),
		control: newEndpoint("control plane", filepath.Join(runDir, ControlSocket)),
	}
}

func newEndpoint(part, socket string) endpoint {
	return endpoint{part: part, socket: socket, http: &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "unix", socket)
			},
			ResponseHeaderTimeout: 30 * time.Second,
		},
		// An admin socket has nowhere to send anybody.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Close gives up idle connections.
func (c *Client) Close() {
	c.agent.http.CloseIdleConnections()
	c.control.http.CloseIdleConnections()
}

// AgentStatus asks the agent for the node's state.
func (c *Client) AgentStatus(ctx context.Context) (s adminv1.AgentStatus, err error) {
	return s, c.agent.get(ctx, "/v1/status", nil, &s)
}

// Certificates asks the agent for the certificates it holds.
func (c *Client) Certificates(ctx context.Context) (certs []adminv1.Certificate, err error) {
	return certs, c.agent.get(ctx, "/v1/certificates", nil, &certs)
}

// ControlStatus asks the control plane for its state.
func (c *Client) ControlStatus(ctx context.Context) (s adminv1.ControlStatus, err error) {
	return s, c.control.get(ctx, "/v1/status", nil, &s)
}

// Explain asks the control plane whether from may reach to, both SPIFFE IDs,
// on a port of the target workload, and why.
func (c *Client) Explain(ctx context.Context, from, to string, port uint16) (e adminv1.Explanation, err error) {
	q := url.Values{"from": {from}, "to": {to}, "port": {strconv.Itoa(int(port))}}
	return e, c.control.get(ctx, "/v1/explain", q, &e)
}

// VerifyAudit asks the agent to read its whole audit store and check the chain.
func (c *Client) VerifyAudit(ctx context.Context) (v adminv1.AuditVerification, err error) {
	return v, c.agent.get(ctx, "/v1/audit/verify", nil, &v)
}

// AuditQuery chooses audit records; zero fields do not restrict.
type AuditQuery struct {
	Since time.Time // connections that were open at or after this
	// From and To name the ends: a SPIFFE ID, "namespace/service-account",
	// or "namespace/" for all of a namespace.
	From, To string
	Verdict  audit.Verdict
	Side     audit.Side
	Limit    int // the newest so many
}

// Audit asks the agent for records. The sequence ends after its first error.
func (c *Client) Audit(ctx context.Context, q AuditQuery) iter.Seq2[audit.Record, error] {
	v := url.Values{}
	set := func(key, value string) {
		if value != "" {
			v.Set(key, value)
		}
	}
	if !q.Since.IsZero() {
		v.Set("since", q.Since.UTC().Format(time.RFC3339Nano))
	}
	set("from", q.From)
	set("to", q.To)
	set("verdict", string(q.Verdict))
	set("side", string(q.Side))
	if q.Limit > 0 {
		v.Set("limit", strconv.Itoa(q.Limit))
	}
	return func(yield func(audit.Record, error) bool) {
		body, err := c.agent.open(ctx, "/v1/audit", v)
		if err != nil {
			yield(audit.Record{}, err)
			return
		}
		defer func() { _ = body.Close() }()
		for r, err := range records(body) {
			if err != nil {
				err = fmt.Errorf("%s: audit records: %w", c.agent.part, err)
			}
			if !yield(r, err) || err != nil {
				return
			}
		}
	}
}

// records reads newline-delimited records. A cut line is an error, and so is a
// line by which the agent says that it cannot go on.
func records(r io.Reader) iter.Seq2[audit.Record, error] {
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
				Error string `json:"error"`
			}
			if err == nil {
				err = json.Unmarshal(line, &rec)
			}
			if err == nil && rec.Error != "" {
				err = errors.New(rec.Error)
			}
			if !yield(rec.Record, err) || err != nil {
				return
			}
		}
	}
}

func (e *endpoint) get(ctx context.Context, path string, q url.Values, into any) error {
	body, err := e.open(ctx, path, q)
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }()
	b, err := io.ReadAll(io.LimitReader(body, maxBody+1))
	if err != nil {
		return fmt.Errorf("%s: read the answer of %s: %w", e.part, path, err)
	}
	if len(b) > maxBody {
		return fmt.Errorf("%s: the answer of %s is larger than %d bytes", e.part, path, maxBody)
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%s: the answer of %s is not what this version understands: %w", e.part, path, err)
	}
	return nil
}

// open returns the body of a good answer; the caller closes it.
func (e *endpoint) open(ctx context.Context, path string, q url.Values) (io.ReadCloser, error) {
	u := url.URL{Scheme: "http", Host: "signet", Path: path, RawQuery: q.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	res, err := e.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		var dial *net.OpError
		if errors.As(err, &dial) && dial.Op == "dial" {
			return nil, &UnreachableError{Part: e.part, Socket: e.socket, Err: dial}
		}
		return nil, &UnreachableError{Part: e.part, Socket: e.socket, Err: errors.Unwrap(err)}
	}
	if res.StatusCode == http.StatusOK {
		return res.Body, nil
	}
	defer func() { _ = res.Body.Close() }()
	b, _ := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	var answer struct {
		Error string `json:"error"`
	}
	if json.Unmarshal(b, &answer) != nil || answer.Error == "" {
		answer.Error = fmt.Sprintf("answered %s to %s", res.Status, path)
	}
	return nil, &AnswerError{Part: e.part, Status: res.StatusCode, Message: answer.Error}
}

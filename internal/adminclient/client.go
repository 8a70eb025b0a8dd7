// Package adminclient asks a running mesh about itself: over the admin sockets
// in its run directory, or over a connection to the control plane of a cluster,
// which asks its nodes.
package adminclient

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
)

// The sockets in the run directory.
const (
	AgentSocket   = "admin.sock"
	ControlSocket = "control-admin.sock"
)

// maxBody bounds one answer, except a stream of records, and maxRecord one
// line of such a stream.
const (
	maxBody   = 64 << 20
	maxRecord = 1 << 20
)

// UnreachableError says that nothing answers, or that the caller may not ask.
type UnreachableError struct {
	Part   string // "agent" or "control plane"
	Socket string // path of a socket, or whatever names the place
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
	// cluster asks the control plane about all nodes; else the mesh is the one
	// agent's node.
	cluster bool
}

type endpoint struct {
	part   string
	socket string
	host   string // of the URL
	http   *http.Client
}

// NewCluster returns a client of a cluster's control plane, which it reaches
// through rt; the place is what errors call it. Questions to one agent, such
// as AgentStatus, have no answer there. Close it after use.
func NewCluster(place string, rt http.RoundTripper) *Client {
	return &Client{control: overHTTP("control plane", place, "signet-control", rt), agent: overHTTP("agent", place, "signet-control", nowhere{}), cluster: true}
}

// NewAgent returns a client of one node's agent, which it reaches through rt
// under the host, a name that rt knows what to do with. Questions to the
// control plane have no answer there. Close it after use.
func NewAgent(node, host string, rt http.RoundTripper) *Client {
	return &Client{agent: overHTTP("agent", "node "+node, host, rt), control: overHTTP("control plane", "node "+node, host, nowhere{})}
}

// Cluster reports whether the client asks about the nodes of a cluster.
func (c *Client) Cluster() bool { return c.cluster }

// nowhere leads to the part that a client has no way to.
type nowhere struct{}

func (nowhere) RoundTrip(*http.Request) (*http.Response, error) {
	return nil, errors.New("it cannot be asked from here")
}

func overHTTP(part, place, host string, rt http.RoundTripper) endpoint {
	return endpoint{part: part, socket: place, host: host, http: &http.Client{Transport: rt, CheckRedirect: noRedirect}}
}

// noRedirect: an admin API has nowhere to send anybody.
func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// New returns a client of the mesh whose sockets are in a directory. It does
// not connect yet. Close it after use.
func New(runDir string) *Client {
	return &Client{
		agent:   newEndpoint("agent", filepath.Join(runDir, AgentSocket)),
		control: newEndpoint("control plane", filepath.Join(runDir, ControlSocket)),
	}
}

func newEndpoint(part, socket string) endpoint {
	return endpoint{part: part, socket: socket, host: "signet", http: &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "unix", socket)
			},
			ResponseHeaderTimeout: 30 * time.Second,
		},
		CheckRedirect: noRedirect,
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

// Authority asks the control plane for the state of the certificate authority.
func (c *Client) Authority(ctx context.Context) (s adminv1.AuthorityStatus, err error) {
	return s, c.control.get(ctx, "/v1/ca", nil, &s)
}

// TrustBundle asks for the bundle of a trust domain; empty: the mesh's own.
func (c *Client) TrustBundle(ctx context.Context, trustDomain string) (b adminv1.TrustBundle, err error) {
	return b, c.control.get(ctx, "/v1/ca/bundle", url.Values{"trust-domain": {trustDomain}}, &b)
}

// Issued looks a certificate's serial number, or a token's jti, up in the issuance
// log of the control plane.
func (c *Client) Issued(ctx context.Context, serial string) (i adminv1.Issuance, err error) {
	return i, c.control.get(ctx, "/v1/ca/issued", url.Values{"serial": {serial}}, &i)
}

// IssuedTo asks which certificates were issued to an identity, a SPIFFE ID, by the
// control plane that is asked.
func (c *Client) IssuedTo(ctx context.Context, id string) (i adminv1.Issuances, err error) {
	return i, c.control.get(ctx, "/v1/ca/issued/to", url.Values{"id": {id}}, &i)
}

// RotateRoot starts the replacement of the root, or, with force, takes the step
// that one under way waits for.
func (c *Client) RotateRoot(ctx context.Context, force bool) (s adminv1.AuthorityStatus, err error) {
	return s, c.control.ask(ctx, http.MethodPost, "/v1/ca/rotate", url.Values{"force": {strconv.FormatBool(force)}}, &s)
}

// DistrustRoot replaces the root in a hurry, and has tunnels from before end.
func (c *Client) DistrustRoot(ctx context.Context) (s adminv1.AuthorityStatus, err error) {
	return s, c.control.ask(ctx, http.MethodPost, "/v1/ca/distrust", nil, &s)
}

// Revoke revokes one certificate.
func (c *Client) Revoke(ctx context.Context, serial, reason string) (r adminv1.Revocations, err error) {
	return r, c.control.ask(ctx, http.MethodPost, "/v1/ca/revoke", url.Values{"serial": {serial}, "reason": {reason}}, &r)
}

// RevokeIdentity revokes all certificates of an identity, a SPIFFE ID.
func (c *Client) RevokeIdentity(ctx context.Context, id, reason string) (r adminv1.Revocations, err error) {
	return r, c.control.ask(ctx, http.MethodPost, "/v1/ca/revoke", url.Values{"id": {id}, "reason": {reason}}, &r)
}

// Revoked lists the certificates that are revoked and have not expired.
func (c *Client) Revoked(ctx context.Context) (r adminv1.Revocations, err error) {
	return r, c.control.ask(ctx, http.MethodGet, "/v1/ca/revoked", nil, &r)
}

// Refused lists what the control plane refused at or after since (zero: ever), and
// of that the newest limit (0: all), oldest first.
func (c *Client) Refused(ctx context.Context, since time.Time, limit int) (r adminv1.Refusals, err error) {
	q := url.Values{"limit": {strconv.Itoa(limit)}}
	if !since.IsZero() {
		q.Set("since", since.UTC().Format(time.RFC3339Nano))
	}
	return r, c.control.ask(ctx, http.MethodGet, "/v1/ca/refused", q, &r)
}

// AbandonRoot withdraws the next root before it signs.
func (c *Client) AbandonRoot(ctx context.Context) (s adminv1.AuthorityStatus, err error) {
	return s, c.control.ask(ctx, http.MethodPost, "/v1/ca/abandon", nil, &s)
}

// VerifyAudit asks the agent to read its whole audit store and check the chain.
func (c *Client) VerifyAudit(ctx context.Context) (v adminv1.AuditVerification, err error) {
	return v, c.agent.get(ctx, "/v1/audit/verify", nil, &v)
}

func (e *endpoint) get(ctx context.Context, path string, q url.Values, into any) error {
	return e.ask(ctx, http.MethodGet, path, q, into)
}

func (e *endpoint) ask(ctx context.Context, method, path string, q url.Values, into any) error {
	body, err := e.do(ctx, method, path, q)
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
	return e.do(ctx, http.MethodGet, path, q)
}

func (e *endpoint) do(ctx context.Context, method, path string, q url.Values) (io.ReadCloser, error) {
	u := url.URL{Scheme: "http", Host: e.host, Path: path, RawQuery: q.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
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
		return nil, &UnreachableError{Part: e.part, Socket: e.socket, Err: cause(err)}
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

// cause takes off what http.Client says about a request of no interest.
func cause(err error) error {
	if inner := errors.Unwrap(err); inner != nil {
		return inner
	}
	return err
}

package kubeclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	constants "k8s.io/apimachinery/pkg/util/portforward"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	spdytransport "k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/transport/websocket"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// Tunnel leads to ports on the loopback address of one pod, through the API
// server. It opens no port on the operator's machine, where others could use
// it. It is safe for concurrent use.
type Tunnel struct {
	// Pod is where it leads, "namespace/name".
	Pod  string
	conn httpstream.Connection

	mu   sync.Mutex
	next int // guarded by mu; the next connection's id
}

// OpenTunnel opens a tunnel to a pod. The context bounds only the opening;
// Close the tunnel after use.
func (c *Cluster) OpenTunnel(ctx context.Context, namespace, pod string) (*Tunnel, error) {
	u := *c.base
	u.Path = path.Join("/", u.Path, "api/v1/namespaces", namespace, "pods", pod, "portforward")
	config := rest.CopyConfig(c.config)
	config.Timeout = 0 // a tunnel lives as long as it is used
	conn, err := overWebSocket(ctx, config, &u)
	if httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err) {
		// An older API server, a proxy that does not pass websockets, or a
		// role for one way and not the other.
		var refused *httpstream.UpgradeFailureError
		errors.As(err, &refused)
		conn, err = overSPDY(ctx, config, &u)
		if err != nil && refused != nil && refusal(refused.Cause) && strings.Contains(err.Error(), "forbidden") {
			err = refused.Cause // the same words, but not as text alone
		}
	}
	if err == nil {
		return &Tunnel{Pod: namespace + "/" + pod, conn: conn}, nil
	}
	var status *apierrors.StatusError
	switch {
	case ctx.Err() != nil || errors.Is(err, os.ErrDeadlineExceeded):
		return nil, c.lost(ctx, &url.Error{Err: context.DeadlineExceeded})
	case !errors.As(err, &status):
		return nil, fmt.Errorf("port-forward to pod %s/%s: %w", namespace, pod, err)
	}
	err = denied(c.answered(status), Access{Verb: "get and create", Resource: "pods/portforward", Namespace: namespace})
	if apierrors.IsNotFound(err) {
		err = fmt.Errorf("pod %s/%s is gone: %w", namespace, pod, err)
	}
	return nil, err
}

// refusal reports whether an error has the API server's word that one may not.
func refusal(err error) bool {
	var status *apierrors.StatusError
	return errors.As(err, &status) && apierrors.IsForbidden(status)
}

func overWebSocket(ctx context.Context, config *rest.Config, u *url.URL) (httpstream.Connection, error) {
	transport, holder, err := websocket.RoundTripperFor(config)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	ws, err := websocket.Negotiate(transport, holder, req, constants.WebsocketsSPDYTunnelingPortForwardV1)
	if err != nil {
		return nil, err
	}
	conn, err := spdy.NewClientConnectionWithPings(portforward.NewTunnelingConnection("client", ws), portforward.PingPeriod)
	if err != nil {
		return nil, errors.Join(err, ws.Close())
	}
	return conn, nil
}

func overSPDY(ctx context.Context, config *rest.Config, u *url.URL) (httpstream.Connection, error) {
	transport, upgrader, err := spdytransport.RoundTripperFor(config)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), nil)
	if err != nil {
		return nil, err
	}
	type result struct {
		conn httpstream.Connection
		err  error
	}
	done := make(chan result, 1)
	go func() { // the library's dialler does not heed the context all the way
		conn, _, err := spdytransport.NegotiateStreaming(upgrader, &http.Client{Transport: transport}, req, portforward.PortForwardProtocolV1Name)
		done <- result{conn, err}
	}()
	select {
	case r := <-done:
		return r.conn, r.err
	case <-ctx.Done():
		go func() {
			if r := <-done; r.err == nil {
				_ = r.conn.Close()
			}
		}()
		return nil, ctx.Err()
	}
}

// Close ends the tunnel and every connection in it.
func (t *Tunnel) Close() error { return t.conn.Close() }

// Transport makes HTTP requests to a port of the pod, whatever host they name.
// Close its idle connections after use.
func (t *Tunnel) Transport(port int) *http.Transport {
	return &http.Transport{
		DialContext:           func(ctx context.Context, _, _ string) (net.Conn, error) { return t.Dial(ctx, port) },
		ResponseHeaderTimeout: 30 * time.Second,
	}
}

// Dial opens a connection to a port of the pod. That nobody listens there shows
// when the connection is first read from.
func (t *Tunnel) Dial(ctx context.Context, port int) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	t.mu.Lock()
	id := t.next
	t.next++
	t.mu.Unlock()
	headers := http.Header{}
	headers.Set(corev1.StreamType, corev1.StreamTypeError)
	headers.Set(corev1.PortHeader, strconv.Itoa(port))
	headers.Set(corev1.PortForwardRequestIDHeader, strconv.Itoa(id))
	faults, err := t.conn.CreateStream(headers)
	if err != nil {
		return nil, fmt.Errorf("port-forward to pod %s: %w", t.Pod, err)
	}
	_ = faults.Close() // nothing is written to it
	headers = headers.Clone()
	headers.Set(corev1.StreamType, corev1.StreamTypeData)
	data, err := t.conn.CreateStream(headers)
	if err != nil {
		t.conn.RemoveStreams(faults)
		return nil, fmt.Errorf("port-forward to pod %s: %w", t.Pod, err)
	}
	c := &conn{tunnel: t, port: port, data: data, faults: faults, told: make(chan struct{})}
	go c.listen()
	return c, nil
}

// conn is one connection: a stream of data, and one on which the kubelet says
// what went wrong.
type conn struct {
	tunnel       *Tunnel
	port         int
	data, faults httpstream.Stream
	told         chan struct{} // closed when the kubelet has said all, then:
	fault        string
	once         sync.Once
}

// maxFault bounds the kubelet's words.
const maxFault = 64 << 10

// listen reads the kubelet's words; Close ends it.
func (c *conn) listen() {
	defer close(c.told)
	b, err := io.ReadAll(io.LimitReader(c.faults, maxFault))
	if len(b) > 0 && (err == nil || errors.Is(err, io.EOF)) {
		c.fault = strings.TrimSpace(string(b))
		_ = c.data.Reset() // wakes the reader
	}
}

// lastWords is how long an end waits for the kubelet's reason.
const lastWords = time.Second

// Read reads what the pod sent.
func (c *conn) Read(b []byte) (int, error) {
	n, err := c.data.Read(b)
	if err == nil || n > 0 {
		return n, nil
	}
	select {
	case <-c.told:
		if c.fault != "" {
			err = fmt.Errorf("port %d of pod %s: %s", c.port, c.tunnel.Pod, lastLine(c.fault))
		}
	case <-time.After(lastWords):
	}
	return 0, err
}

// lastLine shortens what the kubelet says to what matters.
func lastLine(s string) string {
	if strings.Contains(s, "connection refused") {
		return "connection refused: nothing listens there"
	}
	return s
}

// Write sends to the pod.
func (c *conn) Write(b []byte) (int, error) { return c.data.Write(b) }

// Close ends the connection, and is idempotent.
func (c *conn) Close() error {
	c.once.Do(func() {
		_ = c.data.Reset()
		_ = c.faults.Reset()
		c.tunnel.conn.RemoveStreams(c.data, c.faults)
		<-c.told
	})
	return nil
}

type address string

func (a address) Network() string { return "port-forward" }
func (a address) String() string  { return string(a) }

// LocalAddr has no meaning here.
func (c *conn) LocalAddr() net.Addr { return address("signet") }

// RemoteAddr names the pod and the port.
func (c *conn) RemoteAddr() net.Addr {
	return address(c.tunnel.Pod + ":" + strconv.Itoa(c.port))
}

// errNoDeadlines: HTTP clients, for which this is, close instead.
var errNoDeadlines = errors.New("port-forwarded connections have no deadlines")

// SetDeadline is not supported.
func (c *conn) SetDeadline(time.Time) error { return errNoDeadlines }

// SetReadDeadline is not supported.
func (c *conn) SetReadDeadline(time.Time) error { return errNoDeadlines }

// SetWriteDeadline is not supported.
func (c *conn) SetWriteDeadline(time.Time) error { return errNoDeadlines }

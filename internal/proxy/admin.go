package proxy

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"time"

	"github.com/signet-mesh/signet/internal/mesh"
	"github.com/signet-mesh/signet/internal/unixsocket"
)

// admin speaks to the admin socket of an Envoy. It is safe for concurrent use.
type admin struct {
	socket string
	client *http.Client
}

func newAdmin(socket string) *admin {
	return &admin{socket: socket, client: &http.Client{
		// A new connection for each request: the Envoy behind the socket may
		// be another one by the next.
		Transport: &http.Transport{DialContext: unixsocket.Dialer(socket), DisableKeepAlives: true},
		Timeout:   10 * time.Second,
	}}
}

func (a *admin) do(ctx context.Context, method, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://envoy"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(body))
	}
	return body, nil
}

// Connections counts what a proxy has open.
type Connections struct {
	Outbound int // from workloads of the node
	Inbound  int // to workloads, in tunnels
	Plain    int // to workloads, without a tunnel
	Tunnels  int // into which Inbound's came, and those that idle
}

// Open is how many connections of applications there are.
func (c Connections) Open() int { return c.Outbound + c.Inbound + c.Plain }

// The statistics that count connections; package xds names what is in them.
var (
	counted = fmt.Sprintf(`^(listener\..+_(%d|%d|%d)\.downstream_cx_active|http\.in\.downstream_rq_active)$`,
		mesh.PortOutbound, mesh.PortInbound, mesh.PortTunnel)
	listenerPort = regexp.MustCompile(`_(\d+)\.downstream_cx_active$`)
)

func (a *admin) connections(ctx context.Context) (Connections, error) {
	body, err := a.do(ctx, http.MethodGet, "/stats?filter="+url.QueryEscape(counted))
	if err != nil {
		return Connections{}, err
	}
	return parseConnections(body)
}

func parseConnections(body []byte) (Connections, error) {
	var c Connections
	lines := bufio.NewScanner(bytes.NewReader(body))
	for lines.Scan() {
		name, value, ok := bytes.Cut(lines.Bytes(), []byte(": "))
		if !ok {
			continue
		}
		n, err := strconv.Atoi(string(value))
		if err != nil {
			return Connections{}, fmt.Errorf("statistic %s: %q is not a number", name, value)
		}
		if string(name) == "http.in.downstream_rq_active" {
			c.Inbound += n
			continue
		}
		port := listenerPort.FindSubmatch(name)
		if port == nil {
			continue
		}
		switch string(port[1]) {
		case strconv.Itoa(mesh.PortOutbound):
			c.Outbound += n
		case strconv.Itoa(mesh.PortInbound):
			c.Plain += n
		case strconv.Itoa(mesh.PortTunnel):
			c.Tunnels += n
		}
	}
	return c, lines.Err()
}

// listeners returns the names of the listeners that accept.
func (a *admin) listeners(ctx context.Context) (map[string]bool, error) {
	body, err := a.do(ctx, http.MethodGet, "/listeners?format=json")
	if err != nil {
		return nil, err
	}
	var doc struct {
		Statuses []struct {
			Name string `json:"name"`
		} `json:"listener_statuses"`
	}
	if err := json.Unmarshal(body, &doc); err != nil {
		return nil, fmt.Errorf("listeners: %w", err)
	}
	out := map[string]bool{}
	for _, s := range doc.Statuses {
		out[s.Name] = true
	}
	return out, nil
}

// stopAccepting closes the sockets in the workloads' namespaces, and has the
// tunnels that are open told to take no more.
func (a *admin) stopAccepting(ctx context.Context) error {
	// Sockets first: what moves on must not come back here.
	if _, err := a.do(ctx, http.MethodPost, "/drain_listeners?inboundonly"); err != nil {
		return err
	}
	_, err := a.do(ctx, http.MethodPost, "/healthcheck/fail")
	return err
}

// Package apiserver is an API server for tests of programs that talk to one: it
// serves objects that the test puts in, judges every request by rules, and
// forwards ports to the test's own listeners, by the protocols of the real one
// (SPDY, and SPDY over WebSocket).
package apiserver

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"

	"github.com/gorilla/websocket"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	constants "k8s.io/apimachinery/pkg/util/portforward"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// Token is the credential that the server takes.
const Token = "operator"

// Request is what a rule judges.
type Request struct {
	Verb, Group, Resource, Namespace, Name string // Resource with "/subresource"
}

// Server is a running API server. Its fields must not be changed while it is
// asked.
type Server struct {
	// Objects are served by their paths, such as /version. A path that is
	// absent is not found.
	Objects map[string]any
	// Deny refuses requests; nil refuses none.
	Deny func(Request) bool
	// NoWebSocket refuses to tunnel over WebSocket, as an old server does.
	NoWebSocket bool
	// Dial connects to a pod's port; nil: nothing listens anywhere.
	Dial func(ctx context.Context, namespace, pod, port string) (net.Conn, error)

	http   *httptest.Server
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup

	mu      sync.Mutex
	stopped bool // guarded by mu; no work begins any more
}

// begin adds to the work that Stop waits for, unless it waits already.
func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.stopped {
		s.work.Add(1)
	}
	return !s.stopped
}

// Start starts a server; Stop it after use.
func Start() *Server {
	s := &Server{Objects: map[string]any{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.http = httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	s.http.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	s.http.StartTLS()
	return s
}

// Stop ends the server and everything that it forwards.
func (s *Server) Stop() {
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	s.cancel()
	s.http.CloseClientConnections()
	s.http.Close()
	s.work.Wait()
}

// URL returns the server's address.
func (s *Server) URL() string { return s.http.URL }

// Kubeconfig returns a file with the server as context "test", and a context
// "stranger" without good credentials.
func (s *Server) Kubeconfig() string {
	ca := base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.http.Certificate().Raw}))
	return fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: test
clusters: [{name: test, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: operator, user: {token: %s}}, {name: stranger, user: {token: wrong}}]
contexts: [{name: test, context: {cluster: test, user: operator}}, {name: stranger, context: {cluster: test, user: stranger}}]
`, s.http.URL, ca, Token)
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Authorization") != "Bearer "+Token {
		refuse(w, apierrors.NewUnauthorized("Unauthorized"))
		return
	}
	req := parse(r)
	if s.Deny != nil && s.Deny(req) {
		resource := schema.GroupResource{Group: req.Group, Resource: req.Resource}
		refuse(w, apierrors.NewForbidden(resource, req.Name, fmt.Errorf("user %q cannot %s it", Token, req.Verb)))
		return
	}
	switch req.Resource {
	case "pods/portforward":
		s.forward(w, r, req)
		return
	case "selfsubjectaccessreviews":
		s.review(w, r)
		return
	}
	object, ok := s.Objects[r.URL.Path]
	if !ok {
		refuse(w, apierrors.NewNotFound(schema.GroupResource{Group: req.Group, Resource: req.Resource}, req.Name))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(object)
}

func refuse(w http.ResponseWriter, err *apierrors.StatusError) {
	w.Header().Set("Content-Type", "application/json")
	status := err.Status()
	status.APIVersion, status.Kind = "v1", "Status"
	w.WriteHeader(int(status.Code))
	_ = json.NewEncoder(w).Encode(status)
}

// parse reads a request as the real server's authorizer does.
func parse(r *http.Request) Request {
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	var req Request
	switch {
	case len(parts) > 2 && parts[0] == "api":
		parts = parts[2:]
	case len(parts) > 3 && parts[0] == "apis":
		req.Group, parts = parts[1], parts[3:]
	default:
		return Request{Verb: "get"}
	}
	if parts[0] == "namespaces" && len(parts) > 2 {
		req.Namespace, parts = parts[1], parts[2:]
	}
	req.Resource = parts[0]
	if len(parts) > 1 {
		req.Name = parts[1]
	}
	if len(parts) > 2 {
		req.Resource += "/" + parts[2]
	}
	switch {
	case r.Method == http.MethodPost:
		req.Verb = "create"
	case req.Name == "":
		req.Verb = "list"
	default:
		req.Verb = "get"
	}
	return req
}

func (s *Server) review(w http.ResponseWriter, r *http.Request) {
	var review authorizationv1.SelfSubjectAccessReview
	if err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&review); err != nil || review.Spec.ResourceAttributes == nil {
		refuse(w, apierrors.NewBadRequest("no review"))
		return
	}
	a := review.Spec.ResourceAttributes
	req := Request{Verb: a.Verb, Group: a.Group, Resource: a.Resource, Namespace: a.Namespace, Name: a.Name}
	if a.Subresource != "" {
		req.Resource += "/" + a.Subresource
	}
	review.Status.Allowed = s.Deny == nil || !s.Deny(req)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	_ = json.NewEncoder(w).Encode(review)
}

// forward is the kubelet's side of a port-forward.
func (s *Server) forward(w http.ResponseWriter, r *http.Request, req Request) {
	if !s.begin() {
		return
	}
	defer s.work.Done()
	streams := make(chan httpstream.Stream, 16)
	take := func(stream httpstream.Stream, _ <-chan struct{}) error { streams <- stream; return nil }
	var conn httpstream.Connection
	if websocket.IsWebSocketUpgrade(r) {
		if s.NoWebSocket {
			refuse(w, apierrors.NewBadRequest("Upgrade request required"))
			return
		}
		upgrader := websocket.Upgrader{Subprotocols: []string{constants.WebsocketsSPDYTunnelingPortForwardV1}}
		ws, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return
		}
		conn, err = spdy.NewServerConnection(portforward.NewTunnelingConnection("server", ws), take)
		if err != nil {
			_ = ws.Close()
			return
		}
	} else {
		if _, err := httpstream.Handshake(r, w, []string{constants.PortForwardV1Name}); err != nil {
			return
		}
		if conn = spdy.NewResponseUpgrader().UpgradeResponse(w, r, take); conn == nil {
			return
		}
	}
	s.work.Go(func() {
		defer func() { _ = conn.Close() }()
		faults := map[string]httpstream.Stream{}
		for {
			select {
			case <-s.ctx.Done():
				return
			case <-conn.CloseChan():
				return
			case stream := <-streams:
				id := stream.Headers().Get(corev1.PortForwardRequestIDHeader)
				if stream.Headers().Get(corev1.StreamType) == corev1.StreamTypeError {
					faults[id] = stream
					continue
				}
				fault := faults[id]
				delete(faults, id)
				s.work.Go(func() { s.copy(req, stream, fault) })
			}
		}
	})
}

// copy joins one pair of streams with the pod's port.
func (s *Server) copy(req Request, data, fault httpstream.Stream) {
	defer func() { _ = fault.Close() }()
	port := data.Headers().Get(corev1.PortHeader)
	err := fmt.Errorf("connect: connection refused")
	var c net.Conn
	if s.Dial != nil {
		c, err = s.Dial(s.ctx, req.Namespace, req.Name, port)
	}
	if err != nil {
		_, _ = fmt.Fprintf(fault, "error forwarding port %s to pod %s: failed to connect to localhost:%s inside namespace: %v", port, req.Name, port, err)
		_ = data.Close()
		return
	}
	stop := context.AfterFunc(s.ctx, func() { _ = c.Close() })
	defer stop()
	var up sync.WaitGroup
	up.Go(func() {
		_, _ = io.Copy(c, data)
		_ = c.Close()
	})
	_, _ = io.Copy(data, c)
	_ = data.Close()
	_ = c.Close()
	_ = data.Reset()
	up.Wait()
}

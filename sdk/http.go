package sdk

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var http1 = []string{"http/1.1"}

// HTTPClient returns a client for https URLs whose servers prove to be one of the
// given identities, whatever host the URL names. It speaks HTTP/1.1 and uses no
// proxy of the environment.
func (m *Mesh) HTTPClient(server spiffeid.ID, or ...spiffeid.ID) *http.Client {
	servers := append([]spiffeid.ID{server}, or...)
	return &http.Client{Transport: &http.Transport{
		DialTLSContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := m.dialAs(ctx, network, address, servers, http1)
			if err != nil {
				return nil, err
			}
			return c, nil
		},
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return nil, errors.New("sdk: an http URL would be called in plain text; write https")
		},
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     90 * time.Second,
	}}
}

// ServeHTTP serves HTTP/1.1 on a listener, which it takes over, until ctx ends;
// requests under way then have 5 s. PeerFromRequest says who calls. Callers that
// the policies refuse get no connection. It closes the listener.
func (m *Mesh) ServeHTTP(ctx context.Context, inner net.Listener, h http.Handler) error {
	l := m.listen(inner, http1)
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if c, ok := c.(*Conn); ok {
				return context.WithValue(ctx, peerKey{}, c.peer)
			}
			return ctx
		},
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	select {
	case err := <-ended:
		return errors.Join(err, l.Close())
	case <-ctx.Done():
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	err := srv.Shutdown(last)
	if err != nil {
		err = srv.Close()
	}
	if why := <-ended; !errors.Is(why, http.ErrServerClosed) {
		err = errors.Join(err, why)
	}
	return err
}

type peerKey struct{}

// PeerFromRequest returns who makes a request, as its connection proved.
func PeerFromRequest(r *http.Request) (spiffeid.ID, bool) {
	id, ok := r.Context().Value(peerKey{}).(spiffeid.ID)
	return id, ok
}

package relay

import (
	"context"

	"github.com/signet-mesh/signet/xds"
	"github.com/signet-mesh/signet/xds/xdsserver"
)

// Server returns the ADS server for the proxy. Whoever can open its socket is
// trusted as the node's proxy: it must be in a directory that only root enters.
func (r *Relay) Server() *xdsserver.Server {
	return &xdsserver.Server{
		Log: r.log,
		Open: func(context.Context) (xdsserver.Source, xdsserver.Subscriber, error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.proxy.streams++
			r.proxy.opened++
			r.log.Info("proxy connected")
			return r, (*subscriber)(r), nil
		},
	}
}

// subscriber records how far the proxy is.
type subscriber Relay

func (s *subscriber) Settled(set xds.Set) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proxy.settled, s.proxy.refused = set, ""
}

func (s *subscriber) Nacked(typeURL, message string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proxy.refused = typeURL + ": " + message
}

func (s *subscriber) Closed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proxy.streams--
	s.proxy.settled = nil
	s.log.Warn("proxy disconnected")
}

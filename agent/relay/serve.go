package relay

import (
	"cmp"
	"context"
	"slices"

	"google.golang.org/grpc/metadata"

	"github.com/signet-mesh/signet/xds"
	"github.com/signet-mesh/signet/xds/xdsserver"
)

// Server returns the ADS server for the node's proxies. Whoever can open its
// socket is trusted as one: it must be in a directory that only root enters.
func (r *Relay) Server() *xdsserver.Server {
	return &xdsserver.Server{
		Log: r.log,
		Open: func(ctx context.Context) (xdsserver.Source, xdsserver.Subscriber, error) {
			p := &proxyStream{relay: r}
			if md, ok := metadata.FromIncomingContext(ctx); ok {
				if v := md.Get(xds.HeaderProxy); len(v) > 0 {
					p.instance = v[0]
				}
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			r.opened++
			p.number = r.opened
			r.proxies[p] = true
			r.log.Info("proxy connected", "proxy", p.instance)
			return r, p, nil
		},
	}
}

// proxyStream is one proxy's stream, and how far the proxy is. It implements
// xdsserver.Subscriber.
type proxyStream struct {
	relay    *Relay
	instance string // greater than those of older proxies; empty if it did not say
	number   uint64 // of the stream

	settled string // guarded by relay.mu; version of the set that it has taken, empty if none
	refused string // guarded by relay.mu; the newest refusal since it last settled
}

func (p *proxyStream) Settled(set xds.Set) {
	settled := set.Version()
	p.relay.mu.Lock()
	defer p.relay.mu.Unlock()
	p.settled, p.refused = settled, ""
}

func (p *proxyStream) Nacked(typeURL, message string) {
	p.relay.mu.Lock()
	defer p.relay.mu.Unlock()
	p.refused = typeURL + ": " + message
}

func (p *proxyStream) Closed() {
	p.relay.mu.Lock()
	defer p.relay.mu.Unlock()
	delete(p.relay.proxies, p)
	p.relay.log.Warn("proxy disconnected", "proxy", p.instance)
}

// newer orders the newest proxy first, and the newest stream of one that came
// back while its old stream is not known to be dead.
func newer(a, b *proxyStream) int {
	return cmp.Or(cmp.Compare(b.instance, a.instance), cmp.Compare(b.number, a.number))
}

// Proxy says whether a proxy is connected that takes new connections, whether
// every proxy has taken everything that the relay has for it, and what was
// refused last.
//
// While two take new connections, each gets some of them, so both must be
// current. One that drains must be, too: new streams arrive in its old tunnels
// until their callers have gone over. But if it refuses, being older perhaps
// than what it is told, the node is not held up: its connections end.
func (r *Relay) Proxy() (connected, current bool, refused string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	streams := make([]*proxyStream, 0, len(r.proxies))
	for p := range r.proxies {
		streams = append(streams, p)
	}
	slices.SortFunc(streams, newer)
	current = true
	for _, p := range streams {
		current = current && r.hasAll(p)
		if r.draining(p.instance) {
			continue
		}
		connected = true
		if refused == "" { // the newest proxy's goes first
			refused = p.refused
		}
	}
	return connected, connected && current, refused
}

// hasAll reports whether a proxy has taken everything that the relay has for it, or
// drains and refuses it. mu is held.
func (r *Relay) hasAll(p *proxyStream) bool {
	taken := p.settled != "" && p.settled == r.merged.version
	return taken || p.refused != "" && r.draining(p.instance)
}

// Generation counts the streams of proxies so far. What was seen of a proxy at
// one count says nothing about the proxy at another.
func (r *Relay) Generation() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.opened
}

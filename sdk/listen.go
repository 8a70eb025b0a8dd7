package sdk

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"
)

// maxHandshakes is how many handshakes a listener runs at once. Further
// connections wait in the kernel.
const maxHandshakes = 1024

// Listener accepts connections of callers that have proved who they are and
// whom the policies let in. The port that policies name is the listener's own.
type Listener struct {
	inner     net.Listener
	mesh      *Mesh
	protocols []string

	ctx    context.Context
	cancel context.CancelFunc
	ready  chan *Conn
	wg     sync.WaitGroup
	err    error // of inner; set before ended is closed
	ended  chan struct{}
}

// Listen listens on an address. Close the listener before the Mesh.
func (m *Mesh) Listen(network, address string) (*Listener, error) {
	inner, err := net.Listen(network, address)
	if err != nil {
		return nil, err
	}
	return m.NewListener(inner), nil
}

// NewListener accepts from a listener that is there already, and takes it over.
func (m *Mesh) NewListener(inner net.Listener) *Listener { return m.listen(inner, nil) }

func (m *Mesh) listen(inner net.Listener, protocols []string) *Listener {
	l := &Listener{inner: inner, mesh: m, protocols: protocols, ready: make(chan *Conn), ended: make(chan struct{})}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.wg.Go(l.run)
	return l
}

// run accepts; each handshake has a goroutine of its own, so that a slow caller
// holds nobody up.
func (l *Listener) run() {
	defer close(l.ended)
	room := make(chan struct{}, maxHandshakes)
	for {
		select {
		case room <- struct{}{}:
		case <-l.ctx.Done():
			l.err = net.ErrClosed
			return
		}
		raw, err := l.inner.Accept()
		if err != nil {
			<-room
			var again interface{ Temporary() bool }
			if l.ctx.Err() == nil && errors.As(err, &again) && again.Temporary() {
				l.mesh.log.Warn("accepting a connection", "error", err)
				time.Sleep(5 * time.Millisecond) // no more files, for one
				continue
			}
			l.err = err
			return
		}
		l.wg.Go(func() {
			c, err := l.mesh.server(l.ctx, raw, l.protocols)
			<-room
			if err != nil {
				return // the audit says why
			}
			select {
			case l.ready <- c:
			case <-l.ctx.Done():
				_ = c.Close()
			}
		})
	}
}

// Accept implements net.Listener. What it returns is a *Conn.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	case <-l.ended:
		return nil, l.err
	}
}

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return l.inner.Addr() }

// Close ends the listener and the handshakes under way, and waits for them.
// Connections that were accepted stay open.
func (l *Listener) Close() error {
	l.cancel()
	err := l.inner.Close()
	l.wg.Wait()
	return err
}

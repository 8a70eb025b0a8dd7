package capture

import (
	"context"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/lab"
)

// queued opens connections to two listeners of one port, closes the first one
// without having taken any, and counts those that the second answers.
func queued(t *testing.T, p *lab.Pod, n int) (answered int) {
	t.Helper()
	share := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		})
		if cerr != nil {
			return cerr
		}
		return err
	}}
	var first, second net.Listener
	err := p.Do(func() (err error) {
		if first, err = share.Listen(context.Background(), "tcp4", "127.0.0.1:15006"); err != nil {
			return err
		}
		second, err = share.Listen(context.Background(), "tcp4", "127.0.0.1:15006")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	var conns []net.Conn
	for range n {
		c, err := p.Dial(t.Context(), "tcp4", "127.0.0.1:15006")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := second.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "x") // the client counts what arrives
			c.Close()
		}
	}()
	for _, c := range conns {
		if err := c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err == nil {
			answered++
		}
	}
	second.Close()
	<-done
	return answered
}

// Defends: connections that wait for a proxy that stops are taken by the one
// beside it.
func TestQueuedConnectionsMove(t *testing.T) {
	p := newPair(t)
	apply(t, p.a)
	const n = 200
	if got := queued(t, p.a, n); got != n {
		t.Errorf("%d of %d connections were answered", got, n)
	}
	err := p.a.Do(func() error { return os.WriteFile(settingPath(migrateRequests), []byte("0\n"), 0) })
	if err != nil {
		t.Fatal(err)
	}
	got := queued(t, p.a, n)
	t.Logf("without the setting: %d of %d were answered", got, n)
	if got == n {
		t.Error("none is lost without the setting either: the test shows nothing")
	}
}

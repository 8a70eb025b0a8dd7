// Package unixsocket opens the mesh's unix sockets and connects to them.
package unixsocket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Listen opens a socket with the given mode, in the place of one that a dead
// process left behind. A directory that is missing is made: for its owner
// only, unless the socket is open to others. A socket that a living process
// serves is not taken.
func Listen(path string, mode os.FileMode) (*net.UnixListener, error) {
	dirMode := os.FileMode(0o700)
	if mode&0o007 != 0 {
		dirMode = 0o755
	}
	if err := os.MkdirAll(filepath.Dir(path), dirMode); err != nil {
		return nil, err
	}
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		conn.Close()
		return nil, fmt.Errorf("%s: another process serves this socket; stop it, or choose another --run-dir", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, mode); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Dialer returns a dial function that connects to the socket whatever address
// it is asked for, as http.Transport wants it.
func Dialer(path string) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
}

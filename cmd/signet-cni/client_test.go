package main

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	v1 "github.com/signet-mesh/signet/api/cni/v1"
)

// Defends: an answer that is no plain yes, whatever it is, is a no.
func TestNotYes(t *testing.T) {
	for _, answer := range []string{
		"",
		"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
		"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull",
		"HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{\"result\":\"maybe\"}",
		"HTTP/1.1 200 OK\r\nContent-Length: 21\r\n\r\n{\"result\":\"released\"}",
		"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"result\":\"captured",
		"HTTP/1.1 200 OK\r\nContent-Length: 33\r\n\r\n{\"result\":\"captured\",\"error\":\"no\"}",
		"HTTP/1.1 200 OK\r\nContent-Length: 34\r\n\r\n{\"result\":\"captured\",\"error\":\"no\"}",
		"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 21\r\n\r\n{\"result\":\"captured\"}",
		"HTTP/1.1 302 Found\r\nLocation: /v1/del\r\nContent-Length: 21\r\n\r\n{\"result\":\"captured\"}",
		"captured\r\n\r\n",
	} {
		socket := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_ = c.SetDeadline(time.Now().Add(time.Second))
				_, _ = c.Read(make([]byte, 4096))
				_, _ = io.WriteString(c, answer)
				c.Close()
			}
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		if r, err := ask(ctx, socket, v1.PathAdd, v1.Pod{}); err == nil {
			t.Errorf("%q: %q", answer, r)
		}
		cancel()
		l.Close()
		<-done
	}
}

package e2e

import (
	"crypto/tls"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-mesh/signet/sdk"
	"github.com/signet-mesh/signet/test/harness"
)

// BenchmarkSDK measures a connection from its dial to its close, with a word each
// way: with package sdk (rules, audit), and with go-spiffe alone.
func BenchmarkSDK(b *testing.B) {
	exe, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	m := harness.Start(b, harness.Options{Documents: map[string]string{"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", "enforce") +
		sdkEntry("server", exe) + harness.Allow("shop", "own", "server", []int{sdkPort(l)}, "server")}})
	socket := "unix://" + filepath.Join(m.RunDir, "api", "agent.sock")
	s, err := sdk.Open(b.Context(), sdk.WithSocket(socket))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.Close() })
	answer := func(l net.Listener) {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); _, _ = io.Copy(c, c) }()
		}
	}
	run := func(b *testing.B, dial func() (net.Conn, error)) {
		for b.Loop() {
			c, err := dial()
			if err != nil {
				b.Fatal(err)
			}
			if err := word(c); err != nil {
				b.Fatal(err)
			}
			c.Close()
		}
	}
	b.Run("sdk", func(b *testing.B) {
		own := s.NewListener(l)
		defer own.Close()
		go answer(own)
		run(b, func() (net.Conn, error) { return s.Dial(b.Context(), "tcp", l.Addr().String(), sdkID("server")) })
	})
	b.Run("go-spiffe", func(b *testing.B) {
		source, err := workloadapi.NewX509Source(b.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(socket)))
		if err != nil {
			b.Fatal(err)
		}
		defer source.Close()
		plain, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(sdkID("server"))))
		if err != nil {
			b.Fatal(err)
		}
		defer plain.Close()
		go answer(plain)
		config := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(sdkID("server")))
		run(b, func() (net.Conn, error) { return tls.Dial("tcp", plain.Addr().String(), config) })
	})
}

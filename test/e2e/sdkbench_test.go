package e2e

import (
	"crypto/tls"
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
	b.Run("sdk", func(b *testing.B) {
		own := s.NewListener(l)
		defer own.Close()
		go acceptAll(own, echo)
		words(b, func() (net.Conn, error) { return s.Dial(b.Context(), "tcp", l.Addr().String(), sdkID("server")) })
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
		go acceptAll(plain, echo)
		config := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(sdkID("server")))
		words(b, func() (net.Conn, error) { return tls.Dial("tcp", plain.Addr().String(), config) })
	})
}

// words measures connections by which a word goes each way.
func words(b *testing.B, dial func() (net.Conn, error)) {
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

// BenchmarkOriginate measures the same between captured programs, in a tunnel that is
// open: with no TLS inside it, with the server's and that of the client's proxy, and
// with the programs' own; and to a server that is not captured.
func BenchmarkOriginate(b *testing.B) {
	exe, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	documents := harness.Config("1h") + harness.Namespace("shop", "enforce") + harness.Workload("shop", "client", "10.88.0.10") +
		capturedProgram("server", "10.88.0.12", exe) + sdkEntry("direct", exe) +
		harness.Allow("shop", "to-server", "server", []int{8080, 9443}, "client") +
		originating("to-server-tls", "server", []int{8443}, "", "client") + speaker("direct", vipDirect, "10.88.0.20", sa("direct"))
	m := harness.Start(b, harness.Options{
		Pods:      map[string]string{"client": "10.88.0.10", "server": "10.88.0.12", "bare": "10.88.0.20"},
		Documents: map[string]string{"mesh.yaml": documents},
	})
	socket := workloadapi.WithClientOptions(workloadapi.WithAddr("unix://" + filepath.Join(m.RunDir, "api", "agent.sock")))
	listen := func(pod, port, id string) {
		l, err := m.Pod(pod).Listen("tcp", ":"+port)
		if err != nil {
			b.Fatal(err)
		}
		if id != "" {
			source, err := workloadapi.NewX509Source(b.Context(), socket, workloadapi.WithDefaultX509SVIDPicker(named(id)))
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { source.Close() })
			l = tls.NewListener(l, tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny()))
		}
		b.Cleanup(func() { l.Close() })
		go acceptAll(l, echo)
	}
	listen("server", "8080", "")
	listen("server", "8443", sa("server"))
	listen("server", "9443", sa("server"))
	listen("bare", "8443", sa("direct"))
	dial := func(at string) func() (net.Conn, error) {
		return func() (net.Conn, error) { return m.Pod("client").Dial(b.Context(), "tcp", at) }
	}
	b.Run("tunnel", func(b *testing.B) { words(b, dial("10.88.0.12:8080")) })
	b.Run("inside", func(b *testing.B) { words(b, dial(atServer)) })
	b.Run("own", func(b *testing.B) {
		source, err := workloadapi.NewX509Source(b.Context(), socket)
		if err != nil {
			b.Fatal(err)
		}
		defer source.Close()
		config := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(sdkID("server")))
		words(b, func() (net.Conn, error) {
			c, err := dial(atSPIFFE)()
			if err != nil {
				return nil, err
			}
			return tls.Client(c, config), nil
		})
	})
	b.Run("direct", func(b *testing.B) { words(b, dial(vipDirect+":80")) })
}

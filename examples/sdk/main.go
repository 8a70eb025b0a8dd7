// Command sdk is a server and a client that take part in a mesh by themselves,
// with package sdk. SPIFFE_ENDPOINT_SOCKET says where the agent is.
//
//	sdk serve :8443                                               says hello to whom the policies let in
//	sdk call 10.0.0.7:8443 spiffe://mesh.example/ns/pay/sa/ledger  prints what it says
//
// serve-http and call-http do the same by HTTP, serve-grpc and call-grpc by gRPC.
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/sdk"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	servers := map[string]func(context.Context, *sdk.Mesh, string) error{
		"serve": serve, "serve-http": serveHTTP, "serve-grpc": serveGRPC,
	}
	clients := map[string]func(context.Context, *sdk.Mesh, string, spiffeid.ID) error{
		"call": call, "call-http": callHTTP, "call-grpc": callGRPC,
	}
	switch {
	case len(args) == 2 && servers[args[0]] != nil:
		m, err := sdk.Open(ctx)
		if err != nil {
			return err
		}
		defer m.Close()
		return servers[args[0]](ctx, m, args[1])
	case len(args) == 3 && clients[args[0]] != nil:
		server, err := spiffeid.FromString(args[2])
		if err != nil {
			return err
		}
		m, err := sdk.Open(ctx)
		if err != nil {
			return err
		}
		defer m.Close()
		return clients[args[0]](ctx, m, args[1], server)
	}
	return fmt.Errorf("usage: sdk serve[-http|-grpc] ADDRESS | sdk call[-http|-grpc] ADDRESS SPIFFE-ID")
}

func serve(ctx context.Context, m *sdk.Mesh, address string) error {
	l, err := m.Listen("tcp", address)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer l.Close()
	fmt.Println(m.ID(), "listens on", l.Addr())
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		go greet(c)
	}
}

func greet(c net.Conn) {
	defer c.Close()
	fmt.Fprintln(c, "hello", c.(*sdk.Conn).PeerID())
}

func call(ctx context.Context, m *sdk.Mesh, address string, server spiffeid.ID) error {
	c, err := m.Dial(ctx, "tcp", address, server)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = io.Copy(os.Stdout, c)
	return err
}

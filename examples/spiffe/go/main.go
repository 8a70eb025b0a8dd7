// Command go is a server and a client of mutual TLS by SPIFFE, with go-spiffe. Each
// says whom it wants at the other end, and follows renewals by itself.
// SPIFFE_ENDPOINT_SOCKET says where the agent is.
//
//	go serve 127.0.0.1:8443 spiffe://mesh.example/ns/pay/sa/billing  says hello to that client
//	go call 127.0.0.1:8443 spiffe://mesh.example/ns/pay/sa/ledger    prints what that server says, each second
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 3 || args[0] != "serve" && args[0] != "call" {
		return fmt.Errorf("usage: go serve|call ADDRESS SPIFFE-ID")
	}
	peer, err := spiffeid.FromString(args[2])
	if err != nil {
		return err
	}
	// Holds the newest certificate and roots, whatever is made of it below.
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	if args[0] == "serve" {
		return serve(args[1], tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(peer)))
	}
	for {
		if err := call(args[1], tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(peer))); err != nil {
			return err
		}
		time.Sleep(time.Second)
	}
}

func serve(address string, config *tls.Config) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println("listening on", l.Addr())
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			if err := greet(tls.Server(c, config)); err != nil {
				fmt.Fprintln(os.Stderr, "refused:", err)
			}
		}()
	}
}

func greet(c *tls.Conn) error {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if err := c.Handshake(); err != nil {
		return err
	}
	id, err := x509svid.IDFromCert(c.ConnectionState().PeerCertificates[0])
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(c, "hello", id)
	return err
}

func call(address string, config *tls.Config) error {
	c, err := tls.Dial("tcp", address, config)
	if err != nil {
		return err
	}
	defer c.Close()
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	fmt.Print(line)
	return nil
}

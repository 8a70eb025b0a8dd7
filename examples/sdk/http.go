package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/sdk"
)

// serveHTTP says hello to whom the policies let in.
func serveHTTP(ctx context.Context, m *sdk.Mesh, address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println(m.ID(), "listens on", l.Addr())
	return m.ServeHTTP(ctx, l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller, ok := sdk.PeerFromRequest(r)
		if !ok { // it did not come through the mesh
			http.Error(w, "who are you?", http.StatusForbidden)
			return
		}
		fmt.Fprintln(w, "hello", caller)
	}))
}

// callHTTP prints what a server says. The client is one of net/http, good for many
// requests.
func callHTTP(ctx context.Context, m *sdk.Mesh, address string, server spiffeid.ID) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address+"/", nil)
	if err != nil {
		return err
	}
	resp, err := m.HTTPClient(server).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(os.Stdout, resp.Body)
	return err
}

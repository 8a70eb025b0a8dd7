package main

import (
	"context"
	"flag"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/status"
)

// identities is what one look at the Workload API gives.
type identities struct {
	IDs   []string `json:"ids"`
	Code  string   `json:"code"` // of the answer, OK if there were identities
	Error string   `json:"error,omitempty"`
}

// askIdentity prints which identities this process is given on the agent's
// socket.
func askIdentity(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("identity", flag.ContinueOnError)
	timeout := f.Duration("timeout", 10*time.Second, "how long to wait for the answer")
	rest, err := parse(f, args)
	if err != nil {
		return err
	}
	if len(rest) != 1 {
		return fmt.Errorf("identity: give the socket's path; got %q", rest)
	}
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	out := identities{IDs: []string{}}
	svids, err := workloadapi.FetchX509SVIDs(ctx, workloadapi.WithAddr("unix://"+rest[0]))
	out.Code = status.Code(err).String()
	if err != nil {
		out.Error = err.Error()
	}
	for _, s := range svids {
		out.IDs = append(out.IDs, s.ID.String())
	}
	printLine(out)
	return nil
}

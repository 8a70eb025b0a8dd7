package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/test/harness"
)

// TestTokenClockJumps: the clock of the control plane, of the agent, or of both
// jumps while tokens are asked for and judged. Up to ten seconds nothing fails. By
// more, a token that is early or over by the clock of who judges is neither given
// out nor taken; the agent's log or the answer says that a time is the reason. When
// the clock is right again, all is well, and nothing was started anew.
//
// What it defends: that the agent looks at the times of a token that it gets, and
// of one that it judges, by the wall clock, each time.
func TestTokenClockJumps(t *testing.T) {
	cases := []struct {
		off   time.Duration
		moved []string
		fresh bool   // a token that is made meanwhile is given out, and taken
		held  string // why the token of before is refused; "": it is taken
		says  string // in the log of the mesh, why there is no fresh one
	}{
		{-10 * time.Second, []string{"agent"}, true, "", ""},
		{-5 * time.Minute, []string{"agent"}, false, "iat: issued at", "check the clocks"},
		{5 * time.Minute, []string{"control"}, false, "", "check the clocks"},
		{6 * time.Minute, []string{"agent", "control"}, true, "exp: expired at", ""},
	}
	if os.Getenv("SIGNET_TEST_LONG") != "" {
		cases = append(cases, []struct {
			off   time.Duration
			moved []string
			fresh bool
			held  string
			says  string
		}{
			{10 * time.Second, []string{"agent"}, true, "", ""},
			{10 * time.Second, []string{"control"}, true, "", ""},
			{-10 * time.Second, []string{"control"}, true, "", ""},
			{-10 * time.Second, []string{"agent", "control"}, true, "", ""},
			{6 * time.Minute, []string{"agent"}, false, "exp: expired at", "exp: expired at"},
			{-5 * time.Minute, []string{"control"}, false, "", "is before"},
			{-time.Hour, []string{"agent"}, false, "iat: issued at", "check the clocks"},
			{-time.Hour, []string{"control"}, false, "", "is before"},
			{-5 * time.Minute, []string{"agent", "control"}, false, "iat: issued at", "is before"},
		}...)
	}
	began := time.Now()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	m := harness.Start(t, harness.Options{Documents: map[string]string{"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", "enforce") + harness.Program("shop", "app", os.Geteuid(), exe)}})
	// Without a library: it would look at tokens by this program's clock.
	conn, err := grpc.NewClient("unix://"+filepath.Join(m.RunDir, "api", "agent.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := workload.NewSpiffeWorkloadAPIClient(conn)
	type token struct{ text, audience string }
	running, n := pids(m), 0
	fetch := func() (token, error) { // for an audience that no token is held for
		n++
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true"), 10*time.Second)
		defer cancel()
		audience := fmt.Sprintf("audience-%d", n)
		got, err := client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{audience}})
		if err != nil {
			return token{}, err
		}
		return token{got.GetSvids()[0].GetSvid(), audience}, nil
	}
	judge := func(k token) error {
		ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true"), 10*time.Second)
		defer cancel()
		_, err := client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: k.audience, Svid: k.text})
		return err
	}
	for _, c := range cases {
		t.Run(fmt.Sprintf("%s %s", strings.Join(c.moved, "+"), c.off), func(t *testing.T) {
			if c.off == -10*time.Second && c.moved[0] == "control" || len(c.moved) == 2 && c.off < 0 {
				time.Sleep(time.Until(began.Add(20 * time.Second))) // the first key of all signs from when it was made
			}
			held, err := fetch()
			if err != nil {
				t.Fatal(err)
			}
			before := len(m.Log())
			moveClocks(t, m, c.off, c.moved...)
			defer moveClocks(t, m, 0)
			switch err := judge(held); {
			case c.held == "" && err != nil:
				t.Errorf("the token of before: %v", err)
			case c.held != "" && (status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), c.held)):
				t.Errorf("the token of before: %v, want %q", err, c.held)
			}
			fresh, err := fetch()
			switch {
			case c.fresh && err != nil:
				t.Errorf("no new token: %v", err)
			case c.fresh:
				if err := judge(fresh); err != nil {
					t.Errorf("the new token: %v", err)
				}
			case status.Code(err) != codes.Unavailable:
				t.Errorf("a token whose time is wrong: %+v, %v", fresh, err)
			}
			m.Eventually(10*time.Second, "the log to say "+c.says, func() error {
				if said := m.Log()[before:]; !strings.Contains(said, c.says) {
					return errors.New(said)
				}
				return nil
			})
			moveClocks(t, m, 0)
			m.Eventually(resumeWithin, "a token with right clocks", func() error {
				again, err := fetch()
				if err == nil {
					err = judge(again)
				}
				return err
			})
			if err := judge(held); err != nil {
				t.Errorf("the token of before, with right clocks: %v", err)
			}
		})
	}
	if now := pids(m); now != running {
		t.Errorf("a process was started anew: %s, before %s", now, running)
	}
}

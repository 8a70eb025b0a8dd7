// Command goclient is a workload in Go, on go-spiffe.
//
// The commands, and the JSON lines that they print, are described in
// ../program_test.go; every language has the same. SPIFFE_ENDPOINT_SOCKET says
// where the Workload API is.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// patience is for what should take a second.
const patience = 20 * time.Second

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		say(line{Error: err.Error()})
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("no command")
	}
	switch command, args := args[0], args[1:]; {
	case command == "fetch":
		return fetch(ctx)
	case command == "watch" && len(args) == 1:
		wanted, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		return watch(ctx, wanted)
	case command == "serve":
		return serve(ctx, args)
	case command == "dial":
		return dialEach(ctx)
	case command == "jwt" && len(args) == 1:
		return jwt(ctx, args[0])
	case command == "validate":
		return validate(ctx)
	}
	return fmt.Errorf("no command %q", args)
}

// line is what is printed; a command uses some of it.
type line struct {
	ID         string   `json:"id,omitempty"`
	Chain      [][]byte `json:"chain,omitempty"`
	Roots      [][]byte `json:"roots,omitempty"`
	Leaf       []byte   `json:"leaf,omitempty"`
	Polls      int      `json:"polls,omitempty"`
	Gaps       []string `json:"gaps,omitempty"`
	Listening  string   `json:"listening,omitempty"`
	Server     string   `json:"server,omitempty"`
	Got        string   `json:"got,omitempty"`
	Token      string   `json:"token,omitempty"`
	Agent      string   `json:"agent,omitempty"`
	AgentError string   `json:"agentError,omitempty"`
	Local      string   `json:"local,omitempty"`
	LocalError string   `json:"localError,omitempty"`
	Error      string   `json:"error,omitempty"`
}

var printing sync.Mutex

func say(l line) {
	printing.Lock()
	defer printing.Unlock()
	_ = json.NewEncoder(os.Stdout).Encode(l)
}

func ders(certs []*x509.Certificate) (out [][]byte) {
	for _, c := range certs {
		out = append(out, c.Raw)
	}
	return out
}

func fetch(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	x, err := workloadapi.FetchX509Context(ctx)
	if err != nil {
		return err
	}
	svid := x.DefaultSVID()
	bundle, err := x.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		return err
	}
	say(line{ID: svid.ID.String(), Chain: ders(svid.Certificates), Roots: ders(bundle.X509Authorities())})
	return nil
}

func newSource(ctx context.Context) (*workloadapi.X509Source, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return workloadapi.NewX509Source(ctx)
}

func watch(ctx context.Context, wanted int) error {
	source, err := newSource(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	seen := map[string]bool{}
	last := line{}
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for {
		svid, err := source.GetX509SVID()
		if err != nil {
			return err
		}
		leaf := svid.Certificates[0]
		if !seen[leaf.SerialNumber.String()] {
			seen[leaf.SerialNumber.String()] = true
			say(line{Leaf: leaf.Raw})
		}
		if now := time.Now(); now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
			last.Gaps = append(last.Gaps, fmt.Sprint(leaf.SerialNumber, " at ", now))
		}
		if len(seen) == wanted {
			say(last)
			return nil
		}
		select {
		case <-source.Updated():
		case <-poll.C:
			last.Polls++
		}
	}
}

func serve(ctx context.Context, pairs []string) error {
	source, err := newSource(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	for ; len(pairs) >= 2; pairs = pairs[2:] {
		var ids []spiffeid.ID
		for id := range strings.SplitSeq(pairs[1], ",") {
			parsed, err := spiffeid.FromString(id)
			if err != nil {
				return err
			}
			ids = append(ids, parsed)
		}
		l, err := net.Listen("tcp", pairs[0])
		if err != nil {
			return err
		}
		defer l.Close()
		say(line{Listening: l.Addr().String()})
		go accept(l, tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeOneOf(ids...)))
	}
	_, err = io.Copy(io.Discard, os.Stdin) // until the test ends
	return err
}

func accept(l net.Listener, config *tls.Config) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			out := line{Server: l.Addr().String()}
			leaf, err := serveOne(tls.Server(c, config))
			if out.Leaf = leaf; err != nil {
				out.Error = err.Error()
			}
			say(out)
		}()
	}
}

func serveOne(c *tls.Conn) (leaf []byte, err error) {
	defer c.Close()
	if err := c.Handshake(); err != nil {
		return nil, err
	}
	if _, err := c.Write([]byte("hello")); err != nil {
		return nil, err
	}
	return c.ConnectionState().PeerCertificates[0].Raw, nil
}

func dialEach(ctx context.Context) error {
	source, err := newSource(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		address, expected, _ := strings.Cut(in.Text(), " ")
		out, err := dial(ctx, source, address, expected)
		if err != nil {
			out = line{Error: err.Error()}
		}
		say(out)
	}
	return in.Err()
}

func dial(ctx context.Context, source *workloadapi.X509Source, address, expected string) (line, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	id, err := spiffeid.FromString(expected)
	if err != nil {
		return line{}, err
	}
	d := tls.Dialer{Config: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(id))}
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return line{}, err
	}
	defer c.Close()
	state := c.(*tls.Conn).ConnectionState()
	got, err := io.ReadAll(c)
	return line{Leaf: state.PeerCertificates[0].Raw, Got: string(got)}, err
}

func jwt(ctx context.Context, audience string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience})
	if err != nil {
		return err
	}
	say(line{ID: svid.ID.String(), Token: svid.Marshal()})
	return nil
}

func validate(ctx context.Context) error {
	client, err := workloadapi.New(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	source, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClient(client))
	if err != nil {
		return err
	}
	defer source.Close()
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		token, audience, _ := strings.Cut(in.Text(), " ")
		var out line
		if svid, err := client.ValidateJWTSVID(ctx, token, audience); err != nil {
			out.AgentError = err.Error()
		} else {
			out.Agent = svid.ID.String()
		}
		if svid, err := jwtsvid.ParseAndValidate(token, source, []string{audience}); err != nil {
			out.LocalError = err.Error()
		} else {
			out.Local = svid.ID.String()
		}
		say(out)
	}
	return in.Err()
}

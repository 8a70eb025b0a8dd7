package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/mesh"
)

// controlArg is the first argument of the process that is the control plane.
const controlArg = "control"

// tick is the unit of CPU times in /proc.
const tick = 10 * time.Millisecond

var domain = spiffeid.RequireTrustDomainFromString("bench.example")

// where is what the control plane says of itself.
type where struct {
	Address string
	Root    []byte   // DER
	Tokens  []string // to join with, by node
}

func nodeName(i int) string { return fmt.Sprintf("node-%03d", i) }

// serveControl serves the node API for pods of its own service account each, until
// standard input ends.
func serveControl(ctx context.Context, args []string) error {
	f := flag.NewFlagSet(controlArg, flag.ContinueOnError)
	dir := f.String("dir", "", "")
	nodes := f.Int("nodes", 1, "")
	pods := f.Int("pods", 1, "")
	if err := f.Parse(args); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(io.Discard, nil)) //nolint:sloglint // lines are made as in a program that logs, and go nowhere
	authority, err := ca.Open(ca.Options{Dir: filepath.Join(*dir, "ca"), TrustDomain: domain, Log: log})
	if err != nil {
		return err
	}
	defer authority.Close()
	tokens, err := caserver.OpenTokens(filepath.Join(*dir, "tokens"))
	if err != nil {
		return err
	}
	say := where{Root: authority.Bundle()[0].Raw}
	state := &mesh.State{TrustDomain: domain, SVIDTTL: time.Hour, Namespaces: map[string]mesh.Mode{"bench": mesh.ModeEnforce}}
	for i := range *nodes {
		token, err := tokens.Create(nodeName(i), time.Hour)
		if err != nil {
			return err
		}
		say.Tokens = append(say.Tokens, token)
		for j := range *pods {
			account := fmt.Sprintf("app-%d-%d", i, j)
			state.Workloads = append(state.Workloads, mesh.Workload{
				Namespace: "bench", Name: account, ServiceAccount: account, Node: nodeName(i), UID: "uid-" + account,
				ID: spiffeid.RequireFromSegments(domain, "ns", "bench", "sa", account),
			})
		}
	}
	var feed mesh.Feed
	feed.Set(&mesh.View{Revision: "bench", State: state, Model: authz.NewModel(nil)})
	// The rate of one node is not what is measured.
	server, err := caserver.New(caserver.Config{Authority: authority, Feed: &feed, Tokens: tokens, Log: log, Rate: 1e9, Burst: 1e9})
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	say.Address = l.Addr().String()
	if err := json.NewEncoder(os.Stdout).Encode(say); err != nil {
		return err
	}
	g := grpc.NewServer(server.ServerOptions()...)
	nodev1.RegisterNodeServer(g, server)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); cancel() }()
	stopped := make(chan struct{})
	go func() { defer close(stopped); <-ctx.Done(); g.Stop() }()
	err = g.Serve(l)
	cancel()
	<-stopped
	return err
}

// control is a running control plane.
type control struct {
	where
	cmd *exec.Cmd
	in  io.Closer
}

// startControl starts one in a process of its own, on a number of processors; 0:
// all of them.
func startControl(ctx context.Context, dir string, processors, nodes, pods int) (*control, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", controlArg, "-dir", dir, "-nodes", strconv.Itoa(nodes), "-pods", strconv.Itoa(pods))
	cmd.Stderr = os.Stderr
	if processors > 0 {
		cmd.Env = append(os.Environ(), "GOMAXPROCS="+strconv.Itoa(processors))
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &control{cmd: cmd, in: in}
	line, err := bufio.NewReaderSize(out, 1<<20).ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &c.where)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("the control plane says nothing: %w", err), c.stop())
	}
	return c, nil
}

func (c *control) stop() error {
	_ = c.in.Close()
	return c.cmd.Wait()
}

// cpu is how long it has worked so far.
func (c *control) cpu() (time.Duration, error) { return cpuOf(strconv.Itoa(c.cmd.Process.Pid)) }

func cpuOf(pid string) (time.Duration, error) {
	data, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return 0, err
	}
	text := string(data)
	f := strings.Fields(text[strings.LastIndexByte(text, ')')+1:]) // the name before may hold anything
	if len(f) < 13 {
		return 0, fmt.Errorf("/proc/%s/stat: %q is not understood", pid, text)
	}
	user, err := strconv.ParseInt(f[11], 10, 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * tick, err
}

package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/test/cluster/internal/spec"
)

// ErrNotRunning is what Attach fails with when there is no cluster.
var ErrNotRunning = errors.New("no cluster is running")

// errPartial: a cluster was started, but not to the end.
var errPartial = errors.New("the cluster's start did not finish")

const stateFile = "cluster.json"

// state is what is recorded of a cluster before anything of it is made.
type state struct {
	// ID is part of the names of its cgroups.
	ID        string
	Nodes     int
	ProxyMode string
	Tools     tools
	// Port is that of the API server on 127.0.0.1.
	Port int
	// Machines are the control plane and the nodes, in this order.
	Machines []machineState
	// Complete: the start went to its end.
	Complete bool
}

// machineState is what stays the same of a machine.
type machineState struct {
	Name         string
	Addr4, Addr6 netip.Addr
	// Pods4 and Pods6 are the ranges of the node's pods; the control plane has
	// none.
	Pods4, Pods6 netip.Prefix
}

func newState(o Options, t tools) state {
	hash := sha256.Sum256([]byte(o.Dir))
	s := state{ID: hex.EncodeToString(hash[:4]), Nodes: o.Nodes, ProxyMode: o.ProxyMode, Tools: t}
	s.Machines = append(s.Machines, machineState{Name: "control",
		Addr4: netip.MustParseAddr("10.77.0.1"), Addr6: netip.MustParseAddr("fd77::1")})
	for i := 1; i <= o.Nodes; i++ {
		s.Machines = append(s.Machines, machineState{
			Name:  fmt.Sprintf("node%d", i),
			Addr4: netip.MustParseAddr(fmt.Sprintf("10.77.0.%d", 10+i)),
			Addr6: netip.MustParseAddr(fmt.Sprintf("fd77::%d", 10+i)),
			Pods4: netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", i)),
			Pods6: netip.MustParsePrefix(fmt.Sprintf("fd44:0:0:%d::/64", i)),
		})
	}
	return s
}

// cgroup is the cluster's, relative to the root of each hierarchy.
func (s state) cgroup() string { return "signet-cluster-" + s.ID }

func (o Options) complete() (Options, error) {
	if o.Nodes == 0 {
		o.Nodes = 2
	}
	if o.Nodes < 1 || o.Nodes > 9 {
		return o, fmt.Errorf("cluster: Nodes is %d: it must be from 1 to 9", o.Nodes)
	}
	switch o.ProxyMode {
	case "":
		o.ProxyMode = "nftables"
	case "nftables", "iptables":
	default:
		return o, fmt.Errorf("cluster: ProxyMode is %q: it must be nftables or iptables", o.ProxyMode)
	}
	if o.Dir == "" {
		root, err := projectRoot()
		if err != nil {
			return o, err
		}
		o.Dir = filepath.Join(root, ".cache", "cluster")
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return o, fmt.Errorf("cluster: %w", err)
	}
	o.Dir = dir
	return o, nil
}

// attach returns the cluster in o.Dir if it is there, whole, and as o wants it.
func attach(o Options, log *progress) (*Cluster, error) {
	c, err := load(o.Dir, log)
	if err != nil {
		return nil, err
	}
	if _, err := c.control().pid(); !c.state.Complete || err != nil {
		return c, errPartial
	}
	if c.state.Nodes != o.Nodes || c.state.ProxyMode != o.ProxyMode {
		return nil, fmt.Errorf("cluster: one with %d nodes and %s runs in %s: take it down first, or use the same options",
			c.state.Nodes, c.state.ProxyMode, o.Dir)
	}
	return c, nil
}

// load returns the cluster that is recorded in dir.
func load(dir string, log *progress) (*Cluster, error) {
	root, err := os.OpenRoot(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cluster: %w in %s", ErrNotRunning, dir)
	} else if err != nil {
		return nil, fmt.Errorf("cluster: %w", err)
	}
	defer root.Close()
	c := &Cluster{dir: dir, log: log}
	err = spec.Read(root, stateFile, &c.state)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cluster: %w in %s", ErrNotRunning, dir)
	} else if err != nil {
		return nil, fmt.Errorf("cluster: read the state in %s: %w", dir, err)
	}
	return c, nil
}

// save records the state.
func (c *Cluster) save() error {
	root, err := os.OpenRoot(c.dir)
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	defer root.Close()
	if err := spec.Write(root, stateFile, c.state); err != nil {
		return fmt.Errorf("cluster: write the state: %w", err)
	}
	return nil
}

// lock keeps other programs from changing the cluster in dir. It waits for them.
func lock(ctx context.Context, dir string) (unlock func(), err error) {
	path := filepath.Join(dir, "lock")
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, fmt.Errorf("cluster: lock: %w", err)
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			// Whoever had it may have removed the folder, and the file with it.
			var ours, there os.FileInfo
			if ours, err = f.Stat(); err == nil {
				if there, err = os.Stat(path); err == nil && os.SameFile(ours, there) {
					return func() { _ = f.Close() }, nil
				}
			}
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return nil, errors.Join(err, f.Close())
			}
		}
		if err := f.Close(); err != nil {
			return nil, fmt.Errorf("cluster: lock: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("cluster: waiting for another program to be done with %s: %w", dir, context.Cause(ctx))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

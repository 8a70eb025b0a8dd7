// Package cluster is a real Kubernetes cluster for tests, on one Linux machine:
// etcd, the API server, controllers and scheduler, and nodes with containerd,
// runc, CNI plugins, kubelet and kube-proxy. CoreDNS answers at 10.96.0.10.
//
// Every node, and the control plane, is a machine made of namespaces (network,
// mount, process, host name, IPC, cgroup) whose root is a folder, its disk. So
// /var, /etc/cni/net.d, /opt/cni/bin or any other path in a hostPath volume is
// the node's own; /run and /tmp are empty after each boot, the disk survives.
// /usr is that of the real machine, read-only. A pod with hostPID sees the
// processes of its node, one with hostNetwork the node's links.
//
//	        the API server's port on 127.0.0.1 of the real machine
//	                             |
//	control 10.77.0.1  fd77::1   |   etcd, kube-apiserver, ...; the bridge
//	node1   10.77.0.11 fd77::11  |   pods 10.244.1.0/24 fd44:0:0:1::/64
//	node2   10.77.0.12 fd77::12  |   pods 10.244.2.0/24 fd44:0:0:2::/64
//
// Services are 10.96.0.0/16 and fd96::/112. Nothing of this is in the network
// namespace of the real machine but the one listening socket.
//
// Images come from archives only: see LoadImage and WriteImage. There is no
// registry, so a pod needs imagePullPolicy IfNotPresent or Never.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// Options says what to start. The zero value is two nodes and kube-proxy in
// nftables mode.
type Options struct {
	// Dir holds everything of the cluster: state, disks, keys, logs. Empty
	// means .cache/cluster in the project. Two clusters need two folders.
	Dir string
	// Nodes is their number, from 1 to 9; 0 means 2. They are named node1,
	// node2 and so on.
	Nodes int
	// ProxyMode is kube-proxy's: "nftables", the default, or "iptables".
	ProxyMode string
	// Log gets lines of progress; nil means none are written.
	Log io.Writer
}

// Cluster is a running cluster. Its methods are safe for concurrent use, also
// from several processes.
type Cluster struct {
	dir   string
	state state
	log   *progress
}

// Start starts a cluster and returns when its nodes are ready and CoreDNS
// answers at each. If a cluster with the same Dir runs already, Start attaches
// to it, and powers on what is off; other options than it was started with are
// an error. The first Start on a machine builds Kubernetes, which takes ten
// minutes.
//
// The cluster does not end with the program that started it: call Down, or
// run clusterctl down. If ctx ends early, what was made is removed again.
func Start(ctx context.Context, o Options) (_ *Cluster, err error) {
	if o, err = o.complete(); err != nil {
		return nil, err
	}
	log := newProgress(o.Log)
	tools, err := prepareTools(ctx, log)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("cluster: %w", err)
	}
	unlock, err := lock(ctx, o.Dir)
	if err != nil {
		return nil, err
	}
	defer unlock()

	c, err := attach(o, log)
	switch {
	case err == nil:
		return c, c.powerOn(ctx)
	case errors.Is(err, errPartial):
		log.say("removing what an interrupted start left")
		if err := c.remove(ctx); err != nil {
			return nil, err
		}
	case !errors.Is(err, ErrNotRunning):
		return nil, err
	}

	c = &Cluster{dir: o.Dir, log: log, state: newState(o, tools)}
	if err := c.bringUp(ctx); err != nil {
		// A cancelled start still has to clear up.
		clear, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		return nil, errors.Join(fmt.Errorf("cluster: start: %w", err), c.remove(clear))
	}
	return c, nil
}

// Attach returns the cluster in dir (empty: as in Options), whatever its
// options, without changing it. It fails with ErrNotRunning if there is none.
func Attach(dir string, log io.Writer) (*Cluster, error) {
	o, err := Options{Dir: dir, Log: log}.complete()
	if err != nil {
		return nil, err
	}
	c, err := load(o.Dir, newProgress(log))
	if err != nil {
		return nil, err
	}
	if !c.state.Complete {
		return nil, fmt.Errorf("cluster: %w: the start did not finish: take it down and start again", ErrNotRunning)
	}
	return c, nil
}

// Down removes the cluster in dir (empty: as in Options), also one that was
// started half or whose starter was killed. It leaves no process, mount, link,
// namespace, cgroup or file; built programs stay. No cluster is no error.
func Down(ctx context.Context, dir string, log io.Writer) error {
	o, err := Options{Dir: dir, Log: log}.complete()
	if err != nil {
		return err
	}
	if _, err := os.Stat(o.Dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	unlock, err := lock(ctx, o.Dir)
	if err != nil {
		return err
	}
	defer unlock()
	c, err := load(o.Dir, newProgress(log))
	if errors.Is(err, ErrNotRunning) {
		return nil
	} else if err != nil {
		return err
	}
	return c.remove(ctx)
}

// Down removes the cluster: see the function Down.
func (c *Cluster) Down(ctx context.Context) error { return Down(ctx, c.dir, c.log.w) }

// Kubeconfig returns the path of a kubeconfig file of a cluster administrator,
// for programs in the network namespace in which Start was called.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.dir, "kubeconfig") }

// Server returns the API server's URL in that kubeconfig.
func (c *Cluster) Server() string { return fmt.Sprintf("https://127.0.0.1:%d", c.state.Port) }

// Kubectl returns kubectl with its arguments, as a cluster administrator. It
// works in any network namespace.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) *exec.Cmd {
	// It runs in the control plane's network namespace, but with the file
	// system of the caller.
	pid, err := c.control().pid()
	argv := append([]string{"netns", fmt.Sprint(pid), c.state.Tools.program("kubectl"),
		"--kubeconfig", filepath.Join(c.dir, "kubeconfig-control")}, args...)
	cmd := exec.CommandContext(ctx, c.state.Tools.Machine, argv...)
	cmd.Err = errors.Join(cmd.Err, err)
	return cmd
}

// Nodes returns all nodes in the order of their names.
func (c *Cluster) Nodes() []*Node {
	nodes := make([]*Node, 0, len(c.state.Machines)-1)
	for i := range c.state.Machines[1:] {
		nodes = append(nodes, &Node{cluster: c, machine: c.machine(i + 1)})
	}
	return nodes
}

// Node returns the node with a name, such as "node1", or nil.
func (c *Cluster) Node(name string) *Node {
	for _, n := range c.Nodes() {
		if n.Name() == name {
			return n
		}
	}
	return nil
}

// LoadImage imports an image archive (a tar file as docker save writes it, or
// an OCI layout as tar) into every node that is on.
func (c *Cluster) LoadImage(ctx context.Context, archive string) error {
	return c.eachNode(func(n *Node) error {
		if !n.Running() {
			return nil
		}
		return n.LoadImage(ctx, archive)
	})
}

// DialContext connects from the control plane's network namespace, which
// routes to nodes and pods but has no Service addresses: see Node.DialContext
// for those. addr must hold a literal IP address.
func (c *Cluster) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	return c.control().dial(ctx, network, addr)
}

// StopControlPlane ends Kubernetes' own control plane: API server, controllers,
// scheduler and etcd. Nodes and their pods go on. It returns when all ended.
func (c *Cluster) StopControlPlane(ctx context.Context) error {
	return c.control().setServices(ctx, nil)
}

// StartControlPlane starts it again with the data that it had, and returns when
// the API server is ready.
func (c *Cluster) StartControlPlane(ctx context.Context) error {
	return c.startControlPlane(ctx)
}

// Programs returns the folder with Kubernetes' programs, kubectl among them.
func (c *Cluster) Programs() string { return c.state.Tools.Bin }

package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
)

// Node is one node of a cluster. Its methods are safe for concurrent use.
type Node struct {
	cluster *Cluster
	machine *machine
}

// Name returns the node's name in Kubernetes, which is also its host name.
func (n *Node) Name() string { return n.machine.Name }

// Addr returns the node's IPv4 address.
func (n *Node) Addr() netip.Addr { return n.machine.Addr4 }

// PodCIDR returns the IPv4 range of the node's pods.
func (n *Node) PodCIDR() netip.Prefix { return n.machine.Pods4 }

// Command returns a command that runs inside of the node, in all of its
// namespaces and below its root, with the environment that a node has. The
// program is looked up in the node's PATH, which has kubectl, ctr, crictl's
// place taken by ctr -n k8s.io, nft, ip and whatever else is in the real
// machine's /usr. If ctx ends, it is killed; other processes that it started
// stay until the node is off.
func (n *Node) Command(ctx context.Context, argv ...string) *exec.Cmd {
	return n.machine.command(ctx, argv...)
}

// Root returns a path on the real machine below which the node's files are, for
// reading and writing: Root() + "/run/x" is the node's /run/x. It is good until
// the node is off; absolute symbolic links in it lead astray.
func (n *Node) Root() (string, error) {
	pid, err := n.machine.pid()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("/proc/%d/root", pid), nil
}

// Disk returns the folder with the node's disk, which is there also while the
// node is off. It has no /run.
func (n *Node) Disk() string { return n.machine.disk() }

// NetNS returns the path of the node's network namespace. It is good until the
// node is off.
func (n *Node) NetNS() (string, error) {
	pid, err := n.machine.pid()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("/proc/%d/ns/net", pid), nil
}

// DialContext connects from the node's network namespace, where Service
// addresses, node ports and pods are reached. addr must hold a literal IP
// address.
func (n *Node) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	return n.machine.dial(ctx, network, addr)
}

// LoadImage imports an image archive into the node: see Cluster.LoadImage.
func (n *Node) LoadImage(ctx context.Context, archive string) error {
	f, err := os.Open(archive)
	if err != nil {
		return fmt.Errorf("cluster: %s: load image: %w", n.Name(), err)
	}
	defer f.Close()
	cmd := n.Command(ctx, "ctr", "-n", "k8s.io", "images", "import", "--all-platforms", "-")
	cmd.Stdin = f
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cluster: %s: load image %s: %w: %s", n.Name(), archive, err, out)
	}
	return nil
}

// Running reports whether the node is on.
func (n *Node) Running() bool {
	_, err := n.machine.pid()
	return err == nil
}

// PowerOff cuts the node's power: all of its processes are killed at once, and
// its network namespaces, /run and /tmp are gone. Its disk stays. A node that
// is off is no error.
func (n *Node) PowerOff(ctx context.Context) error {
	unlock, err := lock(ctx, n.cluster.dir)
	if err != nil {
		return err
	}
	defer unlock()
	return n.machine.kill(ctx)
}

// PowerOn starts the node with the disk that it has, and returns when containerd
// answers and kubelet and kube-proxy were started; the API server need not run.
// See WaitReady for more. A node that is on is no error.
func (n *Node) PowerOn(ctx context.Context) error {
	unlock, err := lock(ctx, n.cluster.dir)
	if err != nil {
		return err
	}
	defer unlock()
	return n.cluster.bootNode(ctx, n)
}

// Reboot is PowerOff and PowerOn.
func (n *Node) Reboot(ctx context.Context) error {
	if err := n.PowerOff(ctx); err != nil {
		return err
	}
	return n.PowerOn(ctx)
}

// WaitReady waits until the API server says that the node is ready, and that
// because of its present kubelet rather than of the one before a reboot.
func (n *Node) WaitReady(ctx context.Context) error { return n.cluster.waitReady(ctx, n) }

// StopService ends one of the node's own services: containerd, kubelet or
// kube-proxy. It stays ended until StartService or a reboot. Pods go on.
func (n *Node) StopService(ctx context.Context, name string) error {
	return n.machine.changeServices(ctx, func(running []string) ([]string, error) {
		return without(running, name), nil
	})
}

// StartService starts a service that StopService ended.
func (n *Node) StartService(ctx context.Context, name string) error {
	return n.machine.changeServices(ctx, func(running []string) ([]string, error) {
		for _, s := range nodeServices {
			if s == name {
				return append(without(running, name), name), nil
			}
		}
		return nil, errors.New("no such service: " + name)
	})
}

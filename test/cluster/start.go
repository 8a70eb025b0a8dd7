package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/signet-mesh/signet/test/cluster/internal/spec"
)

// How long the parts of a start may take.
const (
	controlPlaneWait = 90 * time.Second
	containerdWait   = 60 * time.Second
	readyWait        = 2 * time.Minute
)

// bringUp starts a cluster where there is none.
func (c *Cluster) bringUp(ctx context.Context) error {
	listener, port, err := listen(0)
	if err != nil {
		return err
	}
	defer listener.Close()
	c.state.Port = port
	if err := c.save(); err != nil {
		return err
	}
	if err := c.configure(); err != nil {
		return err
	}
	c.log.say("starting the control plane and %d nodes", c.state.Nodes)
	if err := c.control().boot(ctx, listener); err != nil {
		return err
	}
	if err := c.makeBridge(); err != nil {
		return err
	}
	if err := c.writeImages(); err != nil {
		return err
	}
	err = all(
		func() error {
			if err := c.startControlPlane(ctx); err != nil {
				return err
			}
			c.log.say("the API server is ready")
			return c.apply(ctx)
		},
		func() error {
			return c.eachNode(func(n *Node) error { return c.bootNode(ctx, n) })
		},
		func() error {
			return c.eachNode(func(n *Node) error { return c.loadOwnImages(ctx, n) })
		})
	if err != nil {
		return err
	}
	if err := c.waitAll(ctx); err != nil {
		return err
	}
	c.state.Complete = true
	return c.save()
}

// powerOn starts what of a complete cluster is off.
func (c *Cluster) powerOn(ctx context.Context) error {
	if err := c.startControlPlane(ctx); err != nil {
		return err
	}
	if err := c.eachNode(func(n *Node) error { return c.bootNode(ctx, n) }); err != nil {
		return err
	}
	return c.waitAll(ctx)
}

func (c *Cluster) startControlPlane(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, controlPlaneWait, fmt.Errorf("after %s", controlPlaneWait))
	defer cancel()
	if err := c.control().setServices(ctx, c.controlPrograms()); err != nil {
		return err
	}
	return poll(ctx, 200*time.Millisecond, func() error {
		if out, err := c.Kubectl(ctx, "get", "--raw", "/readyz").CombinedOutput(); err != nil {
			return fmt.Errorf("the API server is not ready: %w: %s", err, bytes.TrimSpace(out))
		}
		return nil
	})
}

// bootNode starts a node that is off.
func (c *Cluster) bootNode(ctx context.Context, n *Node) error {
	if n.Running() {
		return nil
	}
	if err := n.machine.boot(ctx, nil); err != nil {
		return err
	}
	if err := c.plug(n.machine); err != nil {
		return errors.Join(err, n.machine.kill(ctx))
	}
	services := c.nodePrograms(n.machine)
	// kubelet gives up without containerd, and is started again a second later.
	if err := n.machine.setServices(ctx, services[:1]); err != nil {
		return err
	}
	if err := n.waitContainerd(ctx); err != nil {
		return err
	}
	return n.machine.setServices(ctx, services)
}

func (n *Node) waitContainerd(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, containerdWait, fmt.Errorf("after %s", containerdWait))
	defer cancel()
	return poll(ctx, 50*time.Millisecond, func() error {
		root, err := n.Root()
		if err != nil {
			return err
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", root+"/run/containerd/containerd.sock")
		if err != nil {
			return fmt.Errorf("%s: containerd does not answer: %w", n.Name(), err)
		}
		return conn.Close()
	})
}

// writeImages makes the archives of the cluster's own images.
func (c *Cluster) writeImages() error {
	dir := filepath.Join(c.dir, "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	for _, image := range []Image{
		{Name: "cluster.test/pause:1", Programs: map[string]string{"pause": c.state.Tools.Pause}, Entrypoint: []string{"/pause"}},
		{Name: "cluster.test/coredns:1", Programs: map[string]string{"coredns": c.state.Tools.program("coredns")}, Entrypoint: []string{"/coredns"}},
	} {
		if err := WriteImage(filepath.Join(dir, image.Entrypoint[0]+".tar"), image); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) loadOwnImages(ctx context.Context, n *Node) error {
	if err := n.waitContainerd(ctx); err != nil {
		return err
	}
	for _, name := range []string{"pause.tar", "coredns.tar"} {
		if err := n.LoadImage(ctx, filepath.Join(c.dir, "images", name)); err != nil {
			return err
		}
	}
	return nil
}

// apply makes the objects that the cluster itself consists of.
func (c *Cluster) apply(ctx context.Context) error {
	objects, err := render("objects.yaml", map[string]any{"Nodes": c.state.Machines[1:], "Replicas": min(2, c.state.Nodes)})
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("after 30 s"))
	defer cancel()
	// The namespace kube-system is made a little after the server is ready.
	return poll(ctx, 200*time.Millisecond, func() error {
		cmd := c.Kubectl(ctx, "apply", "--server-side", "--force-conflicts", "-f", "-")
		cmd.Stdin = bytes.NewReader(objects)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("make the cluster's objects: %w: %s", err, out)
		}
		return nil
	})
}

// waitAll waits until every node is ready and CoreDNS answers there.
func (c *Cluster) waitAll(ctx context.Context) error {
	if err := c.eachNode(func(n *Node) error { return c.waitReady(ctx, n) }); err != nil {
		return err
	}
	c.log.say("%d nodes are ready", c.state.Nodes)
	err := c.eachNode(func(n *Node) error {
		ctx, cancel := context.WithTimeoutCause(ctx, readyWait, fmt.Errorf("after %s", readyWait))
		defer cancel()
		return poll(ctx, 200*time.Millisecond, func() error { return n.askDNS(ctx) })
	})
	if err != nil {
		return err
	}
	c.log.say("CoreDNS answers")
	return nil
}

// askDNS asks CoreDNS, by its Service, for the API server.
func (n *Node) askDNS(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return n.DialContext(ctx, network, net.JoinHostPort(dnsAddr, "53"))
	}}
	const name = "kubernetes.default.svc.cluster.local."
	addrs, err := r.LookupHost(ctx, name)
	if err == nil && !slices.Contains(addrs, "10.96.0.1") {
		err = fmt.Errorf("%s is %s", name, addrs)
	}
	if err != nil {
		return fmt.Errorf("CoreDNS, asked on %s: %w", n.Name(), err)
	}
	return nil
}

// waitReady waits until the present boot of a node is ready.
func (c *Cluster) waitReady(ctx context.Context, n *Node) error {
	ctx, cancel := context.WithTimeoutCause(ctx, readyWait, fmt.Errorf("after %s", readyWait))
	defer cancel()
	return poll(ctx, 300*time.Millisecond, func() error {
		record, err := n.machine.record()
		if err != nil {
			return err
		}
		out, err := c.Kubectl(ctx, "get", "node", n.Name(), "-o", "json").Output()
		if err != nil {
			return fmt.Errorf("look at %s: %w", n.Name(), err)
		}
		var node struct {
			Status struct {
				NodeInfo   struct{ BootID string }
				Conditions []struct{ Type, Status, Message string }
			}
		}
		if err := json.Unmarshal(out, &node); err != nil {
			return err
		}
		why := "kubelet has not said anything yet"
		for _, condition := range node.Status.Conditions {
			if condition.Type != "Ready" || node.Status.NodeInfo.BootID != record.BootID {
				continue
			}
			if condition.Status == "True" {
				return nil
			}
			why = condition.Message
		}
		return fmt.Errorf("%s is not ready: %s; logs are in %s", n.Name(), why, filepath.Join(n.machine.dir, spec.LogDir))
	})
}

func (c *Cluster) eachNode(f func(*Node) error) error {
	var fs []func() error
	for _, n := range c.Nodes() {
		fs = append(fs, func() error { return f(n) })
	}
	return all(fs...)
}

// all runs functions at the same time and returns their errors.
func all(fs ...func() error) error {
	errs := make([]error, len(fs))
	var wait sync.WaitGroup
	for i, f := range fs {
		wait.Go(func() { errs[i] = f() })
	}
	wait.Wait()
	return errors.Join(errs...)
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	cniversion "github.com/containernetworking/cni/pkg/version"

	v1 "github.com/signet-mesh/signet/api/cni/v1"
)

// plugin does what the CNI_ variables say. 0.3.0 is 0.3.1 with a mistake in
// its document.
func plugin() *types.Error {
	return skel.PluginMainFuncsWithError(skel.CNIFuncs{
		Add: add, Check: check, Del: del,
		Status: status, GC: func(*skel.CmdArgs) error { return nil },
	}, cniversion.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"), "signet-cni "+version+": holds pods until the mesh has captured them")
}

// conf is the plugin's entry in a conflist, with what the runtime adds.
type conf struct {
	types.PluginConf
	Socket       string `json:"socket"`
	OwnNamespace string `json:"ownNamespace"`
	Timeout      string `json:"timeout"`

	timeout time.Duration
}

const (
	defaultTimeout = 25 * time.Second
	maxTimeout     = 90 * time.Second // runtimes give up after two minutes
)

func parse(stdin []byte) (*conf, error) {
	c := &conf{Socket: v1.DefaultSocket, timeout: defaultTimeout}
	bad := func(format string, args ...any) (*conf, error) {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "signet: the entry of signet-cni in the node's CNI configuration: "+fmt.Sprintf(format, args...), "")
	}
	if err := json.Unmarshal(stdin, c); err != nil {
		return bad("%v", err)
	}
	if !filepath.IsAbs(c.Socket) {
		return bad("socket %q: use an absolute path, such as %s", c.Socket, v1.DefaultSocket)
	}
	if c.Timeout != "" {
		d, err := time.ParseDuration(c.Timeout)
		if err != nil || d < time.Second || d > maxTimeout {
			return bad("timeout %q: use a duration from 1s to %s", c.Timeout, maxTimeout)
		}
		c.timeout = d
	}
	if err := cniversion.ParsePrevResult(&c.PluginConf); err != nil {
		return bad("prevResult: %v", err)
	}
	return c, nil
}

// pod reads which pod a call is about from CNI_ARGS, as kubelet's runtimes
// set it, and checks that no field is there twice.
func pod(args *skel.CmdArgs) (v1.Pod, error) {
	p := v1.Pod{ContainerID: args.ContainerID, NetNS: args.Netns}
	bad := func(format string, a ...any) error {
		return types.NewError(types.ErrInvalidEnvironmentVariables, "signet: CNI_ARGS: "+fmt.Sprintf(format, a...), "")
	}
	for pair := range strings.SplitSeq(args.Args, ";") {
		key, value, _ := strings.Cut(pair, "=")
		to := map[string]*string{"K8S_POD_NAMESPACE": &p.Namespace, "K8S_POD_NAME": &p.Name, "K8S_POD_UID": &p.UID}[key]
		if to == nil || value == "" {
			continue
		}
		if *to != "" && *to != value {
			return v1.Pod{}, bad("%s is there twice, as %q and %q", key, *to, value)
		}
		*to = value
	}
	switch {
	case p.Namespace == "" || p.Name == "":
		return v1.Pod{}, bad("K8S_POD_NAMESPACE or K8S_POD_NAME is missing, so this call is about no pod of Kubernetes; take signet-cni out of the configuration of this network")
	case p.UID == "":
		return v1.Pod{}, bad("K8S_POD_UID is missing, so pod %s/%s cannot be told from another of the same name; use a container runtime that sets it (containerd 1.6 or CRI-O 1.20, or newer)", p.Namespace, p.Name)
	}
	return p, nil
}

func add(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	if c.PrevResult == nil {
		return types.NewError(types.ErrInvalidNetworkConfig, "signet: signet-cni gives pods no interfaces; put its entry last, after the plugin that does", "")
	}
	p, err := pod(args)
	if err != nil {
		return err
	}
	if p.IPs, err = addresses(c.PrevResult); err != nil {
		return err
	}
	if !c.own(p) {
		ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
		defer cancel()
		if _, err := ask(ctx, c.Socket, v1.PathAdd, p); err != nil {
			return types.NewError(types.ErrTryAgainLater, "signet: "+err.Error(), "")
		}
	}
	return types.PrintResult(c.PrevResult, c.CNIVersion)
}

// own says whether the pod is the release's own, which never waits, even when
// no agent runs: else a node on which everything starts anew would not come up.
func (c *conf) own(p v1.Pod) bool {
	return c.OwnNamespace != "" && p.Namespace == c.OwnNamespace
}

func addresses(prev types.Result) ([]netip.Addr, error) {
	r, err := current.NewResultFromResult(prev)
	if err != nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "signet: prevResult: "+err.Error(), "")
	}
	var out []netip.Addr
	for _, ip := range r.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			out = append(out, a.Unmap())
		}
	}
	return out, nil
}

func check(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	p, err := pod(args)
	if err != nil {
		return err
	}
	if c.own(p) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
	defer cancel()
	if _, err := ask(ctx, c.Socket, v1.PathCheck, p); err != nil {
		return types.NewError(types.ErrTryAgainLater, "signet: "+err.Error(), "")
	}
	return nil
}

// del tells the agent, which would notice by itself a little later. Nothing
// keeps a pod from being deleted: not an agent that is away, nor a call that
// is not understood.
func del(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return nil
	}
	p, err := pod(args)
	if err != nil || c.own(p) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), min(c.timeout, 2*time.Second))
	defer cancel()
	_, _ = askOnce(ctx, c.Socket, v1.PathDel, p) // see above
	return nil
}

// status says whether the configuration is right, and does not ask the agent.
// A runtime that hears of trouble here reports the node's network as not
// ready; then no pod with an address of its own is placed there, the control
// plane neither, without which the agent cannot become ready.
func status(args *skel.CmdArgs) error {
	_, err := parse(args.StdinData)
	return err
}

// away is said when nobody listens on the socket.
func away(socket string, err error) error {
	return fmt.Errorf("the agent on this node does not answer on %s; the pod waits (is DaemonSet signet-agent running?): %w", socket, err)
}

// errAnswer is what the agent answered in place of a result.
type errAnswer struct{ text string }

func (e errAnswer) Error() string { return e.text }

// refused says whether err is the agent's own answer.
func refused(err error) bool {
	var a errAnswer
	return errors.As(err, &a)
}

// Package ztunnel runs Istio's ztunnel, the other program that speaks this
// mesh's wire, inside a pod of the lab: for the tests that both understand each
// other and for measuring side by side. It is run without Istio, with its
// built-in test authority and a file of workloads.
package ztunnel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/internal/mesh"
)

// TrustDomain is that of the built-in authority.
const TrustDomain = "cluster.local"

// readyPort answers on every address of the pod once the proxy is ready.
const readyPort = 15021

// Workload is one that a ztunnel knows.
type Workload struct {
	Namespace, Name string
	// ServiceAccount names its identity, as in this mesh.
	ServiceAccount string
	Addr           netip.Addr
}

// ID is the workload's SPIFFE ID.
func (w Workload) ID() string {
	return "spiffe://" + TrustDomain + "/ns/" + w.Namespace + "/sa/" + w.ServiceAccount
}

// Allow admits identities to every workload of a namespace. As soon as a
// namespace has one, all others are refused there.
type Allow struct {
	Namespace, Name string
	// From are the callers; their service accounts count.
	From []Workload
}

// WriteConfig writes the file that a ztunnel starts from: JSON, which is YAML.
func WriteConfig(path string, workloads []Workload, policies []Allow) error {
	type object = map[string]any
	config := object{"workloads": []object{}, "policies": []object{}}
	for _, w := range workloads {
		config["workloads"] = append(config["workloads"].([]object), object{
			"uid":  "cluster1//v1/Pod/" + w.Namespace + "/" + w.Name,
			"name": w.Name, "namespace": w.Namespace, "serviceAccount": w.ServiceAccount,
			"trustDomain": TrustDomain, "workloadIps": []netip.Addr{w.Addr},
			"protocol": "HBONE", "node": w.Name, "network": "",
			"services": object{},
		})
	}
	for _, p := range policies {
		var from []object
		for _, w := range p.From {
			from = append(from, object{"namespace": w.Namespace, "serviceAccount": w.ServiceAccount})
		}
		config["policies"] = append(config["policies"].([]object), object{
			"name": p.Name, "namespace": p.Namespace, "action": "Allow", "scope": "Namespace", "dryRun": false,
			"rules": [][][]object{{{{"serviceAccounts": from}}}},
		})
	}
	data, err := json.MarshalIndent(config, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o644)
}

// Proxy is a running ztunnel.
type Proxy struct {
	cmd  *lab.Cmd
	done chan struct{}
	err  error // why it ended; read after done is closed
	once sync.Once
}

// Start captures the pod's traffic with this mesh's own rules, which use the
// ports and the mark that ztunnel uses too, runs the program in the pod, and
// waits until it is ready. Its output goes to log. The caller stops it.
func Start(ctx context.Context, program string, pod *lab.Pod, w Workload, config string, log io.Writer) (*Proxy, error) {
	if err := capture.Apply(pod.NetNS, capture.Options{}); err != nil {
		return nil, err
	}
	// Not ctx: Stop ends it, after whoever still talks through it.
	cmd := pod.Command(context.WithoutCancel(ctx), program)
	cmd.Env = append(os.Environ(),
		"FAKE_CA=true",
		"PROXY_MODE=dedicated",
		"PROXY_WORKLOAD_INFO="+w.Namespace+"/"+w.Name+"/"+w.ServiceAccount,
		"PACKET_MARK="+strconv.Itoa(mesh.SocketMark),
		"LOCAL_XDS_PATH="+config,
		"XDS_ADDRESS=",
		"NODE_NAME="+w.Name,
		"ENABLE_ORIG_SRC=false",
		"IPV6_ENABLED=false",
	)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &Proxy{cmd: cmd, done: make(chan struct{})}
	go func() { p.err = cmd.Wait(); close(p.done) }()
	if err := p.ready(ctx, pod); err != nil {
		p.Stop()
		return nil, err
	}
	return p, nil
}

// Pid is the process id.
func (p *Proxy) Pid() int { return p.cmd.Process.Pid }

// Stop kills the process and waits for it.
func (p *Proxy) Stop() {
	p.once.Do(func() { _ = p.cmd.Process.Kill() })
	<-p.done
}

func (p *Proxy) ready(ctx context.Context, pod *lab.Pod) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DialContext: pod.Dial, DisableKeepAlives: true}}
	url := fmt.Sprintf("http://127.0.0.1:%d/healthz/ready", readyPort)
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		res, err := client.Do(req)
		if err == nil {
			_ = res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return nil
			}
			err = errors.New(res.Status)
		}
		select {
		case <-p.done:
			return fmt.Errorf("ztunnel in pod %s ended: %w", pod.Name, p.err)
		case <-ctx.Done():
			return fmt.Errorf("ztunnel in pod %s is not ready: %w", pod.Name, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

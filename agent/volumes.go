package agent

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/attest"
	"github.com/signet-mesh/signet/agent/csi"
	"github.com/signet-mesh/signet/internal/mesh"
)

// VolumesDir keeps the volumes that pods have mounted.
func VolumesDir(run string) string { return filepath.Join(run, "csi") }

// volumeConfig is what the driver of volumes works with.
func volumeConfig(cfg Config) csi.Config {
	return csi.Config{
		Version: cfg.Version, Node: cfg.Node, Kubelet: cfg.Pods.Kubelet,
		Dir: VolumesDir(cfg.RunDir), API: filepath.Dir(WorkloadSocket(cfg.RunDir)), Log: cfg.Log,
	}
}

// serveVolumes serves volumes until ctx ends. Whatever keeps it from that, the rest
// of the agent goes on.
func (a *agent) serveVolumes(ctx context.Context) {
	const again = 5 * time.Second
	for {
		err := a.volumes.Run(ctx)
		if ctx.Err() != nil {
			return
		}
		a.log.Error("serving volumes; no pod can mount one meanwhile", "driver", csi.Name, "error", err, "retry", again)
		select {
		case <-ctx.Done():
			return
		case <-time.After(again):
		}
	}
}

// volumeAgent is the agent as the driver of volumes sees it; it implements
// csi.Agent.
type volumeAgent struct{ *agent }

// Pod implements csi.Agent.
func (a volumeAgent) Pod(namespace, uid string) (*mesh.Workload, error) {
	a.mu.Lock()
	s := a.state
	a.mu.Unlock()
	if s == nil {
		return nil, csi.ErrUnknown
	}
	if w := s.pod(uid); w != nil {
		return w, nil
	}
	switch {
	case s.excluded[uid]:
		return nil, fmt.Errorf("the pod has opted out of the mesh (annotation signet.dev/mesh), and so it has no identity")
	case s.enrolled[namespace]:
		return nil, csi.ErrUnknown
	}
	return nil, fmt.Errorf("namespace %s is not in the mesh, and so its pods have no identity: annotate it with signet.dev/mesh=observe or enforce", namespace)
}

// SignalPod implements csi.Agent.
func (a volumeAgent) SignalPod(ctx context.Context, uid, program string, signal unix.Signal) (int, error) {
	return attest.SignalPod(ctx, uid, program, signal)
}

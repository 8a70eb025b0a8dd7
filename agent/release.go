package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/agent/csi"
	"github.com/signet-mesh/signet/agent/netns"
	"github.com/signet-mesh/signet/agent/probe"
	"github.com/signet-mesh/signet/internal/proxy/instance"
)

// ReleaseNode lets every pod of this node go, when the mesh is removed from
// the cluster: pods keep running, without the mesh, and nothing of it stays on
// the node. No agent may run meanwhile. It does as much as it can and returns
// what it could not.
func ReleaseNode(cfg Config) error {
	store, err := netns.Open(PinDir(cfg.RunDir), "/proc/1/ns/net")
	if err != nil {
		return err
	}
	pins, err := store.List()
	errs := []error{err}
	for _, pin := range pins {
		if err := capture.Remove(pin.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("pod %s: %w", pin.UID, err))
			continue // pinned, it can be tried again
		}
		errs = append(errs, store.Unpin(pin.UID))
	}
	errs = append(errs, new(probe.Node).Remove())
	if cfg.Pods != nil && cfg.Pods.Kubelet != "" {
		errs = append(errs, csi.Remove(volumeConfig(cfg)))
	}
	cfg.Log.Info("pods released", "count", len(pins))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	// The roots that it joined with, too, and where its sockets were.
	errs = []error{empty(cfg.StateDir), os.RemoveAll(PinDir(cfg.RunDir)), os.RemoveAll(filepath.Dir(WorkloadSocket(cfg.RunDir)))}
	if err := os.Remove(cfg.Bundle); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	removeEmpty(cfg)
	return nil
}

// proxiesEnd is how long the node's proxies may take to see that no other comes,
// and to end.
const proxiesEnd = 30 * time.Second

// removeEmpty removes the directories themselves, once the proxies are gone. They
// are mounts here, and ordinary directories to the node's first process. What
// is not empty stays.
func removeEmpty(cfg Config) {
	for end := time.Now().Add(proxiesEnd); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if living, err := instance.List(cfg.RunDir); err == nil && len(living) == 0 {
			break
		}
	}
	dirs := []string{instance.Root(cfg.RunDir), cfg.RunDir, cfg.StateDir, filepath.Dir(cfg.StateDir)}
	if cfg.Pods != nil && cfg.Pods.Kubelet != "" {
		dirs = append(dirs, filepath.Join(cfg.Pods.Kubelet, "plugins", csi.Name))
	}
	for _, dir := range dirs {
		err := unix.Rmdir(filepath.Join("/proc/1/root", dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			cfg.Log.Info("a directory stays on the node", "dir", dir, "error", err)
		}
	}
}

// empty removes what is in a directory, which may be a mount itself.
func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	errs := []error{err}
	for _, e := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}

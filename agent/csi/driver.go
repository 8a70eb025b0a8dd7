// Package csi is the node's driver of CSI volumes named csi.signet.dev: a pod that
// mounts one finds its certificate, key and trust bundle in files, kept up to date
// while it runs, or the socket of the Workload API.
//
// Whose certificate that is follows from which pod kubelet mounts for, and from
// what the control plane says about that pod; nothing that the pod's author writes
// changes it. A volume is mounted with everything in it, or not at all.
package csi

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/refusal"
	"github.com/signet-mesh/signet/agent/svid"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Name is the driver's, as pods write it.
const Name = "csi.signet.dev"

// ErrUnknown says that a pod may be one of this node's that has not been heard of
// yet.
var ErrUnknown = errors.New("the agent does not know this pod yet; the volume is tried again (does signet-control run, and does this node reach it? a pod with hostNetwork has no identity)")

// Agent is what the driver needs of the agent. All methods are called
// concurrently, and none blocks.
type Agent interface {
	// Pod returns the workload that the pod with the UID is, by the last known
	// state; ErrUnknown if it may become one soon.
	Pod(namespace, uid string) (*mesh.Workload, error)
	// SignalPod sends a signal to the processes of a pod that run a program.
	SignalPod(ctx context.Context, uid, program string, signal unix.Signal) (sent int, err error)
}

// SVIDs has the node's certificates; *svid.Manager implements it.
type SVIDs interface {
	Get(id spiffeid.ID) (*svid.SVID, bool)
	Bundle() []*x509.Certificate
	Changed() <-chan struct{}
}

// Config is what a Driver needs to know.
type Config struct {
	// Version of the program, for kubelet.
	Version string
	// Node is the node's name.
	Node string
	// Kubelet is kubelet's directory, such as /var/lib/kubelet. Its pods'
	// directories are below it, and so are the driver's sockets.
	Kubelet string
	// Dir keeps the volumes; nobody but the agent may enter it.
	Dir string
	// API is the directory with the Workload API's socket.
	API string
	// Wait is how long a volume waits for its pod and certificate before kubelet
	// is told to come again; 10 seconds if zero.
	Wait time.Duration
	// Refused hears of pods that get no volume since they have no identity, or not
	// the one that is asked for, and must not block. Nil: nobody does.
	Refused func(refusal.Refusal)
	Log     *slog.Logger
}

// Driver keeps the volumes of one node.
type Driver struct {
	cfg   Config
	agent Agent
	svids SVIDs
	store store

	mu      sync.Mutex            // held while anything is mounted, unmounted or written
	mounted map[string]*publishes // guarded by mu; by volume id
}

// publishes is one mounted volume. Driver.mu guards it.
type publishes struct {
	*volume
	written *svid.SVID          // whose files are there; nil: not known, or none
	bundle  []*x509.Certificate // of the files
	expires time.Time           // of the files; zero: there are none
	said    string              // the newest trouble that was logged
}

// New returns a driver. Run takes up what an earlier one left.
func New(cfg Config, agent Agent, svids SVIDs) *Driver {
	if cfg.Wait == 0 {
		cfg.Wait = 10 * time.Second
	}
	return &Driver{cfg: cfg, agent: agent, svids: svids, store: store{cfg.Dir}, mounted: map[string]*publishes{}}
}

// pods is kubelet's directory of pods.
func (d *Driver) pods() string { return filepath.Join(d.cfg.Kubelet, "pods") }

// Count returns how many volumes are mounted, and how many of them hold no
// certificate, because it has expired without another.
func (d *Driver) Count() (all, empty int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range d.mounted {
		if p.Content == contentFiles && p.expires.IsZero() {
			empty++
		}
	}
	return len(d.mounted), empty
}

// identity waits until the pod is known, and, for files, has a certificate. Then
// the pod is what kubelet says, by the control plane's word.
func (d *Driver) identity(ctx context.Context, v *volume) error {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.Wait)
	defer cancel()
	for {
		_, err := d.certificate(v)
		if err == nil || !errors.Is(err, ErrUnknown) && !errors.Is(err, errPending) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// errPending says that a pod's certificate is not there yet.
var errPending = errors.New("its certificate is not there yet; the volume is tried again (see `signet certs`)")

// errNobody says that a pod has no identity now.
var errNobody = errors.New("no identity")

// refusedError says that a pod is refused, for good.
type refusedError struct {
	kind refusal.Kind
	error
}

func (e *refusedError) Unwrap() error { return e.error }

// certificate returns what a volume's files are made of; nil for a socket.
func (d *Driver) certificate(v *volume) (*svid.SVID, error) {
	w, err := d.agent.Pod(v.Namespace, v.UID)
	switch {
	case err != nil:
		err = fmt.Errorf("%w: %w", errNobody, err)
		if errors.Is(err, ErrUnknown) {
			return nil, err
		}
		return nil, &refusedError{refusal.Stranger, err}
	case w.UID != v.UID || w.Namespace != v.Namespace || w.Name != v.Pod || w.ServiceAccount != v.Account:
		return nil, &refusedError{refusal.NotItsOwn, fmt.Errorf("the control plane knows pod %s as %s/%s with service account %s, and not as %s/%s with service account %s",
			v.UID, w.Namespace, w.Name, w.ServiceAccount, v.Namespace, v.Pod, v.Account)}
	case v.Content == contentSocket:
		return nil, nil
	}
	s, ok := d.svids.Get(w.ID)
	if !ok || len(d.svids.Bundle()) == 0 {
		return nil, fmt.Errorf("%s: %w", w.ID, errPending)
	}
	return s, nil
}

// publish mounts a volume, or takes it as it is when it is mounted already.
func (d *Driver) publish(ctx context.Context, v *volume) error {
	t, err := parseTarget(d.pods(), v.Target)
	if err != nil {
		return err
	}
	if err := d.identity(ctx, v); err != nil {
		return fmt.Errorf("pod %s/%s: %w", v.Namespace, v.Pod, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if p := d.mounted[v.ID]; p != nil {
		if p.UID != v.UID || p.Target != v.Target {
			return fmt.Errorf("volume %s is mounted already, for pod %s on %s", v.ID, p.UID, p.Target)
		}
		if *p.volume == *v { // otherwise an agent of another version wrote it down
			whole, err := d.whole(p.volume)
			if err != nil || whole {
				return err
			}
		}
	}
	if err := d.clean(v.ID, t); err != nil {
		return err
	}
	p, err := d.make(v, t)
	if err != nil {
		return errors.Join(err, d.clean(v.ID, t))
	}
	d.mounted[v.ID] = p
	d.cfg.Log.Info("volume mounted", "volume", v.ID, "pod", v.Namespace+"/"+v.Pod, "uid", v.UID, "content", v.Content)
	return nil
}

// make mounts a volume with all that belongs into it. The caller holds mu.
func (d *Driver) make(v *volume, t target) (*publishes, error) {
	p := &publishes{volume: v}
	if err := d.store.put(v); err != nil {
		return nil, err
	}
	source := d.cfg.API
	if v.Content == contentFiles {
		if err := d.store.mount(v.ID); err != nil {
			return nil, err
		}
		source = d.store.filesOf(v.ID)
		if _, err := d.write(p); err != nil {
			return nil, err
		}
	} else if _, err := os.Stat(source); err != nil {
		return nil, fmt.Errorf("the Workload API: %w", err)
	}
	return p, t.attach(source)
}

// clean takes away a volume, whatever of it there is. The caller holds mu.
func (d *Driver) clean(id string, t target) error {
	err := errors.Join(t.detach(), d.store.remove(id))
	if err == nil {
		delete(d.mounted, id)
	}
	return err
}

// unpublish takes a volume away. One that is not there is no error, nor one that
// nobody remembers.
func (d *Driver) unpublish(id, path string) error {
	t, err := parseTarget(d.pods(), path)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if p := d.mounted[id]; p != nil && p.Target != path {
		return fmt.Errorf("volume %s is mounted on %s, and not on %s", id, p.Target, path)
	}
	if err := d.clean(id, t); err != nil {
		return err
	}
	d.cfg.Log.Info("volume unmounted", "volume", id, "target", path)
	return nil
}

// whole reports whether all of a volume is mounted.
func (d *Driver) whole(v *volume) (bool, error) {
	t, err := parseTarget(d.pods(), v.Target)
	if err != nil {
		return false, err
	}
	there, err := t.mounted()
	if err != nil || !there || v.Content != contentFiles {
		return there, err
	}
	return d.store.mounted(v.ID)
}

// restore takes up the volumes that an earlier agent mounted, and takes away what
// is of no use any more.
func (d *Driver) restore() error {
	if err := os.MkdirAll(d.cfg.Dir, 0o700); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	volumes, unknown, err := d.store.list()
	if err != nil {
		return err
	}
	for _, v := range volumes {
		whole, err := d.whole(v)
		if err == nil && !whole {
			// It never was, or its pod is gone. If not, kubelet asks for it again.
			unknown = append(unknown, v.ID)
			continue
		}
		if err != nil {
			d.cfg.Log.Error("looking at a volume of an earlier agent", "volume", v.ID, "error", err)
		}
		d.mounted[v.ID] = &publishes{volume: v, expires: d.expiry(v)}
	}
	for _, id := range unknown {
		if err := d.store.remove(id); err != nil {
			d.cfg.Log.Error("removing what is left of a volume", "volume", id, "error", err)
		}
	}
	d.cfg.Log.Info("volumes taken up", "count", len(d.mounted), "removed", len(unknown))
	return nil
}

// Remove takes all volumes of this node away, when the mesh is removed from the
// cluster. Containers that run keep what they see until they end.
func Remove(cfg Config) error {
	d := New(cfg, nil, nil)
	volumes, unknown, err := d.store.list()
	errs := []error{err}
	for _, v := range volumes {
		t, err := parseTarget(d.pods(), v.Target)
		if err == nil {
			err = t.detach()
		}
		errs = append(errs, err)
		unknown = append(unknown, v.ID)
	}
	for _, id := range unknown {
		errs = append(errs, d.store.remove(id))
	}
	errs = append(errs, os.RemoveAll(cfg.Dir))
	for _, socket := range []string{d.registrar(), d.socket()} { // of an agent that was killed
		errs = append(errs, absent(os.Remove(socket)))
	}
	return errors.Join(errs...)
}

// same reports whether two lists hold the same certificates.
func same(a, b []*x509.Certificate) bool {
	return slices.EqualFunc(a, b, (*x509.Certificate).Equal)
}

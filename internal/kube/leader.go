package kube

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/federation"
)

const (
	leaseName       = "signet-control"
	bundleConfigMap = "signet-bundle"
	bundleKey       = "bundle.pem"
	fieldManager    = "signet-control"
	refreshBundle   = 10 * time.Minute // also without a change: somebody may have deleted it
)

// Leader is the replica that writes: status, events, and the trust bundle.
// Serving needs no leader.
type Leader struct {
	Client    *Client
	Namespace string   // of the release
	Identity  string   // of this replica; empty: the host's name
	Watcher   *Watcher // whose objects get a status
	// Reports is what the nodes of the mesh say, whichever replica they are
	// connected to.
	Reports func() []caserver.NodeReport
	// Federations says how the following of other trust domains goes; nil: none
	// is followed.
	Federations func() []federation.Status
	// Bundle returns the trust domain's roots, and a channel that is closed
	// when they are no longer current.
	Bundle func() ([]*x509.Certificate, <-chan struct{})
	Log    *slog.Logger
}

// Run takes part in the election until ctx ends, and writes while it leads. It
// returns when it has stopped writing.
func (l *Leader) Run(ctx context.Context) error {
	identity := l.Identity
	if identity == "" {
		var err error
		if identity, err = os.Hostname(); err != nil {
			return fmt.Errorf("kube: name this replica: %w", err)
		}
	}
	for ctx.Err() == nil {
		var term term
		elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
			Lock: &resourcelock.LeaseLock{
				LeaseMeta:  metav1.ObjectMeta{Name: leaseName, Namespace: l.Namespace},
				Client:     l.Client.Core.CoordinationV1(),
				LockConfig: resourcelock.ResourceLockConfig{Identity: identity},
			},
			Name: leaseName, ReleaseOnCancel: true,
			LeaseDuration: 15 * time.Second, RenewDeadline: 10 * time.Second, RetryPeriod: 2 * time.Second,
			Callbacks: leaderelection.LeaderCallbacks{
				OnStartedLeading: func(ctx context.Context) { term.run(func() { l.lead(ctx) }) },
				OnStoppedLeading: func() {},
				OnNewLeader: func(id string) {
					l.Log.InfoContext(ctx, "the replica that writes status", "replica", id)
				},
			},
		})
		if err != nil {
			return fmt.Errorf("kube: leader election: %w", err)
		}
		elector.Run(ctx)
		term.end()
	}
	return nil
}

// term is one time as leader. client-go starts its callback in a goroutine that
// it does not wait for; end does.
type term struct {
	mu      sync.Mutex
	over    bool // guarded by mu
	running sync.WaitGroup
}

func (t *term) run(f func()) {
	t.mu.Lock()
	if t.over {
		t.mu.Unlock()
		return
	}
	t.running.Add(1)
	t.mu.Unlock()
	defer t.running.Done()
	f()
}

func (t *term) end() {
	t.mu.Lock()
	t.over = true
	t.mu.Unlock()
	t.running.Wait()
}

// lead writes until ctx ends.
func (l *Leader) lead(ctx context.Context) {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { l.publish(ctx); return nil })
	g.Go(func() error { newStatusWriter(l).run(ctx); return nil })
	_ = g.Wait() // neither fails
}

// publish keeps the trust bundle that nodes join with.
func (l *Leader) publish(ctx context.Context) {
	for {
		roots, changed := l.Bundle()
		var text strings.Builder
		for _, c := range roots {
			_ = pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // into memory
		}
		again := refreshBundle
		if _, err := l.Client.Core.CoreV1().ConfigMaps(l.Namespace).Apply(ctx,
			applycorev1.ConfigMap(bundleConfigMap, l.Namespace).WithData(map[string]string{bundleKey: text.String()}),
			metav1.ApplyOptions{FieldManager: fieldManager, Force: true}); err != nil && ctx.Err() == nil {
			l.Log.ErrorContext(ctx, "the trust bundle could not be published; it is tried again", "error", err)
			again = 2 * time.Second
		}
		select {
		case <-changed:
		case <-time.After(again):
		case <-ctx.Done():
			return
		}
	}
}

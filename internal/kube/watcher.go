package kube

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/mesh"
)

// quiet is the least time between two states. The first change after a quiet
// time is acted on at once.
const quiet = 50 * time.Millisecond

// Watcher follows the API server and says what the mesh is.
type Watcher struct {
	client *Client
	log    *slog.Logger

	core    informers.SharedInformerFactory
	objects dynamicinformer.DynamicSharedInformerFactory
	caches
	configs, policies, quarantines, federations cache.Indexer

	synced map[string]func() bool // by resource
	warned map[string]bool        // services whose port was skipped; the loop's own

	mu      sync.Mutex
	pending *dirty        // guarded by mu
	wake    chan struct{} // has room for one

	latest atomic.Pointer[snapshot]
	nodes  atomic.Pointer[nodes]
	steps  atomic.Pointer[[]caserver.Step]
}

// nodes is who says how far namespaces have come into the mesh.
type nodes struct {
	reports func() []caserver.NodeReport // of the nodes that are connected here
	others  func() [][]caserver.Step     // of each other replica
}

// snapshot is what the newest view was made of. It is immutable.
type snapshot struct {
	view      *mesh.View
	documents *documents
	faults    []string // of the MeshConfig
	refuses   bool     // all that is revoked is refused in the view
	history   *history
	changing  map[string]mesh.Mode // namespaces that join or leave -> the mode to come
	notices   map[string]string    // namespaces whose annotation is no mode
}

// NewWatcher returns a Watcher. It makes no request before Run.
func NewWatcher(client *Client, log *slog.Logger) (*Watcher, error) {
	w := &Watcher{
		client: client, log: log,
		core:    informers.NewSharedInformerFactory(client.Core, 0),
		objects: dynamicinformer.NewDynamicSharedInformerFactory(client.Objects, 0),
		synced:  map[string]func() bool{}, warned: map[string]bool{},
		pending: newDirty(), wake: make(chan struct{}, 1),
	}
	mark := func(pick func(*dirty) set) func(any) {
		return func(obj any) {
			if key, err := cache.DeletionHandlingMetaNamespaceKeyFunc(obj); err == nil {
				w.mark(func(d *dirty) { pick(d).add(key) })
			}
		}
	}
	endpoints := w.core.Discovery().V1().EndpointSlices().Informer()
	if err := endpoints.AddIndexers(cache.Indexers{byService: sliceIndexer}); err != nil {
		return nil, fmt.Errorf("kube: %w", err)
	}
	document := func(any) { w.mark(func(d *dirty) { d.documents = true }) }
	object := func(resource string) cache.SharedIndexInformer {
		return w.objects.ForResource(v1alpha1.Resource(resource)).Informer()
	}
	for _, k := range []struct {
		resource  string
		informer  cache.SharedIndexInformer
		store     *cache.Indexer
		transform cache.TransformFunc
		changed   func(any)
	}{
		{"namespaces", w.core.Core().V1().Namespaces().Informer(), &w.namespaceStore, stripNamespace, mark(func(d *dirty) set { return d.namespaces })},
		{"pods", w.core.Core().V1().Pods().Informer(), &w.podStore, stripPod, mark(func(d *dirty) set { return d.pods })},
		{"services", w.core.Core().V1().Services().Informer(), &w.serviceStore, stripService, mark(func(d *dirty) set { return d.services })},
		{"endpointslices", endpoints, &w.sliceStore, stripSlice, w.sliceChanged},
		{"meshconfigs", object("meshconfigs"), &w.configs, typed[v1alpha1.MeshConfig], document},
		{"allowpolicies", object("allowpolicies"), &w.policies, typed[v1alpha1.AllowPolicy], document},
		{"quarantines", object("quarantines"), &w.quarantines, typed[v1alpha1.Quarantine], document},
		{"federations", object("federations"), &w.federations, typed[v1alpha1.Federation], document},
	} {
		*k.store = k.informer.GetIndexer()
		if err := k.informer.SetTransform(k.transform); err != nil {
			return nil, fmt.Errorf("kube: %s: %w", k.resource, err)
		}
		if err := k.informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, _ *cache.Reflector, err error) {
			w.log.WarnContext(ctx, "watch failed; it is tried again", "resource", k.resource, "error", err)
		}); err != nil {
			return nil, fmt.Errorf("kube: %s: %w", k.resource, err)
		}
		handler, err := k.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    k.changed,
			UpdateFunc: func(old, now any) { k.changed(old); k.changed(now) },
			DeleteFunc: k.changed,
		})
		if err != nil {
			return nil, fmt.Errorf("kube: %s: %w", k.resource, err)
		}
		w.synced[k.resource] = handler.HasSynced
	}
	return w, nil
}

// FollowNodes lets namespaces with running pods join and leave in steps from now
// on, by what the nodes report that are connected to this replica, and by which
// steps each other replica has taken. Before, they do so at once.
func (w *Watcher) FollowNodes(reports func() []caserver.NodeReport, others func() [][]caserver.Step) {
	w.nodes.Store(&nodes{reports, others})
}

// Steps is how far this replica has taken namespaces into the mesh, sorted by
// name. It is not edited later.
func (w *Watcher) Steps() []caserver.Step {
	if steps := w.steps.Load(); steps != nil {
		return *steps
	}
	return nil
}

func (w *Watcher) mark(change func(*dirty)) {
	w.mu.Lock()
	change(w.pending)
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *Watcher) sliceChanged(obj any) {
	if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = gone.Obj
	}
	if s, ok := obj.(*discoveryv1.EndpointSlice); ok {
		if services, _ := sliceIndexer(s); len(services) == 1 { // it returns none
			w.mark(func(d *dirty) { d.services.add(services[0]) })
		}
	}
}

// Run watches until ctx ends. It calls accept with every new view, first when
// all caches have synced and the MeshConfig is good, and reject with what of
// the newest objects is not in force; calls do not overlap. A MeshConfig that
// is lost, or edited to something that is not good or to another trust domain,
// leaves its last good settings in force, and everything else goes on.
func (w *Watcher) Run(ctx context.Context, accept func(*mesh.View), reject func(lines ...string)) error {
	ctx, cancel := context.WithCancel(ctx)
	w.core.Start(ctx.Done())
	w.objects.Start(ctx.Done())
	defer func() {
		cancel()
		w.core.Shutdown()
		w.objects.Shutdown()
	}()
	if !w.sync(ctx) {
		return nil
	}
	w.log.InfoContext(ctx, "caches synced", "namespaces", len(w.namespaceStore.ListKeys()), "pods", len(w.podStore.ListKeys()), "services", len(w.serviceStore.ListKeys()))
	f := &follower{watcher: w, accept: accept, reject: reject, history: &history{}}
	for {
		if wait := time.Until(f.last.Add(quiet)); wait > 0 {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return nil
			}
		}
		w.mu.Lock()
		d := w.pending
		w.pending = newDirty()
		w.mu.Unlock()
		f.step(ctx, d)
		var look <-chan time.Time
		if f.index != nil && len(f.index.turns) > 0 || f.revoked.pending() {
			look = time.After(lookAtTurns)
		}
		select {
		case <-w.wake:
		case <-look:
		case <-ctx.Done():
			return nil
		}
	}
}

// sync waits for all caches and says which are missing.
func (w *Watcher) sync(ctx context.Context) bool {
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	said := time.Now()
	for {
		var missing []string
		for resource, synced := range w.synced {
			if !synced() {
				missing = append(missing, resource)
			}
		}
		if len(missing) == 0 {
			return true
		}
		if time.Since(said) > 10*time.Second {
			said = time.Now()
			w.log.WarnContext(ctx, "waiting for the API server; are the CRDs installed, and may the service account list and watch them?", "resources", missing)
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			return false
		}
	}
}

// follower is the state of one Run.
type follower struct {
	watcher   *Watcher
	accept    func(*mesh.View)
	reject    func(lines ...string)
	last      time.Time // of the last view
	index     *index    // nil before the first good MeshConfig
	settings  settings
	documents *documents
	revoked   revocations
	faults    []string   // of the MeshConfig
	told      []string   // the faults that the newest view came with
	view      *mesh.View // the newest
	history   *history
}

// step brings everything up to date with what changed.
func (f *follower) step(ctx context.Context, d *dirty) {
	w := f.watcher
	changed := false
	if d.documents || f.documents == nil {
		before, was := f.documents, f.settings
		f.read()
		if f.settings.td.IsZero() {
			f.reject(f.faults...)
			return // what is pending is found by everything, later
		}
		if f.index == nil {
			f.index = newIndex(w.caches, f.settings.td, func(s *corev1.Service, port int32) {
				if id := fmt.Sprint(s.UID, port); !w.warned[id] {
					w.warned[id] = true
					w.log.WarnContext(ctx, "port belongs to the mesh itself and is left out of the service", "service", s.Namespace+"/"+s.Name, "port", port)
				}
			})
			d = f.index.everything()
		}
		f.documents.compile(f.settings.td)
		changed = before == nil || f.view == nil || before.sum != f.documents.sum || was != f.settings || !slices.Equal(f.told, f.faults)
	}
	if f.index == nil {
		return
	}
	changed = f.revoked.look(time.Now()) || changed
	if nodes := w.nodes.Load(); nodes != nil {
		f.index.gradual = f.view != nil // what was there at the start is not on its way
		f.index.advance(d, nodes.reports(), nodes.others(), time.Now())
	}
	if f.index.update(d) || changed {
		f.last = time.Now()
		f.view = f.index.view(f.settings, f.documents, &f.revoked)
		f.history = f.history.add(f.view)
		f.accept(f.view)
		if f.told = f.faults; len(f.told) > 0 {
			f.reject(f.told...)
		}
	}
	f.index.saw(f.view) // a step may be one that changes nothing
	if steps := f.index.steps(); !slices.Equal(steps, w.Steps()) {
		w.steps.Store(&steps)
	}
	w.latest.Store(&snapshot{view: f.view, documents: f.documents, faults: f.faults, refuses: !f.revoked.pending(), history: f.history, changing: f.index.changing(), notices: f.index.notices()})
}

// read takes the objects of signet.dev from their caches.
func (f *follower) read() {
	w := f.watcher
	docs := &documents{}
	for _, obj := range w.configs.List() {
		if c := obj.(*v1alpha1.MeshConfig); c.Name == v1alpha1.MeshConfigName {
			docs.config = c
		}
	}
	for _, obj := range w.policies.List() {
		docs.policies = append(docs.policies, *obj.(*v1alpha1.AllowPolicy))
	}
	for _, obj := range w.quarantines.List() {
		docs.quarantines = append(docs.quarantines, *obj.(*v1alpha1.Quarantine))
	}
	docs.federations.docs = listFederations(w.federations)
	f.documents, f.faults = docs, nil
	if docs.config == nil {
		f.faults = []string{fmt.Sprintf("MeshConfig %q is missing; it has to name the trust domain", v1alpha1.MeshConfigName)}
		return
	}
	s, faults := parseConfig(docs.config)
	// A mistake in a revocation is said, and keeps no other setting out of force.
	for _, fault := range slices.Concat(faults, f.revoked.read(&docs.config.Spec, time.Now())) {
		f.faults = append(f.faults, fmt.Sprintf("MeshConfig %q: %s", v1alpha1.MeshConfigName, fault))
	}
	switch {
	case len(faults) > 0:
	case !f.settings.td.IsZero() && s.td != f.settings.td:
		f.faults = append(f.faults, fmt.Sprintf("MeshConfig %q: spec.trustDomain: the mesh runs as %q; a trust domain cannot be edited, start a new mesh for %q",
			v1alpha1.MeshConfigName, f.settings.td.Name(), s.td.Name()))
	default:
		f.settings = s
	}
}

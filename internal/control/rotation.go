package control

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/mesh"
)

const (
	// lookAtRoots is how often it is looked whether a rotation can go on.
	lookAtRoots = 200 * time.Millisecond
	// quietTime is for how long nothing may stand against a step before it is
	// taken: an answer that was under way has arrived by then.
	quietTime = 2 * time.Second
	// staleReport is how old a node's report may be. Nodes report every 5 s.
	staleReport = 15 * time.Second
	// hurriedQuiet is quietTime, and hurriedStep the longest that a step waits for
	// anybody, while a distrusted root is still published.
	hurriedQuiet = 500 * time.Millisecond
	hurriedStep  = 15 * time.Second
	// retryRotation is how soon a step that failed is tried again.
	retryRotation = 10 * time.Second
)

// rotation replaces the root: it publishes the next one, waits until everything
// on every node trusts it, has it sign, waits until nothing uses a certificate of
// the old one, and withdraws that. Where it stands is kept by the authority, so it
// goes on after a restart.
type rotation struct {
	authority *ca.Authority
	above     *ca.Enrolment // nil: the root is the mesh's own
	view      func() *mesh.View
	reports   func() []caserver.NodeReport
	// present lists the nodes that exist; nil: whoever has called does.
	present func() []string
	// declared: operators say in the MeshConfig that the root is to be replaced,
	// where the API server checks who may.
	declared bool
	log      *slog.Logger
	now      func() time.Time
	// outsiders says what the next root's signing waits for outside the mesh;
	// empty: nothing. Nil: nobody outside trusts its roots.
	outsiders func(now time.Time) string

	mu     sync.Mutex
	forced bool                  // guarded by mu; the next step does not wait
	stage  adminv1.RotationStage // guarded by mu; when it was last looked
	since  time.Time             // guarded by mu; of the stage
	clear  time.Time             // guarded by mu; since when nothing stands against the next step; zero: something does
	failed time.Time             // guarded by mu; when a step failed last
	err    error                 // guarded by mu; how
}

// run takes steps until ctx ends.
func (r *rotation) run(ctx context.Context) {
	tick := time.NewTicker(lookAtRoots)
	defer tick.Stop()
	for {
		r.step(r.now())
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// stageOf names where a rotation stands.
func stageOf(roots []ca.Root) adminv1.RotationStage {
	stage := adminv1.RotationIdle
	for _, root := range roots {
		switch root.Role {
		case ca.RootNext:
			return adminv1.RotationPublishing
		case ca.RootFormer:
			stage = adminv1.RotationRetiring
		}
	}
	return stage
}

// step takes the next step if nothing stands against it.
func (r *rotation) step(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Sub(r.failed) < retryRotation && r.err != nil {
		return
	}
	roots := r.authority.Roots()
	stage := stageOf(roots)
	if stage != r.stage {
		r.stage, r.since = stage, now
	}
	if v := r.view(); v != nil && r.before(v.State.RootDistrustedBefore, now) && !slices.Contains(r.authority.Distrusted(), roots[0].Fingerprint) {
		r.took(r.authority.DistrustRoot(), now)
		return
	}
	if stage == adminv1.RotationIdle {
		r.forced, r.clear, r.err = false, time.Time{}, nil
		if r.above != nil {
			return // it puts the next root into the store
		}
		if why := r.due(now); why != "" {
			r.log.Info("the root is to be replaced", "reason", why)
			r.took(r.authority.PrepareRoot(), now)
		}
		return
	}
	if r.hurries(roots) && now.Sub(r.since) >= hurriedStep {
		if !r.forced {
			r.log.Warn("a distrusted root waits for nobody any longer; nodes that are behind are cut off", "stage", stage)
		}
		r.forced = true
	}
	if !r.forced {
		for _, n := range r.nodes(roots, now) {
			if n.Waits != "" {
				r.clear = time.Time{}
				return
			}
		}
		if r.outside(stage, now) != "" {
			r.clear = time.Time{}
			return
		}
		if r.clear.IsZero() {
			r.clear = now
		}
		if now.Sub(r.clear) < r.quiet(stage, roots) {
			return
		}
	}
	r.forced, r.clear = false, time.Time{}
	if stage == adminv1.RotationPublishing {
		r.took(r.authority.SwitchRoot(), now)
	} else {
		r.took(r.authority.RetireRoots(), now)
	}
}

// outside says what a step waits for outside the mesh; empty: nothing.
func (r *rotation) outside(stage adminv1.RotationStage, now time.Time) string {
	if r.outsiders == nil || stage != adminv1.RotationPublishing {
		return ""
	}
	return r.outsiders(now)
}

// due says why the root is to be replaced now; empty: it is not.
func (r *rotation) due(now time.Time) string {
	if due, ok := r.authority.RootDue(); ok && !now.Before(due) {
		return "two thirds of its life are over"
	}
	if v := r.view(); v != nil && r.before(v.State.RootNotBefore, now) {
		return "it was made before spec.rootNotBefore of the MeshConfig"
	}
	return ""
}

// wanted says why the authority above is to have another root than the one that
// signs; empty: it is not.
func (r *rotation) wanted(root *x509.Certificate) string {
	if !root.Equal(r.authority.Bundle()[0]) {
		return "" // another replica has stored it, and this one follows
	}
	return r.due(r.now())
}

// before reports whether the root was made before an instant that has come.
func (r *rotation) before(limit, now time.Time) bool {
	limit = limit.Truncate(time.Second) // as certificates have it
	return !limit.IsZero() && !now.Before(limit) && r.authority.RootMade().Before(limit)
}

// quiet is for how long nothing may stand against the next step. A tunnel takes
// new connections for less than half of the life of the certificate that it was
// opened with, so a root goes only after that.
func (r *rotation) quiet(stage adminv1.RotationStage, roots []ca.Root) time.Duration {
	if r.hurries(roots) {
		return hurriedQuiet // nodes end tunnels themselves
	}
	if stage != adminv1.RotationRetiring {
		return quietTime
	}
	ttl := ca.DefaultTTL
	if v := r.view(); v != nil && v.State.SVIDTTL > 0 {
		ttl = v.State.SVIDTTL
	}
	return quietTime + ttl/2
}

// hurries reports whether a root is published that is distrusted.
func (r *rotation) hurries(roots []ca.Root) bool {
	distrusted := r.authority.Distrusted()
	return slices.ContainsFunc(roots, func(root ca.Root) bool { return slices.Contains(distrusted, root.Fingerprint) })
}

// took notes how a step went. mu is held. That another replica took it is no
// failure.
func (r *rotation) took(err error, now time.Time) {
	if errors.Is(err, ca.ErrRootsChanged) || errors.Is(err, ca.ErrNoNextRoot) || errors.Is(err, ca.ErrRootInUse) {
		err = nil
	}
	if r.err = err; err != nil {
		r.failed = now
		r.log.Error("a step of the root's rotation failed; it is tried again", "error", err)
	}
}

// nodes says of each node what it trusts and uses, and what of it the next step
// waits for.
func (r *rotation) nodes(roots []ca.Root, now time.Time) []adminv1.NodeRoots {
	reports := r.reports()
	byName := map[string]*caserver.NodeReport{}
	for i := range reports {
		byName[reports[i].Node] = &reports[i]
	}
	var present []string
	if r.present != nil {
		present = r.present()
	}
	var out []adminv1.NodeRoots
	for _, n := range caserver.Nodes(r.view(), reports) {
		if !n.Connected && r.present != nil && !slices.Contains(present, n.Name) {
			continue // it was removed
		}
		one := adminv1.NodeRoots{Name: n.Name, Trusted: []string{}, Used: []string{}}
		report := byName[n.Name]
		for _, root := range roots {
			f := root.Fingerprint
			if report != nil && holds(report.Roots.GetTrusted(), f) {
				one.Trusted = append(one.Trusted, f.String())
			}
			if report != nil && holds(report.Roots.GetUsed(), f) {
				one.Used = append(one.Used, f.String())
			}
		}
		if stageOf(roots) != adminv1.RotationIdle {
			one.Waits = waits(report, roots, now)
		}
		out = append(out, one)
	}
	return out
}

func holds(fingerprints [][]byte, f ca.Fingerprint) bool {
	return slices.ContainsFunc(fingerprints, func(b []byte) bool { return bytes.Equal(b, f[:]) })
}

// waits says what of a node stands against the next step; empty: nothing. A node
// that does not say is taken for one that is behind.
func waits(n *caserver.NodeReport, roots []ca.Root, now time.Time) string {
	switch {
	case n == nil:
		return "it has not called since the control plane started"
	case !n.Connected:
		return fmt.Sprintf("it is not connected since %s", n.Since.UTC().Format(time.RFC3339))
	case n.At.IsZero() || now.Sub(n.At) > staleReport:
		return "it has not reported lately"
	case n.Roots == nil:
		return "its agent does not say which roots it trusts; upgrade it"
	}
	for _, root := range roots {
		f := root.Fingerprint
		switch {
		case root.Role != ca.RootFormer && !holds(n.Roots.GetTrusted(), f):
			if why := n.Roots.GetWaits(); why != "" {
				return why
			}
			return fmt.Sprintf("it does not trust the root %s yet", short(f))
		case root.Role == ca.RootFormer && holds(n.Roots.GetUsed(), f):
			return fmt.Sprintf("it uses certificates of the former root %s", short(f))
		}
	}
	return ""
}

func short(f ca.Fingerprint) string { return f.String()[:16] }

// rotate starts a rotation. With force, the step that one waits for is taken now:
// what still waits is cut off until it has caught up, or has joined again.
func (r *rotation) rotate(force bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch stage := stageOf(r.authority.Roots()); {
	case r.declared:
		return errDeclared
	case stage == adminv1.RotationIdle && r.above != nil:
		return errors.New("the root is that of an authority above; it is replaced there")
	case stage == adminv1.RotationIdle:
		return r.authority.PrepareRoot()
	case force:
		r.log.Warn("a step of the root's rotation is forced", "stage", stage)
		r.forced, r.err = true, nil
		return nil
	default:
		return fmt.Errorf("a rotation is under way: it is %s. `signet ca status` says what it waits for; --force takes the next step without waiting", stage)
	}
}

var errDeclared = errors.New("in a cluster the root is replaced by spec.rootNotBefore of the MeshConfig, which `kubectl signet ca rotate` sets; a node that is gone for good does not hold it up once its Node object is deleted")

// distrust replaces the root in a hurry: it may be in somebody else's hands.
func (r *rotation) distrust() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.declared {
		return errDeclared
	}
	r.err = nil
	return r.authority.DistrustRoot()
}

// abandon withdraws the next root.
func (r *rotation) abandon() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.declared {
		return errDeclared
	}
	roots := r.authority.Roots()
	if stage := stageOf(roots); stage != adminv1.RotationPublishing {
		return fmt.Errorf("there is no next root to withdraw: the rotation is %s", stage)
	}
	if r.hurries(roots) {
		return errors.New("the root that signs is distrusted, so it has to be replaced")
	}
	return r.authority.AbandonRoot()
}

// status says where a rotation stands.
func (r *rotation) status() adminv1.AuthorityStatus {
	now := r.now()
	roots := r.authority.Roots()
	out := adminv1.AuthorityStatus{
		TrustDomain: r.authority.TrustDomain().Name(), Stage: stageOf(roots), Nodes: r.nodes(roots, now),
		Hurries: r.hurries(roots), Waits: r.outside(stageOf(roots), now),
	}
	if due, ok := r.authority.RootDue(); ok {
		out.Due = due
	}
	for _, root := range roots {
		c := root.Certificate
		out.Roots = append(out.Roots, adminv1.RootStatus{
			Fingerprint: root.Fingerprint.String(), Role: string(root.Role), Key: root.Key, NotBefore: c.NotBefore, NotAfter: c.NotAfter,
		})
	}
	notAfter, failed := r.authority.Renewal()
	if out.NotAfter = notAfter; failed != nil {
		out.Renewal = failed.Error()
	}
	if r.above != nil {
		s, _ := r.above.Status()
		reason, message := s.Said()
		out.Upstream = &adminv1.UpstreamStatus{
			Name: s.Upstream, Reason: string(reason), Message: message, Wanted: s.Wanted, NotAfter: s.NotAfter, RenewAt: s.RenewAt, RetryAt: s.RetryAt,
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		out.Error = r.err.Error()
	}
	return out
}

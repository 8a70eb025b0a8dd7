package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/kubeclient"
	"github.com/signet-mesh/signet/internal/mesh"
	"github.com/signet-mesh/signet/internal/output"
)

const meshConfigPath = "/apis/signet.dev/v1alpha1/meshconfigs/" + v1alpha1.MeshConfigName

const (
	// revokeTries bounds the writes of the list while others write it too.
	revokeTries = 5
	// expiredFor is how long an entry stays after its certificate has expired: as
	// long as somebody whose clock is behind may take it.
	expiredFor = time.Minute
	// longestTTL is how long ago a certificate may have been issued that has not
	// expired yet.
	longestTTL = 24 * time.Hour
)

// revokeFlags are what to revoke, as it was given.
type revokeFlags struct{ serial, id, reason, notAfter string }

// revokeInCluster writes what is to be revoked into the MeshConfig, where every
// replica of the control plane reads it and the API server has checked who may,
// and waits until nodes act by it.
func (a *app) revokeInCluster(ctx context.Context, c *link, f revokeFlags) (list adminv1.Revocations, err error) {
	replicas, err := a.replicas(ctx, c.kube)
	defer func() {
		for _, r := range replicas {
			r.Close()
		}
	}()
	if err != nil {
		return list, err
	}
	var found []v1alpha1.Revocation
	if f.id != "" {
		found, err = a.issuedTo(ctx, replicas, f.id)
	} else {
		found, err = a.issuedAs(ctx, replicas, f)
	}
	if err != nil {
		return list, err
	}
	before, err := c.Revoked(ctx)
	if err != nil {
		return list, err
	}
	if before.Now.IsZero() {
		return list, errors.New("the control plane is of an older version, which does not read spec.revoked; upgrade it first")
	}
	// Certificates and objects have whole seconds; who renews has two of them left.
	since := metav1.NewTime(before.Now.UTC().Truncate(time.Second).Add(time.Second))
	for i := range found {
		found[i].Reason, found[i].Since = f.reason, &since
	}
	if err := declareRevoked(ctx, c.kube, found, before.Now); err != nil {
		return list, fmt.Errorf("set spec.revoked of the MeshConfig: %w", err)
	}
	return a.followRevoked(ctx, replicas, found)
}

// replicas opens a way to every ready replica of the control plane: each has an
// issuance log of its own. The caller closes those that are returned, also with an
// error.
func (a *app) replicas(ctx context.Context, kube *kubeclient.Cluster) (all []*link, err error) {
	soon, cancel := context.WithTimeout(ctx, connectTime)
	defer cancel()
	pods, err := kube.ReadyControlPods(soon, a.cluster.namespace)
	for _, pod := range pods {
		tunnel, err := kube.OpenTunnel(soon, a.cluster.namespace, pod)
		if err != nil {
			return all, err
		}
		all = append(all, a.through(kube, tunnel))
	}
	return all, err
}

// issuedAs finds out when the certificate with a serial number expires, and whose
// it is, from who has issued it or holds it.
func (a *app) issuedAs(ctx context.Context, replicas []*link, f revokeFlags) ([]v1alpha1.Revocation, error) {
	asked, field, err := mesh.ParseRevocation(&v1alpha1.Revocation{Serial: f.serial, Reason: f.reason})
	if err != nil {
		return nil, usage(fmt.Errorf("--%s: %w", field, err))
	}
	if issued, err := issuedBy(ctx, replicas, asked.Serial); err != nil {
		return nil, err
	} else if issued.Found {
		return []v1alpha1.Revocation{revocation(issued.Serial, issued.ID, issued.NotAfter)}, nil
	}
	kept, silent, err := issuedToNodes(ctx, replicas[0], adminclient.AuditQuery{Serial: asked.Serial, Limit: 1})
	if err != nil {
		return nil, err
	}
	if len(kept) > 0 {
		return []v1alpha1.Revocation{revocation(asked.Serial, kept[0].ID, kept[0].NotAfter)}, nil
	}
	held, err := replicas[0].MeshCertificates(ctx, "")
	if err != nil {
		return nil, err
	}
	for _, h := range held.Certificates {
		if h.Serial == asked.Serial {
			return []v1alpha1.Revocation{revocation(h.Serial, h.ID, h.NotAfter)}, nil
		}
	}
	if f.notAfter == "" {
		a.tellUnheard(silent, held.Missing)
		return nil, fmt.Errorf("no replica of the control plane that runs now has issued %s, and it is in no node's audit. If a replica that is gone issued it to who is no node's agent, give --not-after, which is when it expires, or %s for the longest that a certificate lives", asked.Serial, longestTTL)
	}
	until, err := a.notAfter(f.notAfter)
	if err != nil {
		return nil, err
	}
	return []v1alpha1.Revocation{revocation(asked.Serial, "", until)}, nil
}

// notAfter reads an instant, or how long from now.
func (a *app) notAfter(text string) (time.Time, error) {
	if d, err := time.ParseDuration(text); err == nil && d > 0 {
		return a.now().Add(d), nil
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil || !t.After(a.now()) {
		return t, usage(fmt.Errorf("--not-after %q: must be an instant that is still to come, such as 2026-11-23T09:00:00Z, or a duration such as 24h", text))
	}
	return t, nil
}

func revocation(serial, id string, notAfter time.Time) v1alpha1.Revocation {
	at := metav1.NewTime(notAfter.UTC().Truncate(time.Second))
	return v1alpha1.Revocation{Serial: serial, ID: id, NotAfter: &at}
}

// issuedTo collects all certificates of an identity that have not expired, from
// the logs of all replicas and from all nodes. It says that there may be one which
// only a replica knew that is gone.
func (a *app) issuedTo(ctx context.Context, replicas []*link, id string) (found []v1alpha1.Revocation, err error) {
	whose, err := spiffeid.FromString(id)
	if err != nil {
		return nil, usage(fmt.Errorf("--id %q: %w", id, err))
	}
	known := map[string]bool{}
	add := func(r v1alpha1.Revocation) {
		if !known[r.Serial] {
			known[r.Serial] = true
			found = append(found, r)
		}
	}
	var begun time.Time // of the youngest log
	for _, r := range replicas {
		issued, err := r.IssuedTo(ctx, whose.String())
		if err != nil {
			return nil, err
		}
		if issued.Since.After(begun) {
			begun = issued.Since
		}
		for _, i := range issued.Issued {
			add(revocation(i.Serial, i.ID, i.NotAfter))
		}
	}
	kept, silent, err := issuedToNodes(ctx, replicas[0], adminclient.AuditQuery{From: whose.String(), Since: a.now().Add(-longestTTL)})
	if err != nil {
		return nil, err
	}
	for _, i := range kept {
		if i.Kind == "" && i.NotAfter.After(a.now()) {
			add(revocation(i.Serial, i.ID, i.NotAfter))
		}
	}
	held, err := replicas[0].MeshCertificates(ctx, "")
	if err != nil {
		return nil, err
	}
	for _, h := range held.Certificates {
		if h.ID == whose.String() {
			add(revocation(h.Serial, h.ID, h.NotAfter))
		}
	}
	a.tellUnheard(silent, held.Missing)
	if a.now().Sub(begun) < longestTTL {
		_, _ = fmt.Fprintf(a.err, "signet: a replica of the control plane has known what it issued since %s only; of before, the nodes' audits say what their agents got. A certificate of %s that somebody else got with a stolen node certificate may still be good. A Quarantine cuts all of it off.\n", instant(begun), output.Clean(whose.String()))
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no certificate of %s that has not expired is known; nothing is revoked", whose)
	}
	return found, nil
}

// tellUnheard names the nodes that did not answer one of two questions.
func (a *app) tellUnheard(lists ...[]adminv1.MissingNode) {
	told := map[string]bool{}
	for _, m := range slices.Concat(lists...) {
		if !told[m.Node] {
			told[m.Node] = true
			_, _ = fmt.Fprintf(a.err, "signet: node %s did not answer (%s); a certificate that only it knows may be missing.\n", m.Node, output.Clean(m.Error))
		}
	}
}

// declareRevoked adds to the list, and removes from it what has expired. Of two
// that write at once, one reads again.
func declareRevoked(ctx context.Context, kube *kubeclient.Cluster, add []v1alpha1.Revocation, now time.Time) error {
	for try := 1; ; try++ {
		var config v1alpha1.MeshConfig
		if err := kube.Get(ctx, meshConfigPath, nil, &config); err != nil {
			return err
		}
		list, err := withRevoked(config.Spec.Revoked, add, now)
		if err != nil {
			return err
		}
		patch := map[string]any{
			"metadata": map[string]any{"resourceVersion": config.ResourceVersion},
			"spec":     map[string]any{"revoked": list},
		}
		var answer struct{}
		if err := kube.Patch(ctx, meshConfigPath, patch, &answer); !apierrors.IsConflict(err) || try == revokeTries {
			return err
		}
	}
}

// withRevoked returns a list with more in it, and without what has expired.
func withRevoked(list, add []v1alpha1.Revocation, now time.Time) ([]v1alpha1.Revocation, error) {
	list = slices.DeleteFunc(slices.Clone(list), func(r v1alpha1.Revocation) bool {
		return r.NotAfter != nil && now.After(r.NotAfter.Add(expiredFor))
	})
	for _, r := range add {
		if !slices.ContainsFunc(list, func(had v1alpha1.Revocation) bool { return had.Serial == r.Serial }) {
			list = append(list, r)
		}
	}
	if len(list) > mesh.MaxRevocations {
		return nil, fmt.Errorf("%d certificates would be revoked, and %d is the most; replace the root (`kubectl signet ca distrust`), or cut the identity off with a Quarantine", len(list), mesh.MaxRevocations)
	}
	return list, nil
}

// followRevoked waits until every replica has the list and every node acts by it.
func (a *app) followRevoked(ctx context.Context, replicas []*link, want []v1alpha1.Revocation) (list adminv1.Revocations, err error) {
	for end := time.Now().Add(beginTime); ; {
		var behind []string
		for _, r := range replicas {
			if list, err = r.Revoked(ctx); err != nil {
				return list, fmt.Errorf("%w; spec.revoked of the MeshConfig has it", err)
			}
			if why := notYet(&list, want); why != "" {
				behind = append(behind, why)
			}
		}
		switch {
		case len(behind) == 0:
			return list, nil
		case time.Now().After(end):
			return list, fmt.Errorf("spec.revoked of the MeshConfig has it, but within %s not everybody acts by it: %s; see `kubectl signet status`", beginTime, strings.Join(behind, "; "))
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return list, errors.Join(ctx.Err(), errors.New("spec.revoked of the MeshConfig has it; `kubectl signet ca revoked` says who acts by it"))
		}
	}
}

// notYet says what a replica's answer lacks; empty: nothing.
func notYet(list *adminv1.Revocations, want []v1alpha1.Revocation) string {
	for _, w := range want {
		i := slices.IndexFunc(list.Certificates, func(r adminv1.RevokedCertificate) bool { return r.Serial == w.Serial })
		switch {
		case i < 0:
			return "a replica of the control plane has not read " + w.Serial
		case !list.Certificates[i].Refused:
			return "the holder of " + w.Serial + " has time to renew it left"
		}
	}
	if list.Acting < list.Nodes {
		return fmt.Sprintf("%d of %d nodes act by it", list.Acting, list.Nodes)
	}
	return ""
}

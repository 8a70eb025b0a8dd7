package certmanager

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"time"

	cmv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/ca"
)

// PurposeWorkload marks the CertificateRequests of workloads.
const PurposeWorkload = "workload"

// annotationID is for whoever looks at a workload's request.
const annotationID = "signet.dev/spiffe-id"

// Timing of a workload's request.
const (
	firstLook  = 100 * time.Millisecond // after which it doubles
	lastLook   = time.Second
	removeTime = 5 * time.Second
	sweepEvery = time.Minute
	leftOver   = 10 * time.Minute // a request so old has nobody who waits, or is made again
	sweepMost  = 200              // at a time
)

// The API server's requests a second of a client for workloads: each certificate is
// about six.
const (
	QPS   = 50
	Burst = 100
)

// CertifyLeaf implements ca.LeafSigner. A request has a name that follows from key,
// identity and issuer. It is removed once it was certified; one that was refused stays
// to be looked at, until the same is asked for again, or for ten minutes.
func (u *Upstream) CertifyLeaf(ctx context.Context, req ca.LeafRequest) (*ca.UpstreamAnswer, error) {
	want, err := u.leaf(req)
	if err != nil {
		return nil, err
	}
	u.sweep(ctx)
	ends := func() bool { // the client refuses calls for which it would be too late
		at, ok := ctx.Deadline()
		return ok && time.Until(at) < lastLook
	}
	requests := u.client.CertificateRequests(u.namespace)
	got, err := requests.Get(ctx, want.Name, metav1.GetOptions{})
	if err == nil && same(got, want) == nil && refused(u, got) {
		u.remove(ctx, got)
		err = apierrors.NewNotFound(cmv1.Resource("certificaterequests"), want.Name)
	}
	if apierrors.IsNotFound(err) {
		if err := req.Record(); err != nil {
			return nil, err
		}
		got, err = u.create(ctx, want)
	}
	for wait := firstLook; ; wait = min(2*wait, lastLook) {
		if err != nil && ends() {
			return nil, &ca.UpstreamError{Reason: ca.UpstreamPending, Message: fmt.Sprintf("there was no time left to ask %s, which much is asked of; it is asked again by itself", u)}
		}
		if err != nil {
			return nil, u.unreachable(err)
		}
		if err := u.recognize(got, want); err != nil {
			return nil, err
		}
		answer, err := u.decided(got)
		var no *ca.UpstreamError
		if err == nil || errors.As(err, &no) && no.Reason == ca.UpstreamUnusable {
			u.remove(ctx, got)
			return answer, err
		}
		if no == nil || no.Final() {
			return nil, err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, err
		}
		var next *cmv1.CertificateRequest
		if next, err = requests.Get(ctx, want.Name, metav1.GetOptions{}); err == nil {
			got = next
		} else if ctx.Err() != nil || ends() || apierrors.IsNotFound(err) {
			return nil, no
		}
	}
}

// leaf is the CertificateRequest for a workload.
func (u *Upstream) leaf(req ca.LeafRequest) (*cmv1.CertificateRequest, error) {
	r, sum, err := u.draft(PurposeWorkload, req.CSR, strconv.Quote(req.ID.String()), req.TTL)
	if err != nil {
		return nil, err
	}
	r.Name = "signet-workload-" + hex.EncodeToString(sum[:16])
	r.Annotations = map[string]string{annotationID: req.ID.String()}
	r.Spec.Usages = []cmv1.KeyUsage{cmv1.UsageDigitalSignature, cmv1.UsageServerAuth, cmv1.UsageClientAuth}
	return r, nil
}

// refused reports whether a request was decided: no.
func refused(u *Upstream, r *cmv1.CertificateRequest) bool {
	_, err := u.decided(r)
	var no *ca.UpstreamError
	return errors.As(err, &no) && no.Final()
}

// remove takes away a request that was decided, even when who waited for it is gone.
func (u *Upstream) remove(ctx context.Context, r *cmv1.CertificateRequest) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTime)
	defer cancel()
	err := u.client.CertificateRequests(u.namespace).Delete(ctx, r.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &r.UID}})
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		u.log.WarnContext(ctx, "a CertificateRequest that was decided could not be removed; it is removed later", "name", r.Name, "error", err)
	}
}

// sweep removes, now and then, requests that were left behind.
func (u *Upstream) sweep(ctx context.Context) {
	now := time.Now()
	u.mu.Lock()
	due := now.Sub(u.swept).Abs() >= sweepEvery
	if due {
		u.swept = now
	}
	u.mu.Unlock()
	if !due {
		return
	}
	list, err := u.client.CertificateRequests(u.namespace).List(ctx, metav1.ListOptions{LabelSelector: LabelPurpose + "=" + PurposeWorkload, Limit: 5 * sweepMost})
	if err != nil {
		u.log.WarnContext(ctx, "old CertificateRequests could not be listed", "error", err)
		return
	}
	n := 0
	for i := range list.Items {
		if r := &list.Items[i]; now.Sub(r.CreationTimestamp.Time) > leftOver && n < sweepMost && ctx.Err() == nil {
			u.remove(ctx, r)
			n++
		}
	}
}

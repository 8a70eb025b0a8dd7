// Package certmanager has cert-manager be the authority above: an intermediate, or each
// workload's certificate, is asked for with a CertificateRequest, of any Issuer or
// ClusterIssuer.
package certmanager

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	cmv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	cmclient "github.com/cert-manager/cert-manager/pkg/client/clientset/versioned/typed/certmanager/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/ca"
)

// LabelPurpose marks the CertificateRequests of a control plane, by what they are
// for. Others are never touched.
const (
	LabelPurpose        = "signet.dev/purpose"
	PurposeIntermediate = "intermediate"
)

// kept is how many decided requests stay, for people to look at.
const kept = 5

// Issuer names who is asked.
type Issuer struct {
	Name, Kind, Group string // Kind and Group are cert-manager's Issuer if empty
}

// Check fills in defaults, and refuses what names nobody.
func (i *Issuer) Check() error {
	i.Kind, i.Group = cmp.Or(i.Kind, cmv1.IssuerKind), cmp.Or(i.Group, "cert-manager.io")
	if i.Name == "" {
		return errors.New("the issuer's name is missing")
	}
	if i.Group == "cert-manager.io" && i.Kind != cmv1.IssuerKind && i.Kind != cmv1.ClusterIssuerKind {
		return fmt.Errorf("kind %q: cert-manager.io has %s and %s", i.Kind, cmv1.IssuerKind, cmv1.ClusterIssuerKind)
	}
	return nil
}

func (i Issuer) ref() cmmeta.IssuerReference {
	return cmmeta.IssuerReference{Name: i.Name, Kind: i.Kind, Group: i.Group}
}

// Upstream asks with CertificateRequests in one namespace. It implements ca.Upstream and
// ca.LeafSigner.
type Upstream struct {
	client    cmclient.CertificateRequestsGetter
	namespace string
	issuer    Issuer
	log       *slog.Logger

	mu    sync.Mutex
	swept time.Time // guarded by mu; when it was looked for workloads' requests that were left behind
}

// New returns an Upstream that asks an issuer, from a namespace, in which an Issuer
// has to be. It makes no request.
func New(client cmclient.CertificateRequestsGetter, namespace string, issuer Issuer, log *slog.Logger) (*Upstream, error) {
	if err := issuer.Check(); err != nil {
		return nil, fmt.Errorf("certmanager: %w", err)
	}
	return &Upstream{client: client, namespace: namespace, issuer: issuer, log: log}, nil
}

// String names the issuer.
func (u *Upstream) String() string {
	name := u.issuer.Kind + " " + u.issuer.Name
	if u.issuer.Kind == cmv1.IssuerKind {
		name = u.issuer.Kind + " " + u.namespace + "/" + u.issuer.Name
	}
	if u.issuer.Group != "cert-manager.io" {
		name += " (" + u.issuer.Group + ")"
	}
	return name
}

// Ask implements ca.Upstream. The CertificateRequest has a name that follows from the
// key and the issuer, so whoever asks for the same finds the same.
func (u *Upstream) Ask(ctx context.Context, req ca.UpstreamRequest) (*ca.UpstreamAnswer, error) {
	want, err := u.request(req)
	if err != nil {
		return nil, err
	}
	got, err := u.client.CertificateRequests(u.namespace).Get(ctx, want.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		got, err = u.create(ctx, want)
	}
	if err != nil {
		return nil, u.unreachable(err)
	}
	if err := u.recognize(got, want); err != nil {
		return nil, err
	}
	answer, err := u.decided(got)
	var no *ca.UpstreamError
	if err == nil || errors.As(err, &no) && (no.Reason == ca.UpstreamDenied || no.Reason == ca.UpstreamFailed) {
		u.tidy(ctx, got.Name)
	}
	return answer, err
}

// request is the CertificateRequest for a CSR.
func (u *Upstream) request(req ca.UpstreamRequest) (*cmv1.CertificateRequest, error) {
	r, sum, err := u.draft(PurposeIntermediate, req.CSR, req.TTL.String(), req.TTL)
	if err != nil {
		return nil, err
	}
	r.Name = "signet-intermediate-" + hex.EncodeToString(sum[:8])
	r.Spec.IsCA, r.Spec.Usages = true, []cmv1.KeyUsage{cmv1.UsageCertSign, cmv1.UsageCRLSign}
	return r, nil
}

// draft is a CertificateRequest but for its name and usages, and a hash of its key, its
// issuer, and what else sets it apart.
func (u *Upstream) draft(purpose string, der []byte, apart string, ttl time.Duration) (*cmv1.CertificateRequest, [sha256.Size]byte, error) {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, [sha256.Size]byte{}, fmt.Errorf("certmanager: %w", err)
	}
	return &cmv1.CertificateRequest{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: u.namespace,
			Labels:    map[string]string{LabelPurpose: purpose, "app.kubernetes.io/part-of": "signet"},
		},
		Spec: cmv1.CertificateRequestSpec{
			Request:   pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			IssuerRef: u.issuer.ref(), Duration: &metav1.Duration{Duration: ttl},
		},
	}, sha256.Sum256(fmt.Appendf(nil, "%x %q %q %q %s", csr.RawSubjectPublicKeyInfo, u.issuer.Group, u.issuer.Kind, u.issuer.Name, apart)), nil
}

// create makes a request, or returns the one that another replica has made meanwhile.
func (u *Upstream) create(ctx context.Context, want *cmv1.CertificateRequest) (*cmv1.CertificateRequest, error) {
	requests := u.client.CertificateRequests(u.namespace)
	got, err := requests.Create(ctx, want, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return requests.Get(ctx, want.Name, metav1.GetOptions{})
	}
	return got, err
}

// recognize refuses an object that is not the one that was wanted.
func (u *Upstream) recognize(got, want *cmv1.CertificateRequest) error {
	if err := same(got, want); err != nil {
		return &ca.UpstreamError{Reason: ca.UpstreamFailed, Message: fmt.Sprintf("%s is not what was asked for: %v; somebody else made it", u.named(got), err)}
	}
	return nil
}

// same says how an object that is there differs from the one that was wanted. The
// API server keeps a CertificateRequest from being edited.
func same(got, want *cmv1.CertificateRequest) error {
	key := func(r *cmv1.CertificateRequest) string {
		block, _ := pem.Decode(r.Spec.Request)
		if block == nil {
			return ""
		}
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			return ""
		}
		return string(csr.RawSubjectPublicKeyInfo)
	}
	switch {
	case key(got) != key(want):
		return errors.New("it is for another key")
	case got.Spec.IssuerRef != want.Spec.IssuerRef:
		return errors.New("it is for another issuer")
	case got.Spec.IsCA != want.Spec.IsCA:
		return errors.New("isCA differs")
	}
	return nil
}

func (u *Upstream) named(r *cmv1.CertificateRequest) string {
	return fmt.Sprintf("CertificateRequest %s/%s for %s", r.Namespace, r.Name, u)
}

// unreachable says why the API server did not take a request.
func (u *Upstream) unreachable(err error) error {
	message := fmt.Sprintf("no CertificateRequest can be made for %s: %v", u, err)
	switch {
	case apierrors.IsForbidden(err):
		message += "; give signet-control the Role that the chart has with certManager.enabled"
	case apierrors.IsNotFound(err):
		message += "; is cert-manager installed?"
	}
	return &ca.UpstreamError{Reason: ca.UpstreamUnreachable, Message: message}
}

// decided reads what became of a request.
func (u *Upstream) decided(r *cmv1.CertificateRequest) (*ca.UpstreamAnswer, error) {
	no := func(reason ca.UpstreamReason, format string, args ...any) error {
		return &ca.UpstreamError{Reason: reason, Message: u.named(r) + " " + fmt.Sprintf(format, args...)}
	}
	ready := condition(r, cmv1.CertificateRequestConditionReady)
	if denied := condition(r, cmv1.CertificateRequestConditionDenied); denied != nil && denied.Status == cmmeta.ConditionTrue {
		return nil, no(ca.UpstreamDenied, "was denied (%s: %s); have a policy allow it, it is asked for again", denied.Reason, denied.Message)
	}
	if invalid := condition(r, cmv1.CertificateRequestConditionInvalidRequest); invalid != nil && invalid.Status == cmmeta.ConditionTrue {
		return nil, no(ca.UpstreamFailed, "is invalid (%s: %s)", invalid.Reason, invalid.Message)
	}
	if ready == nil {
		if approved := condition(r, cmv1.CertificateRequestConditionApproved); approved == nil || approved.Status != cmmeta.ConditionTrue {
			return nil, no(ca.UpstreamPending, "waits for approval since %s: cert-manager gives it by itself unless its approver is off; then a CertificateRequestPolicy must allow it, or somebody with `cmctl approve -n %s %s`; if nobody has looked at it, cert-manager does not run",
				r.CreationTimestamp.UTC().Format(time.RFC3339), r.Namespace, r.Name)
		}
		return nil, no(ca.UpstreamPending, "is approved, and nobody has answered since %s; does the controller of the issuer run?", r.CreationTimestamp.UTC().Format(time.RFC3339))
	}
	switch {
	case ready.Status == cmmeta.ConditionTrue && len(r.Status.Certificate) > 0:
	case ready.Reason == cmv1.CertificateRequestReasonDenied:
		return nil, no(ca.UpstreamDenied, "was denied (%s)", ready.Message)
	case ready.Reason == cmv1.CertificateRequestReasonFailed:
		return nil, no(ca.UpstreamFailed, "failed (%s)", ready.Message)
	case strings.HasPrefix(ready.Message, "Referenced ") && strings.Contains(ready.Message, "not found"):
		// The one thing that cert-manager says in words only.
		return nil, no(ca.UpstreamIssuerNotFound, "waits: %s; create the issuer, or name another", ready.Message)
	default:
		return nil, no(ca.UpstreamPending, "waits (%s: %s)", ready.Reason, ready.Message)
	}
	chain, err := certificates(r.Status.Certificate)
	if err != nil {
		return nil, no(ca.UpstreamUnusable, "has a status.certificate that cannot be read: %v", err)
	}
	roots, err := certificates(r.Status.CA)
	if err != nil {
		return nil, no(ca.UpstreamUnusable, "has a status.ca that cannot be read: %v", err)
	}
	return &ca.UpstreamAnswer{Chain: chain, Roots: roots}, nil
}

func condition(r *cmv1.CertificateRequest, kind cmv1.CertificateRequestConditionType) *cmv1.CertificateRequestCondition {
	for i := range r.Status.Conditions {
		if r.Status.Conditions[i].Type == kind {
			return &r.Status.Conditions[i]
		}
	}
	return nil
}

// certificates reads PEM; none are there when it is empty.
func certificates(text []byte) (out []*x509.Certificate, err error) {
	for len(strings.TrimSpace(string(text))) > 0 {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return nil, errors.New("is no PEM")
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a %q", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// tidy removes the oldest requests that were decided. That it fails is no reason not
// to go on.
func (u *Upstream) tidy(ctx context.Context, current string) {
	requests := u.client.CertificateRequests(u.namespace)
	list, err := requests.List(ctx, metav1.ListOptions{LabelSelector: LabelPurpose + "=" + PurposeIntermediate})
	if err != nil {
		u.log.WarnContext(ctx, "old CertificateRequests could not be listed", "error", err)
		return
	}
	slices.SortFunc(list.Items, func(a, b cmv1.CertificateRequest) int { return b.CreationTimestamp.Compare(a.CreationTimestamp.Time) })
	n := 1 // the current one
	for i := range list.Items {
		if list.Items[i].Name == current {
			continue
		}
		if n++; n <= kept {
			continue
		}
		if err := requests.Delete(ctx, list.Items[i].Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			u.log.WarnContext(ctx, "an old CertificateRequest could not be removed", "name", list.Items[i].Name, "error", err)
		}
	}
}

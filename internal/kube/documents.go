package kube

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// settings are what the MeshConfig says.
type settings struct {
	td                                  spiffeid.TrustDomain
	ttl                                 time.Duration
	keyType                             mesh.KeyType
	refuseUnknown                       bool
	rootNotBefore, rootDistrustedBefore time.Time
}

// Bounds of a workload certificate's lifetime, as the CRD has them.
const (
	defaultTTL = time.Hour
	minTTL     = 4 * time.Second
	maxTTL     = 24 * time.Hour
)

// parseConfig returns the settings, or each fault with its field.
func parseConfig(in *v1alpha1.MeshConfig) (settings, []string) {
	out := settings{ttl: defaultTTL}
	var faults []string
	name := in.Spec.TrustDomain
	td, err := mesh.ParseTrustDomain(name)
	switch {
	case name == "":
		faults = append(faults, "spec.trustDomain: is missing; give a name such as mesh.example")
	case err != nil:
		faults = append(faults, fmt.Sprintf("spec.trustDomain: %q must be a bare name such as mesh.example", name))
	default:
		out.td = td
	}
	if ttl := in.Spec.SVIDTTL; ttl != nil {
		if out.ttl = ttl.Duration; out.ttl < minTTL || out.ttl > maxTTL {
			faults = append(faults, fmt.Sprintf("spec.svidTTL: is %v; use 4s to 24h", out.ttl))
		}
	}
	var known bool
	if out.keyType, known = mesh.ParseKeyType(in.Spec.SVIDKeyType); !known {
		faults = append(faults, fmt.Sprintf("spec.svidKeyType: is %q; use one of %s", in.Spec.SVIDKeyType, mesh.KeyTypes()))
	}
	if t := in.Spec.RootNotBefore; t != nil {
		out.rootNotBefore = t.UTC()
	}
	if t := in.Spec.RootDistrustedBefore; t != nil {
		out.rootDistrustedBefore = t.UTC()
	}
	switch in.Spec.UnknownDestinations {
	case "", "plain":
	case "refuse":
		out.refuseUnknown = true
	default:
		faults = append(faults, fmt.Sprintf("spec.unknownDestinations: is %q; use plain or refuse", in.Spec.UnknownDestinations))
	}
	return out, faults
}

// typed returns a transform that turns what the dynamic client delivers into
// the API's type, without the fields that nobody here reads. An object that
// does not fit its type keeps its name alone, which every reader refuses.
func typed[T any, P interface {
	*T
	metav1.Object
}](obj any) (any, error) {
	in, ok := obj.(*unstructured.Unstructured)
	if !ok {
		return obj, nil
	}
	out := P(new(T))
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(in.Object, out); err != nil {
		out = P(new(T))
		out.SetName(in.GetName())
		out.SetNamespace(in.GetNamespace())
		out.SetUID(in.GetUID())
		out.SetGeneration(in.GetGeneration())
		out.SetResourceVersion(in.GetResourceVersion())
	}
	out.SetManagedFields(nil)
	out.SetAnnotations(nil)
	out.SetLabels(nil)
	return out, nil
}

// documents are the objects of signet.dev at one instant, sorted, and what
// they mean. They are immutable.
type documents struct {
	config      *v1alpha1.MeshConfig // nil: there is none
	policies    []v1alpha1.AllowPolicy
	quarantines []v1alpha1.Quarantine
	federations federations
	model       *authz.Model
	diagnostics []authz.Diagnostic
	sum         sum // of the model
}

func (d *documents) compile(td spiffeid.TrustDomain) {
	slices.SortFunc(d.policies, func(a, b v1alpha1.AllowPolicy) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	slices.SortFunc(d.quarantines, func(a, b v1alpha1.Quarantine) int { return strings.Compare(a.Name, b.Name) })
	d.federations = parseFederations(td, d.federations.docs)
	domains := authz.Domains{Own: td}
	for i := range d.federations.follow {
		domains.Foreign = append(domains.Foreign, d.federations.follow[i].TrustDomain)
	}
	d.model, d.diagnostics = domains.Compile(d.policies, d.quarantines...)
	d.sum = sumOf("documents", struct {
		authz.Content
		Federations []mesh.Federation `json:",omitempty"`
	}{d.model.Content(), d.federations.follow})
}

// view assembles what is in force. It shares the index's tables, which are
// replaced and not edited.
func (x *index) view(s settings, d *documents, r *revocations) *mesh.View {
	state := &mesh.State{
		TrustDomain: s.td, SVIDTTL: s.ttl, SVIDKeyType: s.keyType, RootNotBefore: s.rootNotBefore, RootDistrustedBefore: s.rootDistrustedBefore, Revoked: r.list, RefuseUnknown: s.refuseUnknown,
		Namespaces: x.modes, Plain: x.plain, Excluded: x.excluded,
		Workloads: x.workloads.values, Services: x.serviceSet.values,
		Federations: d.federations.follow,
	}
	h := sha256.New()
	head, err := json.Marshal(struct {
		Format     int // rises when the same objects come to mean something else
		Domain     string
		TTL        time.Duration
		KeyType    mesh.KeyType `json:",omitempty"`
		Refuse     bool
		Root       time.Time
		Distrusted time.Time
		Namespaces map[string]mesh.Mode
		Plain      map[string]bool
		Excluded   map[string]string
		Revoked    []string `json:",omitempty"`
		Refused    int      `json:",omitempty"` // a node that says that it is at this revision refuses so many
	}{2, s.td.Name(), s.ttl, s.keyType, s.refuseUnknown, s.rootNotBefore, s.rootDistrustedBefore, x.modes, x.plain, x.excluded, r.named(), r.refused})
	if err != nil {
		panic(fmt.Sprintf("kube: encode revision: %v", err))
	}
	h.Write(head)
	for _, sums := range [][]sum{{d.sum}, x.workloads.sums, x.serviceSet.sums} {
		fmt.Fprintf(h, "\n%d\n", len(sums))
		for i := range sums {
			h.Write(sums[i][:])
		}
	}
	return &mesh.View{Revision: hex.EncodeToString(h.Sum(nil)[:8]), State: state, Model: d.model}
}

// changing is how the status names the namespaces that join or leave: by the
// mode that is to come.
func (x *index) changing() map[string]mesh.Mode {
	out := map[string]mesh.Mode{}
	for name := range x.turns {
		out[name] = x.namespaces[name].wanted
	}
	return out
}

// notices are the annotations that are no mode, by namespace.
func (x *index) notices() map[string]string {
	out := map[string]string{}
	for name, ns := range maps.All(x.namespaces) {
		if ns.unknown != "" {
			out[name] = ns.unknown
		}
	}
	return out
}

package manifest

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Bounds of a workload certificate's lifetime.
const (
	defaultTTL = time.Hour
	minTTL     = 4 * time.Second
	maxTTL     = 24 * time.Hour
)

// builder turns documents into a Manifest and reports what contradicts.
type builder struct {
	report  *report
	docs    []*document
	origin  string // the path that was asked for
	node    string
	partial bool // the documents may be a part of a mesh

	state     mesh.State
	policies  []v1alpha1.AllowPolicy
	cutOff    []v1alpha1.Quarantine
	declared  map[string]bool         // namespaces
	workloads map[string]bool         // keys of the WorkloadEntries; true: captured
	addresses map[netip.Addr]string   // address -> the document that has it
	netns     map[[2]string]string    // node and namespace path -> workload
	names     map[[3]string]*document // kind, namespace, name -> first document
	byKind    map[string][]*document  // in the order of the files
	domain    spiffeid.TrustDomain    // the state's, or a stand-in
}

func newBuilder(r *report, docs []*document, origin, node string) *builder {
	return &builder{
		report: r, docs: docs, origin: origin, node: node,
		declared:  map[string]bool{},
		workloads: map[string]bool{},
		addresses: map[netip.Addr]string{},
		netns:     map[[2]string]string{},
		names:     map[[3]string]*document{},
		byKind:    map[string][]*document{},
	}
}

// build runs the stages in the order in which they need each other. It
// returns nil if anything was reported.
func (b *builder) build() *Manifest {
	b.metadata()
	b.meshConfig()
	b.namespaces()
	b.workloadEntries()
	b.federations()
	b.serviceEntries()
	b.allowPolicies()
	b.quarantines()
	if len(b.report.findings) > 0 {
		return nil
	}
	b.sort()
	return &Manifest{
		State:       &b.state,
		Policies:    b.policies,
		Quarantines: b.cutOff,
		Revision:    revision(&b.state, b.policies, b.cutOff),
	}
}

// metadata checks what every kind has: a name that no other document of its
// kind and namespace has, and a namespace where there has to be one.
func (b *builder) metadata() {
	for _, d := range b.docs {
		clusterWide := d.kind == kindNamespace || d.kind == v1alpha1.KindMeshConfig || d.kind == v1alpha1.KindQuarantine || d.kind == v1alpha1.KindFederation
		check := authz.CheckName
		if d.kind == kindNamespace {
			check = authz.CheckNamespace
		}
		d.require("metadata.name", d.meta.Name, check)
		switch {
		case !clusterWide:
			d.require("metadata.namespace", d.meta.Namespace, authz.CheckNamespace)
		case d.meta.Namespace != "":
			d.fault(CodeUnknown, "metadata.namespace", "a %s belongs to no namespace; remove the field", d.kind)
		}
		for key := range d.meta.Annotations {
			known := d.kind == kindNamespace && key == v1alpha1.AnnotationMesh
			if strings.HasPrefix(key, "signet.dev/") && !known {
				d.fault(CodeUnknown, join("metadata.annotations", key), "unknown annotation; %s on a Namespace is the only one", v1alpha1.AnnotationMesh)
			}
		}
		id := [3]string{d.kind, d.meta.Namespace, d.meta.Name}
		if first := b.names[id]; first != nil && d.meta.Name != "" {
			d.fault(CodeDuplicate, "metadata.name", "another %s %s is at %s:%d; rename or remove one of them",
				d.kind, strings.TrimPrefix(d.key(), "/"), first.file, first.lineOf("metadata.name"))
			continue
		}
		b.names[id] = d
		b.byKind[d.kind] = append(b.byKind[d.kind], d)
		if d.kind == kindNamespace {
			b.declared[d.meta.Name] = true
		}
	}
	for _, d := range b.docs {
		b.reference(d, "metadata.namespace", d.meta.Namespace)
	}
}

// reference checks that a namespace is declared. A malformed name is reported
// elsewhere; nothing is called missing that may be in what could not be read.
func (b *builder) reference(d *document, field, namespace string) {
	if b.report.incomplete || b.partial && len(b.byKind[kindNamespace]) == 0 {
		return
	}
	if authz.CheckNamespace(namespace) == nil && !b.declared[namespace] {
		d.fault(CodeReference, field, "namespace %q is not declared; add a Namespace document", namespace)
	}
}

// require checks a name that has to be there, and reports whether it is good.
func (d *document) require(field, value string, check func(string) error) bool {
	if value == "" {
		d.fault(CodeRequired, field, "is missing")
		return false
	}
	if err := check(value); err != nil {
		d.fault(CodeValue, field, "%v", err)
		return false
	}
	return true
}

func (b *builder) meshConfig() {
	b.state.SVIDTTL = defaultTTL
	configs := b.byKind[v1alpha1.KindMeshConfig]
	if len(configs) == 0 {
		if !b.partial && !b.report.incomplete {
			b.report.add(Finding{File: b.origin, Code: CodeMesh, Message: "no MeshConfig; exactly one document of that kind has to name the trust domain"})
		}
		b.domain = b.standIn()
		return
	}
	for _, d := range configs[1:] {
		d.fault(CodeMesh, "", "a second MeshConfig, the first is at %s:%d; there has to be exactly one", configs[0].file, configs[0].line)
	}
	d, spec := configs[0], configs[0].spec.(*v1alpha1.MeshConfigSpec)
	td, err := mesh.ParseTrustDomain(spec.TrustDomain)
	switch {
	case spec.TrustDomain == "":
		d.fault(CodeRequired, "spec.trustDomain", "is missing; give a name such as mesh.example")
	case err != nil:
		d.fault(CodeValue, "spec.trustDomain", "%v", err)
	}
	b.state.TrustDomain, b.domain = td, td
	if td.IsZero() {
		b.domain = b.standIn()
	}
	if ttl := spec.SVIDTTL; ttl != nil {
		if ttl.Duration < minTTL || ttl.Duration > maxTTL {
			d.fault(CodeValue, "spec.svidTTL", "is %v; use 4s to 24h", ttl.Duration)
		}
		b.state.SVIDTTL = ttl.Duration
	}
	var known bool
	if b.state.SVIDKeyType, known = mesh.ParseKeyType(spec.SVIDKeyType); !known {
		d.fault(CodeValue, "spec.svidKeyType", "is %q; use one of %s", spec.SVIDKeyType, mesh.KeyTypes())
	}
	if t := spec.RootNotBefore; t != nil {
		b.state.RootNotBefore = t.UTC()
	}
	if t := spec.RootDistrustedBefore; t != nil {
		b.state.RootDistrustedBefore = t.UTC()
	}
	b.revoked(d, spec.Revoked)
	switch spec.UnknownDestinations {
	case "", "plain":
	case "refuse":
		b.state.RefuseUnknown = true
	default:
		d.fault(CodeValue, "spec.unknownDestinations", "is %q; use plain or refuse", spec.UnknownDestinations)
	}
}

// standIn gives the trust domain of the first SPIFFE ID in a policy or else in
// a quarantine, or a placeholder, so that the rest can be checked without a good
// MeshConfig.
func (b *builder) standIn() spiffeid.TrustDomain {
	var named []string
	for _, d := range b.byKind[v1alpha1.KindAllowPolicy] {
		for _, peer := range d.spec.(*v1alpha1.AllowPolicySpec).From {
			named = append(named, peer.SPIFFEID)
		}
	}
	for _, d := range b.byKind[v1alpha1.KindQuarantine] {
		named = append(named, d.spec.(*v1alpha1.QuarantineSpec).Identities...)
	}
	for _, id := range named {
		if _, err := authz.ParsePattern(id); err != nil {
			continue
		}
		domain, _, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/")
		if td, err := spiffeid.TrustDomainFromString(domain); err == nil {
			return td
		}
	}
	return spiffeid.RequireTrustDomainFromString("unknown.invalid")
}

func (b *builder) namespaces() {
	b.state.Namespaces = map[string]mesh.Mode{}
	for _, d := range b.byKind[kindNamespace] {
		value := d.meta.Annotations[v1alpha1.AnnotationMesh]
		mode, ok := mesh.ParseMode(value)
		if !ok {
			d.fault(CodeValue, join("metadata.annotations", v1alpha1.AnnotationMesh), "is %q; use enforce, observe or off", value)
		}
		b.state.Namespaces[d.meta.Name] = mode
	}
}

func (b *builder) allowPolicies() {
	for _, d := range b.byKind[v1alpha1.KindAllowPolicy] {
		spec := d.spec.(*v1alpha1.AllowPolicySpec)
		policy := v1alpha1.AllowPolicy{
			TypeMeta: metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion, Kind: v1alpha1.KindAllowPolicy},
			ObjectMeta: metav1.ObjectMeta{
				Name: d.meta.Name, Namespace: d.meta.Namespace,
				Labels: d.meta.Labels, Annotations: d.meta.Annotations,
			},
			Spec: *spec,
		}
		// One at a time, so that each diagnostic belongs to this document.
		_, diagnostics := b.domains().Compile([]v1alpha1.AllowPolicy{policy})
		for _, diagnostic := range diagnostics {
			if !strings.HasPrefix(diagnostic.Field, "metadata.") { // checked for every kind
				d.fault(CodePolicy, diagnostic.Field, "%s", diagnostic.Message)
			}
		}
		for i, peer := range spec.From {
			field := fmt.Sprintf("spec.from[%d]", i)
			if peer.Namespace != "" {
				b.reference(d, field+".namespace", peer.Namespace)
			}
			if namespace, _, ok := strings.Cut(peer.ServiceAccount, "/"); ok {
				b.reference(d, field+".serviceAccount", namespace)
			}
		}
		b.policies = append(b.policies, policy)
	}
}

func (b *builder) sort() {
	slices.SortFunc(b.state.Workloads, func(x, y mesh.Workload) int {
		return cmp.Or(strings.Compare(x.Namespace, y.Namespace), strings.Compare(x.Name, y.Name))
	})
	slices.SortFunc(b.state.Services, func(x, y mesh.Service) int {
		return cmp.Or(strings.Compare(x.Namespace, y.Namespace), strings.Compare(x.Name, y.Name))
	})
	slices.SortFunc(b.state.Federations, func(x, y mesh.Federation) int { return x.TrustDomain.Compare(y.TrustDomain) })
	slices.SortFunc(b.cutOff, func(x, y v1alpha1.Quarantine) int { return strings.Compare(x.Name, y.Name) })
	slices.SortFunc(b.policies, func(x, y v1alpha1.AllowPolicy) int {
		return cmp.Or(strings.Compare(x.Namespace, y.Namespace), strings.Compare(x.Name, y.Name))
	})
}

package manifest

import (
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/api/v1alpha1"
)

// quarantines checks who is to be cut off. A name that nothing has is a fault:
// somebody would believe that it is cut off.
func (b *builder) quarantines() {
	for _, d := range b.byKind[v1alpha1.KindQuarantine] {
		spec := d.spec.(*v1alpha1.QuarantineSpec)
		quarantine := v1alpha1.Quarantine{
			TypeMeta: metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion, Kind: v1alpha1.KindQuarantine},
			ObjectMeta: metav1.ObjectMeta{
				Name: d.meta.Name, Labels: d.meta.Labels, Annotations: d.meta.Annotations,
			},
			Spec: *spec,
		}
		_, diagnostics := b.domains().Compile(nil, quarantine)
		for _, diagnostic := range diagnostics {
			if !strings.HasPrefix(diagnostic.Field, "metadata.") { // checked for every kind
				d.fault(CodePolicy, diagnostic.Field, "%s", diagnostic.Message)
			}
		}
		for i, name := range spec.Namespaces {
			b.reference(d, fmt.Sprintf("spec.namespaces[%d]", i), name)
		}
		for i, name := range spec.ServiceAccounts {
			if namespace, _, ok := strings.Cut(name, "/"); ok {
				b.reference(d, fmt.Sprintf("spec.serviceAccounts[%d]", i), namespace)
			}
		}
		b.cutOff = append(b.cutOff, quarantine)
	}
}

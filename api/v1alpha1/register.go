package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// SchemeGroupVersion is GroupVersion in the form that Kubernetes clients use.
var SchemeGroupVersion = schema.GroupVersion{Group: "signet.dev", Version: "v1alpha1"}

// Resource names a resource of this group by its plural, such as
// "allowpolicies".
func Resource(plural string) schema.GroupVersionResource {
	return SchemeGroupVersion.WithResource(plural)
}

// Kind names a kind of this group, such as KindAllowPolicy.
func Kind(kind string) schema.GroupVersionKind {
	return SchemeGroupVersion.WithKind(kind)
}

// AddToScheme makes the kinds that a cluster has known to a scheme. It always
// returns nil; the error is there for callers that collect such functions.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(SchemeGroupVersion,
		&AllowPolicy{}, &AllowPolicyList{},
		&Quarantine{}, &QuarantineList{},
		&MeshConfig{}, &MeshConfigList{},
		&Federation{}, &FederationList{},
	)
	metav1.AddToGroupVersion(s, SchemeGroupVersion)
	return nil
}

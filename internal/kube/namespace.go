package kube

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/internal/mesh"
)

// stripNamespace keeps the mesh's annotations.
func stripNamespace(obj any) (any, error) {
	in, ok := obj.(*corev1.Namespace)
	if !ok {
		return obj, nil
	}
	out := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: in.Name, UID: in.UID, ResourceVersion: in.ResourceVersion}}
	for _, key := range []string{v1alpha1.AnnotationMesh, v1alpha1.AnnotationAllowOptOut, v1alpha1.AnnotationStatus} {
		if value, ok := in.Annotations[key]; ok {
			if out.Annotations == nil {
				out.Annotations = map[string]string{}
			}
			out.Annotations[key] = value
		}
	}
	return out, nil
}

// namespace is how one takes part.
type namespace struct {
	wanted      mesh.Mode // as annotated
	mode        mesh.Mode // as it is now, while it joins or leaves
	allowOptOut bool
	unknown     string // an annotation's value that is no mode, and stands for enforce
}

// parseNamespace fails closed: whoever wrote something meant to be protected,
// so a value that is no mode enforces, and the status says so.
func parseNamespace(in *corev1.Namespace) namespace {
	value, annotated := in.Annotations[v1alpha1.AnnotationMesh]
	mode, ok := mesh.ParseMode(value)
	out := namespace{wanted: mode, allowOptOut: in.Annotations[v1alpha1.AnnotationAllowOptOut] == "true"}
	if !ok || annotated && value == "" {
		out.wanted, out.unknown = mesh.ModeEnforce, value
		if value == "" {
			out.unknown = `""`
		}
	}
	return out
}

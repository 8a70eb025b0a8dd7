// Package shop tests the example's documents: whoever copies from them must
// not copy a mistake.
package shop

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/internal/manifest"
	"github.com/signet-mesh/signet/test/images/catalogue"
)

// kinds are those that the example uses.
var kinds = map[string]func() any{
	"v1/Namespace":                    func() any { return new(corev1.Namespace) },
	"v1/ServiceAccount":               func() any { return new(corev1.ServiceAccount) },
	"v1/Service":                      func() any { return new(corev1.Service) },
	"v1/ConfigMap":                    func() any { return new(corev1.ConfigMap) },
	"v1/Secret":                       func() any { return new(corev1.Secret) },
	"apps/v1/Deployment":              func() any { return new(appsv1.Deployment) },
	"apps/v1/StatefulSet":             func() any { return new(appsv1.StatefulSet) },
	"batch/v1/CronJob":                func() any { return new(batchv1.CronJob) },
	"signet.dev/v1alpha1/AllowPolicy": func() any { return new(v1alpha1.AllowPolicy) },
	"signet.dev/v1alpha1/Quarantine":  func() any { return new(v1alpha1.Quarantine) },
}

var files = []string{"manifests/10-shop.yaml", "manifests/20-data.yaml", "manifests/30-policies.yaml", "quarantine.yaml"}

// objects decodes all documents as strictly as an API server does with
// --validate=strict.
func objects(t *testing.T) []any {
	t.Helper()
	var all []any
	for _, name := range files {
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		r := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(content)))
		for {
			doc, err := r.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			var meta metav1.TypeMeta
			if err := yaml.Unmarshal(doc, &meta); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			kind := kinds[meta.APIVersion+"/"+meta.Kind]
			if kind == nil {
				t.Fatalf("%s: %s/%s is unknown to this test", name, meta.APIVersion, meta.Kind)
			}
			o := kind()
			if err := yaml.UnmarshalStrict(doc, o); err != nil {
				t.Errorf("%s: %s: %v\n%s", name, meta.Kind, err, doc)
			}
			all = append(all, o)
		}
	}
	return all
}

func of[T any](all []any) (some []T) {
	for _, o := range all {
		if v, ok := o.(T); ok {
			some = append(some, v)
		}
	}
	return some
}

// pod is a template and the object that it is in.
type pod struct {
	owner, namespace string
	labels           map[string]string
	spec             *corev1.PodSpec
}

func pods(all []any) (out []pod) {
	for _, o := range of[*appsv1.Deployment](all) {
		out = append(out, pod{"Deployment " + o.Name, o.Namespace, o.Spec.Template.Labels, &o.Spec.Template.Spec})
	}
	for _, o := range of[*appsv1.StatefulSet](all) {
		out = append(out, pod{"StatefulSet " + o.Name, o.Namespace, o.Spec.Template.Labels, &o.Spec.Template.Spec})
	}
	for _, o := range of[*batchv1.CronJob](all) {
		t := &o.Spec.JobTemplate.Spec.Template
		out = append(out, pod{"CronJob " + o.Name, o.Namespace, t.Labels, &t.Spec})
	}
	return out
}

func (p pod) containers() []corev1.Container {
	return slices.Concat(p.spec.InitContainers, p.spec.Containers)
}

func (p pod) has(port int32) bool {
	return slices.ContainsFunc(p.containers(), func(c corev1.Container) bool {
		return slices.ContainsFunc(c.Ports, func(has corev1.ContainerPort) bool { return has.ContainerPort == port })
	})
}

// Defends readers from a field that no API server knows, and from pods that
// name what is not there.
func TestObjects(t *testing.T) {
	all := objects(t)
	named := func(kind, namespace, name string) bool {
		return slices.ContainsFunc(all, func(o any) bool {
			m, ok := o.(metav1.Object)
			return ok && m.GetNamespace() == namespace && m.GetName() == name && kindOf(o) == kind
		})
	}
	references := map[string]bool{catalogue.NginxReference: true, catalogue.RedisReference: true, catalogue.PostgresReference: true, catalogue.ShopAPIReference: true}
	for _, p := range pods(all) {
		if !named("ServiceAccount", p.namespace, p.spec.ServiceAccountName) {
			t.Errorf("%s: there is no service account %q", p.owner, p.spec.ServiceAccountName)
		}
		if s := p.spec.SecurityContext; s == nil || s.RunAsNonRoot == nil || !*s.RunAsNonRoot || s.SeccompProfile == nil {
			t.Errorf("%s: is not at the level restricted", p.owner)
		}
		for _, v := range p.spec.Volumes {
			if v.ConfigMap != nil && !named("ConfigMap", p.namespace, v.ConfigMap.Name) {
				t.Errorf("%s: there is no ConfigMap %q", p.owner, v.ConfigMap.Name)
			}
		}
		for _, c := range p.containers() {
			if !references[c.Image] || c.ImagePullPolicy != corev1.PullIfNotPresent {
				t.Errorf("%s/%s: image %s with policy %q; the images are not in a registry", p.owner, c.Name, c.Image, c.ImagePullPolicy)
			}
			if s := c.SecurityContext; s == nil || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation || s.Capabilities == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
				t.Errorf("%s/%s: is not at the level restricted", p.owner, c.Name)
			}
			for _, m := range c.VolumeMounts {
				if !slices.ContainsFunc(p.spec.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name }) {
					t.Errorf("%s/%s: there is no volume %q", p.owner, c.Name, m.Name)
				}
			}
			for _, e := range c.Env {
				if e.ValueFrom != nil && !named("Secret", p.namespace, e.ValueFrom.SecretKeyRef.Name) {
					t.Errorf("%s/%s: there is no Secret %q", p.owner, c.Name, e.ValueFrom.SecretKeyRef.Name)
				}
			}
		}
	}
	for _, s := range of[*corev1.Service](all) {
		for _, port := range s.Spec.Ports {
			found := false
			for _, p := range pods(all) {
				if p.namespace != s.Namespace || !labels.SelectorFromSet(s.Spec.Selector).Matches(labels.Set(p.labels)) {
					continue
				}
				for _, c := range p.containers() {
					found = found || slices.ContainsFunc(c.Ports, func(has corev1.ContainerPort) bool { return has.Name == port.TargetPort.StrVal })
				}
			}
			if !found {
				t.Errorf("Service %s: nothing that it selects has the port %q", s.Name, port.TargetPort.StrVal)
			}
		}
	}
}

// kindOf tells apart what pods name.
func kindOf(o any) string {
	switch o.(type) {
	case *corev1.ServiceAccount:
		return "ServiceAccount"
	case *corev1.ConfigMap:
		return "ConfigMap"
	case *corev1.Secret:
		return "Secret"
	}
	return ""
}

// Defends the tour from policies that grant nothing, or what is not there: the
// target exists, has the port, and the callers exist.
func TestPolicies(t *testing.T) {
	if found := manifest.Check([]string{"manifests/30-policies.yaml", "quarantine.yaml"}); len(found) > 0 {
		t.Errorf("signet policy check finds %+v", found)
	}
	all := objects(t)
	run := func(namespace, account string, ports []int32) bool {
		return slices.ContainsFunc(pods(all), func(p pod) bool {
			return p.namespace == namespace && p.spec.ServiceAccountName == account && !slices.ContainsFunc(ports, func(n int32) bool { return !p.has(n) })
		})
	}
	policies := of[*v1alpha1.AllowPolicy](all)
	if len(policies) != 4 {
		t.Errorf("%d policies, want 4", len(policies))
	}
	for _, p := range policies {
		if len(p.Spec.Ports) == 0 || !run(p.Namespace, p.Spec.Target.ServiceAccount, p.Spec.Ports) {
			t.Errorf("%s: nothing runs as %q with ports %d", p.Name, p.Spec.Target.ServiceAccount, p.Spec.Ports)
		}
		for _, from := range p.Spec.From {
			namespace, account, ok := strings.Cut(from.ServiceAccount, "/")
			if !ok {
				namespace, account = p.Namespace, from.ServiceAccount
			}
			if !run(namespace, account, nil) {
				t.Errorf("%s: nothing runs as %s/%s", p.Name, namespace, account)
			}
		}
	}
	for _, ns := range of[*corev1.Namespace](all) {
		if ns.Annotations[v1alpha1.AnnotationMesh] != "enforce" {
			t.Errorf("namespace %s is not enforced", ns.Name)
		}
	}
}

// Defends the example's purpose: it has to show what is awkward about pods.
func TestAwkwardPods(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range pods(objects(t)) {
		for _, c := range p.containers() {
			for _, probe := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe, c.StartupProbe} {
				if probe != nil {
					seen["http"] = seen["http"] || probe.HTTPGet != nil
					seen["tcp"] = seen["tcp"] || probe.TCPSocket != nil
					seen["exec"] = seen["exec"] || probe.Exec != nil
					seen["grpc"] = seen["grpc"] || probe.GRPC != nil
				}
			}
			seen["preStop"] = seen["preStop"] || c.Lifecycle != nil && c.Lifecycle.PreStop != nil
		}
		for _, c := range p.spec.InitContainers {
			sidecar := c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
			seen["sidecar"] = seen["sidecar"] || sidecar
			seen["init container"] = seen["init container"] || !sidecar
		}
	}
	for _, want := range []string{"http", "tcp", "exec", "grpc", "preStop", "sidecar", "init container"} {
		if !seen[want] {
			t.Errorf("no pod has a %s", want)
		}
	}
}

// Every file with documents is one that these tests read.
func TestAllFilesAreRead(t *testing.T) {
	found, err := filepath.Glob("manifests/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range found {
		if !slices.Contains(files, name) {
			t.Errorf("%s is not tested", name)
		}
	}
}

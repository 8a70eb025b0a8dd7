// Package deploy tests the Helm chart: what it asks of a cluster is written
// down here, so that asking for more is an edit that somebody sees.
package deploy

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	"sigs.k8s.io/yaml"

	"github.com/signet-mesh/signet/api/v1alpha1"
)

// helm runs Helm as the project pins it, with nothing of the user's.
func helm(ctx context.Context, t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	cmd := exec.CommandContext(ctx, "go", append([]string{"tool", "-modfile=../test/tools/helm/go.mod", "helm"}, args...)...)
	home := t.TempDir()
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home, "KUBECONFIG="+filepath.Join(home, "none"))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// release is what the chart makes, parsed.
type release struct {
	namespaces  []corev1.Namespace
	accounts    []corev1.ServiceAccount
	secrets     []corev1.Secret
	services    []corev1.Service
	deployments []appsv1.Deployment
	daemons     []appsv1.DaemonSet
	roles       []rbacv1.Role
	clusters    []rbacv1.ClusterRole
	configs     []v1alpha1.MeshConfig
	budgets     []policyv1.PodDisruptionBudget
	networks    []networkingv1.NetworkPolicy
	drivers     []storagev1.CSIDriver
	files       []corev1.ConfigMap
}

// render renders the chart. Fields that Kubernetes does not know are errors.
func render(t *testing.T, set ...string) release {
	t.Helper()
	args := []string{"template", "signet", "chart/signet", "--namespace", "signet-system", "--set", "trustDomain=mesh.example"}
	for _, s := range set {
		args = append(args, "--set", s)
	}
	out, errs, err := helm(t.Context(), t, args...)
	if err != nil {
		t.Fatalf("helm template: %v\n%s", err, errs)
	}
	var r release
	for doc := range strings.SplitSeq(out, "\n---\n") {
		var kind struct{ Kind string }
		if err := yaml.Unmarshal([]byte(doc), &kind); err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		switch kind.Kind {
		case "":
		case "Namespace":
			r.namespaces = parse(t, doc, r.namespaces)
		case "ServiceAccount":
			r.accounts = parse(t, doc, r.accounts)
		case "Secret":
			r.secrets = parse(t, doc, r.secrets)
		case "Service":
			r.services = parse(t, doc, r.services)
		case "Deployment":
			r.deployments = parse(t, doc, r.deployments)
		case "DaemonSet":
			r.daemons = parse(t, doc, r.daemons)
		case "Role":
			r.roles = parse(t, doc, r.roles)
		case "ClusterRole":
			r.clusters = parse(t, doc, r.clusters)
		case "MeshConfig":
			r.configs = parse(t, doc, r.configs)
		case "PodDisruptionBudget":
			r.budgets = parse(t, doc, r.budgets)
		case "NetworkPolicy":
			r.networks = parse(t, doc, r.networks)
		case "CSIDriver":
			r.drivers = parse(t, doc, r.drivers)
		case "ConfigMap":
			r.files = parse(t, doc, r.files)
		case "RoleBinding", "ClusterRoleBinding", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding":
		default:
			t.Errorf("the chart makes a %s, which no test looks at", kind.Kind)
		}
	}
	return r
}

func parse[T any](t *testing.T, doc string, to []T) []T {
	t.Helper()
	var object T
	if err := yaml.UnmarshalStrict([]byte(doc), &object); err != nil {
		t.Errorf("%v in\n%s", err, doc)
	}
	return append(to, object)
}

// pods has the pod templates by the name of what makes them.
func (r *release) pods() map[string]corev1.PodSpec {
	all := map[string]corev1.PodSpec{}
	for _, d := range r.deployments {
		all[d.Name] = d.Spec.Template.Spec
	}
	for _, d := range r.daemons {
		all[d.Name] = d.Spec.Template.Spec
	}
	return all
}

// variants are values that turn on what is off.
var variants = map[string][]string{
	"default": nil,
	"full": {"control.replicas=3", "networkPolicy.enabled=true", "namespace.create=true", "image.pullSecrets[0].name=registry",
		"control.digest=sha256:" + strings.Repeat("a", 64), "agent.digest=sha256:" + strings.Repeat("b", 64), "proxy.digest=sha256:" + strings.Repeat("c", 64)},
}

// Defends the cluster from the release: what each container may do is listed,
// and nobody gets a right by an edit elsewhere.
func TestPrivileges(t *testing.T) {
	type right struct {
		privileged   bool
		capabilities string
	}
	want := map[string]right{
		"signet-control/control": {},
		"signet-agent/agent":     {privileged: true},
		"signet-agent/cni":       {},
		"signet-proxy/proxy":     {capabilities: "NET_ADMIN SYS_ADMIN"},
	}
	wantPaths := map[string][]string{
		"signet-control": nil,
		"signet-agent": {"/etc/cni/net.d", "/opt/cni/bin", "/run/netns", "/run/signet", "/sys/fs/cgroup",
			"/var/lib/kubelet/plugins/csi.signet.dev", "/var/lib/kubelet/plugins_registry", "/var/lib/kubelet/pods", "/var/lib/signet"},
		"signet-proxy": {"/run/signet", "/var/lib/signet/agent"},
	}
	for variant, set := range variants {
		t.Run(variant, func(t *testing.T) {
			r := render(t, set...)
			seen := map[string]bool{}
			for owner, pod := range r.pods() {
				var paths []string
				for _, v := range pod.Volumes {
					if v.HostPath != nil {
						paths = append(paths, v.HostPath.Path)
					}
				}
				slices.Sort(paths)
				if !slices.Equal(paths, wantPaths[owner]) {
					t.Errorf("%s sees %q of the node, want %q", owner, paths, wantPaths[owner])
				}
				if onHost := owner != "signet-control"; pod.HostNetwork != onHost {
					t.Errorf("%s: hostNetwork is %v", owner, pod.HostNetwork)
				}
				if pod.HostPID != (owner == "signet-agent") || pod.HostIPC {
					t.Errorf("%s: hostPID %v, hostIPC %v", owner, pod.HostPID, pod.HostIPC)
				}
				if wants := owner != "signet-proxy"; pod.AutomountServiceAccountToken == nil || *pod.AutomountServiceAccountToken != wants {
					t.Errorf("%s: its token for the API server is to be mounted: %v", owner, wants)
				}
				if len(pod.InitContainers) > 0 {
					t.Errorf("%s has init containers, which no test looks at", owner)
				}
				for _, c := range pod.Containers {
					name := owner + "/" + c.Name
					w, ok := want[name]
					if !ok {
						t.Errorf("%s is not known", name)
						continue
					}
					seen[name] = true
					s := c.SecurityContext
					if got := s.Privileged != nil && *s.Privileged; got != w.privileged {
						t.Errorf("%s: privileged is %v", name, got)
					}
					if s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem {
						t.Errorf("%s can write to its root", name)
					}
					if w.privileged {
						continue // which overrides what follows
					}
					if s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation {
						t.Errorf("%s may gain privileges", name)
					}
					var added []string
					for _, c := range s.Capabilities.Add {
						added = append(added, string(c))
					}
					if got := strings.Join(added, " "); got != w.capabilities || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
						t.Errorf("%s: capabilities %q, dropped %q", name, got, s.Capabilities.Drop)
					}
					if pod.SecurityContext == nil && s.SeccompProfile == nil || s.SeccompProfile != nil && s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
						t.Errorf("%s: its system calls are not filtered", name)
					}
				}
			}
			if len(seen) != len(want) {
				t.Errorf("the release has the containers %v, want %d", seen, len(want))
			}
			control := r.pods()["signet-control"].SecurityContext
			if control == nil || control.RunAsNonRoot == nil || !*control.RunAsNonRoot || *control.RunAsUser == 0 || control.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
				t.Errorf("the control plane is not restricted: %+v", control)
			}
		})
	}
}

// Defends nodes from containers without bounds, and users from images that
// change under them.
func TestContainersAreBoundAndPinned(t *testing.T) {
	for variant, set := range variants {
		r := render(t, set...)
		for owner, pod := range r.pods() {
			for _, c := range pod.Containers {
				_, cpu := c.Resources.Requests[corev1.ResourceCPU]
				_, memory := c.Resources.Requests[corev1.ResourceMemory]
				_, limit := c.Resources.Limits[corev1.ResourceMemory]
				if !cpu || !memory || !limit {
					t.Errorf("%s: %s/%s: resources %+v", variant, owner, c.Name, c.Resources)
				}
				tail := ":v0.1.0"
				if variant == "full" {
					tail = "@sha256:" + strings.Repeat(map[string]string{"signet-control": "a", "signet-agent": "b", "signet-proxy": "c"}[owner], 64)
				}
				if want := "localhost/" + owner + tail; c.Image != want {
					t.Errorf("%s: %s/%s: image %s, want %s", variant, owner, c.Name, c.Image, want)
				}
			}
		}
	}
}

// Defends the cluster's objects: each right of Signet's own accounts is listed.
// The roles for users are the business of another test.
func TestRights(t *testing.T) {
	r := render(t)
	got := map[string][]string{}
	add := func(name string, rules []rbacv1.PolicyRule) {
		for _, rule := range rules {
			for _, g := range rule.APIGroups {
				for _, res := range rule.Resources {
					for _, v := range rule.Verbs {
						if strings.Contains(g+res+v, "*") || len(rule.NonResourceURLs) > 0 {
							t.Errorf("%s: a right to everything: %+v", name, rule)
						}
						what := strings.TrimSuffix(res+"."+g, ".")
						if len(rule.ResourceNames) > 0 {
							what += " " + strings.Join(rule.ResourceNames, ",")
						}
						got[name] = append(got[name], v+" "+what)
					}
				}
			}
		}
	}
	for _, c := range r.clusters {
		add("cluster "+c.Name, c.Rules)
	}
	for _, role := range r.roles {
		add(role.Name, role.Rules)
	}
	want := map[string]string{
		"cluster signet-control": `
			create events
			create tokenreviews.authentication.k8s.io
			get allowpolicies.signet.dev
			get endpointslices.discovery.k8s.io
			get federations.signet.dev
			get meshconfigs.signet.dev
			get namespaces
			get pods
			get quarantines.signet.dev
			get services
			list allowpolicies.signet.dev
			list endpointslices.discovery.k8s.io
			list federations.signet.dev
			list meshconfigs.signet.dev
			list namespaces
			list pods
			list quarantines.signet.dev
			list services
			patch allowpolicies/status.signet.dev
			patch federations/status.signet.dev
			patch meshconfigs/status.signet.dev
			patch namespaces
			patch quarantines/status.signet.dev
			watch allowpolicies.signet.dev
			watch endpointslices.discovery.k8s.io
			watch federations.signet.dev
			watch meshconfigs.signet.dev
			watch namespaces
			watch pods
			watch quarantines.signet.dev
			watch services`,
		"signet-control": `
			create configmaps
			create leases.coordination.k8s.io
			create secrets
			get configmaps signet-bundle
			get configmaps signet-federation
			get configmaps signet-joins
			get leases.coordination.k8s.io signet-control
			get secrets signet-ca,signet-jwt
			patch configmaps signet-bundle
			update configmaps signet-federation
			update configmaps signet-joins
			update leases.coordination.k8s.io signet-control
			update secrets signet-ca,signet-jwt`,
		"signet-agent": `
			get configmaps signet-bundle`,
		// Of the agents and of the account whose token shows that the release is there.
		"signet-witness": `
			get daemonsets.apps signet-agent`,
		"signet-operator": `
			create pods/portforward
			get daemonsets.apps
			get deployments.apps
			get pods/portforward
			list pods`,
		"cluster signet-operator": `
			get allowpolicies.signet.dev
			get customresourcedefinitions.apiextensions.k8s.io
			get federations.signet.dev
			get meshconfigs.signet.dev
			get namespaces
			get nodes
			get quarantines.signet.dev
			list allowpolicies.signet.dev
			list federations.signet.dev
			list meshconfigs.signet.dev
			list namespaces
			list nodes
			list quarantines.signet.dev`,
	}
	for name, text := range want {
		slices.Sort(got[name])
		if rights := "\n\t\t\t" + strings.Join(got[name], "\n\t\t\t"); rights != text {
			t.Errorf("%s may:%s\nwant:%s", name, rights, text)
		}
		delete(got, name)
	}
	for name := range got {
		switch name {
		case "cluster signet-view", "cluster signet-edit", "cluster signet-admin":
		default:
			t.Errorf("%s is not known", name)
		}
	}
	for _, a := range r.accounts {
		if a.AutomountServiceAccountToken == nil || *a.AutomountServiceAccountToken {
			t.Errorf("every pod of account %s gets its token", a.Name)
		}
	}
	// A token that never ends is for the account that may do next to nothing.
	if s := r.secrets; len(s) != 1 || s[0].Type != corev1.SecretTypeServiceAccountToken || s[0].Annotations[corev1.ServiceAccountNameKey] != "signet-witness" || len(s[0].Data) > 0 {
		t.Errorf("secrets: %+v", s)
	}
}

// Holds what docs/kubernetes.md says of names, ports, tokens and upgrades,
// which other programs rely on.
func TestWhatOthersRelyOn(t *testing.T) {
	r := render(t, "proxy.drainSeconds=120")
	if s := r.services; len(s) != 1 || s[0].Name != "signet-control" || len(s[0].Spec.Ports) != 1 || s[0].Spec.Ports[0].Port != 9443 {
		t.Errorf("services: %+v", s)
	}
	if c := r.configs; len(c) != 1 || c[0].Name != "mesh" || c[0].Spec.TrustDomain != "mesh.example" {
		t.Errorf("mesh: %+v", c)
	}
	for _, d := range r.daemons {
		pod := d.Spec.Template.Spec
		u := d.Spec.UpdateStrategy.RollingUpdate
		if !slices.ContainsFunc(pod.Tolerations, func(x corev1.Toleration) bool { return x.Operator == "Exists" && x.Key == "" && x.Effect == "" }) {
			t.Errorf("%s is missing on nodes with taints", d.Name)
		}
		if pod.PriorityClassName != "system-node-critical" {
			t.Errorf("%s: priority class %q", d.Name, pod.PriorityClassName)
		}
		var run *corev1.VolumeMount
		for _, m := range pod.Containers[0].VolumeMounts {
			if m.MountPath == "/run/signet" {
				run = &m
			}
		}
		switch d.Name {
		case "signet-agent":
			if u.MaxUnavailable.IntValue() != 1 || u.MaxSurge.IntValue() != 0 {
				t.Errorf("two agents would be on a node: %+v", u)
			}
			if *run.MountPropagation != corev1.MountPropagationBidirectional {
				t.Error("what the agent pins does not outlive it")
			}
			if token := projected(pod); token == nil || token.Audience != "signet-control" || *token.ExpirationSeconds != 600 || token.Path != "token" {
				t.Errorf("token to join with: %+v", token)
			}
		case "signet-proxy":
			if u.MaxUnavailable.IntValue() != 0 || u.MaxSurge.IntValue() != 1 {
				t.Errorf("a node is without a proxy while it is replaced: %+v", u)
			}
			if *pod.TerminationGracePeriodSeconds <= 120 {
				t.Errorf("a proxy is killed after %d s while it may drain for 120", *pod.TerminationGracePeriodSeconds)
			}
			if *run.MountPropagation != corev1.MountPropagationHostToContainer {
				t.Error("the proxy does not see namespaces that are pinned after it started")
			}
			if pod.Containers[0].ReadinessProbe == nil {
				t.Error("the old proxy would be ended before the new one serves")
			}
			for _, p := range pod.Containers[0].Ports {
				t.Errorf("port %d of the node keeps a second proxy off it", p.ContainerPort)
			}
		default:
			t.Errorf("DaemonSet %s is not known", d.Name)
		}
	}
	if len(r.budgets) > 0 || len(r.networks) > 0 || len(r.namespaces) > 0 {
		t.Error("something is made that was not asked for")
	}
	full := render(t, variants["full"]...)
	if len(full.budgets) != 1 || len(full.networks) != 1 || len(full.namespaces) != 1 {
		t.Error("something is missing that was asked for")
	}
	if level := full.namespaces[0].Labels["pod-security.kubernetes.io/enforce"]; level != "privileged" {
		t.Errorf("the namespace's level is %q, which keeps the agent out", level)
	}
}

// Defends pods from somebody else's certificate: the driver goes by what kubelet says
// of a pod, and nothing of it is there when it is switched off.
func TestVolumes(t *testing.T) {
	r := render(t, "csi.kubeletDir=/opt/kubelet")
	if len(r.drivers) != 1 || r.drivers[0].Name != "csi.signet.dev" {
		t.Fatalf("drivers: %+v", r.drivers)
	}
	s := r.drivers[0].Spec
	if s.PodInfoOnMount == nil || !*s.PodInfoOnMount || s.AttachRequired == nil || *s.AttachRequired ||
		!slices.Equal(s.VolumeLifecycleModes, []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecycleEphemeral}) {
		t.Errorf("the driver: %+v", s)
	}
	agent := r.pods()["signet-agent"].Containers[0]
	if !slices.Contains(agent.Args, "--kubelet-dir=/opt/kubelet") {
		t.Errorf("the agent is called with %q", agent.Args)
	}
	i := slices.IndexFunc(agent.VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/opt/kubelet/pods" })
	if i < 0 || *agent.VolumeMounts[i].MountPropagation != corev1.MountPropagationBidirectional {
		t.Errorf("what the agent mounts for pods does not reach them: %+v", agent.VolumeMounts)
	}
	off := render(t, "csi.enabled=false")
	agent = off.pods()["signet-agent"].Containers[0]
	if len(off.drivers) > 0 || strings.Contains(fmt.Sprint(off.pods(), agent.Args), "kubelet") {
		t.Errorf("switched off there is %+v, %+v", off.drivers, agent)
	}
}

// Holds that the bundle is shown where the values say, that the certificate of the
// web's authorities is what the Secret has, and that nothing of it is there unless it
// was asked for.
func TestBundleEndpoint(t *testing.T) {
	flags := func(r release) (out []string) {
		for _, arg := range r.deployments[0].Spec.Template.Spec.Containers[0].Args {
			if strings.Contains(arg, "bundle") || strings.Contains(arg, "web") || strings.Contains(arg, "oidc") {
				out = append(out, arg)
			}
		}
		return out
	}
	if got := flags(render(t)); len(got) > 0 {
		t.Errorf("by default: %q", got)
	}
	r := render(t, "federation.spiffe.enabled=true", "federation.web.enabled=true", "federation.web.certificateSecret=public", "federation.web.oidcIssuer=https://oidc.mesh.example", "federation.service.type=NodePort", "networkPolicy.enabled=true")
	want := []string{"--bundle-refresh-hint=5m", "--bundle-listen=:8443", "--bundle-web-listen=:8444", "--web-certificate=/etc/signet/web/tls.crt", "--web-key=/etc/signet/web/tls.key", "--oidc-issuer=https://oidc.mesh.example"}
	if got := flags(r); !slices.Equal(got, want) {
		t.Errorf("flags %q, want %q", got, want)
	}
	at := slices.IndexFunc(r.services, func(s corev1.Service) bool { return s.Name == "signet-federation" })
	if at < 0 || r.services[at].Spec.Type != corev1.ServiceTypeNodePort || len(r.services[at].Spec.Ports) != 2 || r.services[at].Spec.Ports[0].Port != 8443 || r.services[at].Spec.Ports[1].Port != 443 {
		t.Errorf("services %+v", r.services)
	}
	pod := r.deployments[0].Spec.Template.Spec
	if !slices.ContainsFunc(pod.Volumes, func(v corev1.Volume) bool {
		return v.Name == "web" && v.Secret != nil && v.Secret.SecretName == "public"
	}) {
		t.Errorf("volumes %+v", pod.Volumes)
	}
	if pod := render(t, "federation.webAuthorities=roots").deployments[0].Spec.Template.Spec; !slices.ContainsFunc(pod.Volumes, func(v corev1.Volume) bool { return v.ConfigMap != nil && v.ConfigMap.Name == "roots" }) ||
		!slices.ContainsFunc(pod.Containers[0].VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/etc/ssl/certs" }) {
		t.Errorf("the web's authorities: %+v", pod.Volumes)
	}
	for _, p := range r.services[at].Spec.Ports {
		if !slices.ContainsFunc(pod.Containers[0].Ports, func(c corev1.ContainerPort) bool { return c.Name == p.TargetPort.String() }) {
			t.Errorf("the Service leads to a port %s that is none", &p.TargetPort)
		}
	}
	if in := r.networks[0].Spec.Ingress; len(in) != 3 {
		t.Errorf("the network policy lets in %+v", in)
	}
}

func projected(pod corev1.PodSpec) *corev1.ServiceAccountTokenProjection {
	for _, v := range pod.Volumes {
		if v.Projected != nil {
			return v.Projected.Sources[0].ServiceAccountToken
		}
	}
	return nil
}

// TestCertManager: what a mesh below cert-manager needs is there, and only then: it
// may ask in its own namespace, and cannot approve.
func TestCertManager(t *testing.T) {
	const group = "cert-manager.io"
	rules := func(r release) (out []string) {
		for _, c := range r.clusters {
			for _, rule := range c.Rules {
				if slices.Contains(rule.APIGroups, group) {
					t.Errorf("a right in every namespace: %+v", rule)
				}
			}
		}
		for _, role := range r.roles {
			for _, rule := range role.Rules {
				if slices.Contains(rule.APIGroups, group) {
					out = append(out, strings.Join(rule.Resources, ",")+": "+strings.Join(rule.Verbs, ","))
				}
			}
		}
		return out
	}
	if got := rules(render(t)); len(got) != 0 {
		t.Errorf("without cert-manager: %v", got)
	}
	r := render(t, "certManager.enabled=true", "certManager.issuerRef.name=company", "certManager.roots=PEM")
	if got := rules(r); len(got) != 1 || got[0] != "certificaterequests: create,get,list,delete" {
		t.Errorf("with it: %v", got)
	}
	if len(r.files) != 1 || r.files[0].Data["roots.pem"] != "PEM" {
		t.Errorf("the roots' file is %+v", r.files)
	}
	for _, d := range r.deployments {
		args := d.Spec.Template.Spec.Containers[0].Args
		for _, want := range []string{"--cert-manager-issuer=company", "--cert-manager-issuer-kind=ClusterIssuer", "--cert-manager-mode=intermediate", "--cert-manager-roots=/etc/signet/roots/roots.pem"} {
			if !slices.Contains(args, want) {
				t.Errorf("%s is not among %q", want, args)
			}
		}
		if strings.Contains(strings.Join(args, " "), "workload-issuer") {
			t.Errorf("a second issuer that nobody named: %q", args)
		}
	}
	r = render(t, "certManager.enabled=true", "certManager.issuerRef.name=company", "certManager.mode=per-workload", "certManager.workloadIssuerRef.name=leaves", "certManager.workloadIssuerRef.kind=Issuer")
	for _, d := range r.deployments {
		args := d.Spec.Template.Spec.Containers[0].Args
		for _, want := range []string{"--cert-manager-mode=per-workload", "--cert-manager-workload-issuer=leaves", "--cert-manager-workload-issuer-kind=Issuer", "--cert-manager-workload-issuer-group=cert-manager.io"} {
			if !slices.Contains(args, want) {
				t.Errorf("%s is not among %q", want, args)
			}
		}
	}
}

// Defends users from values that would break only once they run: each is
// refused with words that name it.
func TestSchemaRefuses(t *testing.T) {
	for _, c := range []struct{ set, names string }{
		{"trustDomain=", "trustDomain"},
		{"trustDomain=spiffe://mesh.example", "trustDomain"},
		{"trustDomain=Mesh.Example", "trustDomain"},
		{"mesh.svidTTL=1 hour", "svidTTL"},
		{"mesh.unknownDestinations=allow", "unknownDestinations"},
		{"image.tag=latest", "tag"},
		{"image.registry=", "registry"},
		{"image.pullPolicy=Sometimes", "pullPolicy"},
		{"control.replicas=0", "replicas"},
		{"control.digest=sha256:abc", "digest"},
		{"cni.binDir=opt/cni/bin", "binDir"},
		{"cni.confDir=/etc/../root", "confDir"},
		{"csi.kubeletDir=kubelet", "kubeletDir"},
		{"csi.enabled=yes", "enabled"},
		{"proxy.drainSeconds=-1", "drainSeconds"},
		{"proxy.drainSeconds=1h", "drainSeconds"},
		{"agent.resources.limits.memory=null", "memory"},
		{"agent.privileged=false", "privileged"},
		{"federation.web.enabled=true", "certificateSecret"},
		{"federation.web.oidcIssuer=https://oidc.example", "oidcIssuer"},
		{"federation.refreshHint=often", "refreshHint"},
		{"federation.service.type=Headless", "type"},
		{"trustdomain=mesh.example", "trustdomain"},
		{"certManager.enabled=true", "name"},
		{"certManager.issuerRef.name=Company", "name"},
		{"certManager.duration=a week", "duration"},
		{"certManager.mode=strict", "mode"},
		{"certManager.workloadIssuerRef.name=leaves", "workloadIssuerRef"}, // of no use in the other mode
	} {
		_, errs, err := helm(t.Context(), t, "template", "signet", "chart/signet", "--set", "trustDomain=mesh.example", "--set", c.set)
		if err == nil || !strings.Contains(errs, c.names) || !strings.Contains(errs, "schema") {
			t.Errorf("--set %s: %v %s", c.set, err, errs)
		}
	}
}

// Defends those who install without Helm: plain manifests and copies of the
// definitions are what their sources say.
func TestManifestsAreCurrent(t *testing.T) {
	definitions, err := filepath.Glob("crds/*.yaml")
	if err != nil || len(definitions) != 4 {
		t.Fatal(definitions, err)
	}
	for _, name := range definitions {
		copied := filepath.Join("chart/signet/crds", filepath.Base(name))
		if err := same(name, copied); err != nil {
			t.Errorf("%v; run make manifests", err)
		}
	}
	out, errs, err := helm(t.Context(), t, "template", "signet", "chart/signet", "--namespace", "signet-system", "--set", "trustDomain=cluster.local", "--set", "namespace.create=true")
	if err != nil {
		t.Fatal(errs, err)
	}
	have, err := os.ReadFile("manifests/signet.yaml")
	if err != nil || !strings.HasSuffix(string(have), out) {
		t.Errorf("manifests/signet.yaml is not what the chart says (%v); run make manifests", err)
	}
	if _, errs, err := helm(t.Context(), t, "lint", "--strict", "--set", "trustDomain=mesh.example", "chart/signet"); err != nil {
		t.Errorf("helm lint: %v %s", err, errs)
	}
}

func same(a, b string) error {
	one, err := os.ReadFile(a)
	if err != nil {
		return err
	}
	other, err := os.ReadFile(b)
	if err != nil {
		return err
	}
	if !bytes.Equal(one, other) {
		return fmt.Errorf("%s is not what %s says", b, a)
	}
	return nil
}

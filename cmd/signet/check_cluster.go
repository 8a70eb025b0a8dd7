package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/kubeclient"
)

var (
	subjectAPIServer  = subject{"SIG0501", "API server", "everything the mesh knows of a cluster comes from it"}
	subjectAccess     = subject{"SIG0502", "permissions", "installing the chart makes these objects"}
	subjectCRDs       = subject{"SIG0503", "resource definitions", "policies are resources of the cluster"}
	subjectNodes      = subject{"SIG0504", "nodes", "the agent sets rules in the kernel of every node"}
	subjectRuntime    = subject{"SIG0505", "container runtimes", "the agent finds the pods of a node through the kernel and CNI"}
	subjectCNI        = subject{"SIG0506", "CNI", "a pod is captured before its first process runs, by a plugin at the end of the chain"}
	subjectAdmission  = subject{"SIG0507", "pod security", "the agent and the CNI installer are privileged"}
	subjectControl    = subject{"SIG0511", "control plane", "it issues certificates and configures the nodes"}
	subjectAgents     = subject{"SIG0512", "agents", "a node without one takes part in nothing, and pods of enrolled namespaces do not start there"}
	subjectProxies    = subject{"SIG0513", "proxies", "captured pods have no network without one"}
	subjectAdmin      = subject{"SIG0514", "operator's way in", "status, audit and certs go through the API server's port-forward"}
	subjectEnrolled   = subject{"SIG0515", "enrolled pods", "a pod that is not captured is not in the mesh, whatever its namespace says"}
	subjectCerts      = subject{"SIG0516", "certificates", "a certificate that is not renewed ends its workload's connections"}
	subjectVersions   = subject{"SIG0517", "versions", "parts may differ by one minor version while an upgrade is under way"}
	subjectAnswers    = subject{"SIG0518", "answers of nodes", "what a silent node does is not known"}
	subjectAbove      = subject{"SIG0520", "authority above", "when its intermediate ends, nothing is signed any more"}
	subjectConfigured = subject{"SIG0519", "policies in force", "a document that was refused is not in force"}
)

// oldestMinor is the oldest Kubernetes 1.x that has what is used: admission
// policies by ValidatingAdmissionPolicy.
const oldestMinor = 30

// crds are the resources that the chart brings.
var crds = []string{"allowpolicies.signet.dev", "federations.signet.dev", "meshconfigs.signet.dev", "quarantines.signet.dev"}

// installs is what whoever installs the chart must be allowed to.
func installs(namespace string) []kubeclient.Access {
	all := []kubeclient.Access{
		{Verb: "create", Resource: "namespaces"},
		{Verb: "create", Group: "apiextensions.k8s.io", Resource: "customresourcedefinitions"},
		{Verb: "create", Group: "admissionregistration.k8s.io", Resource: "validatingadmissionpolicies"},
		{Verb: "create", Group: "admissionregistration.k8s.io", Resource: "validatingadmissionpolicybindings"},
		{Verb: "create", Group: "rbac.authorization.k8s.io", Resource: "clusterroles"},
		{Verb: "create", Group: "rbac.authorization.k8s.io", Resource: "clusterrolebindings"},
	}
	for _, r := range []struct{ group, resource string }{
		{"apps", "deployments"}, {"apps", "daemonsets"}, {"rbac.authorization.k8s.io", "roles"}, {"rbac.authorization.k8s.io", "rolebindings"},
		{"", "serviceaccounts"}, {"", "services"}, {"", "configmaps"}, {"", "secrets"},
	} {
		all = append(all, kubeclient.Access{Verb: "create", Group: r.group, Resource: r.resource, Namespace: namespace})
	}
	return all
}

// checkCluster looks at a cluster before Signet is installed in it, and at the
// installation after that.
func (a *app) checkCluster(ctx context.Context) ([]check, error) {
	kube, err := a.kube()
	if err != nil {
		return nil, err
	}
	defer kube.Close()
	defer (&progress{out: a.err}).begin("asking " + kube.Server())()
	first := checkAPIServer(ctx, kube)
	if first.Level == levelError {
		return []check{first}, nil
	}
	_, err = kube.Control(ctx, a.cluster.namespace)
	installed := !errors.Is(err, kubeclient.ErrNotInstalled)
	checks := []check{first}
	if !installed {
		checks = append(checks, a.checkAccess(ctx, kube))
	}
	checks = append(checks, checkCRDs(ctx, kube, installed))
	checks = append(checks, checkNodes(ctx, kube)...)
	if !installed {
		return append(checks, subjectCNI.ok("the nodes' CNI configuration cannot be seen through the API server; any conflist can be extended, and `signet check` on a node tells of its kernel"),
			a.checkAdmission(ctx, kube),
			subjectControl.ok("not installed in namespace %s", a.cluster.namespace)), nil
	}
	return append(checks, a.checkInstalled(ctx, kube)...), nil
}

// failed is the outcome of a question that the API server did not answer.
func (s subject) failed(err error) check {
	return s.error("let whoever checks read this, or check as somebody who may", "%s", oneLine(err))
}

func checkAPIServer(ctx context.Context, kube *kubeclient.Cluster) check {
	s := subjectAPIServer
	var v struct{ Major, Minor, GitVersion string }
	if err := kube.Get(ctx, "/version", nil, &v); err != nil {
		return s.error("look at the network and the credentials: kubectl version", "%s", oneLine(err))
	}
	minor, err := strconv.Atoi(strings.TrimRight(v.Minor, "+"))
	if v.Major != "1" || err != nil {
		return s.error("use Kubernetes 1."+strconv.Itoa(oldestMinor)+" or newer", "%s has the version %s, which is not known", kube.Server(), v.GitVersion)
	}
	if minor < oldestMinor {
		return s.error("upgrade the cluster to Kubernetes 1."+strconv.Itoa(oldestMinor)+" or newer", "%s is %s", kube.Server(), v.GitVersion)
	}
	return s.ok("%s is %s", kube.Server(), v.GitVersion)
}

func (a *app) checkAccess(ctx context.Context, kube *kubeclient.Cluster) check {
	not, err := kube.MayI(ctx, installs(a.cluster.namespace))
	if err != nil {
		return subjectAccess.failed(err)
	}
	if len(not) > 0 {
		var words []string
		for _, n := range not {
			words = append(words, n.String())
		}
		return subjectAccess.error("install as cluster-admin, or have these allowed", "you may not %s", strings.Join(words, "; "))
	}
	return subjectAccess.ok("you may make all that the chart has")
}

func checkCRDs(ctx context.Context, kube *kubeclient.Cluster, installed bool) check {
	s := subjectCRDs
	var there, absent []string
	for _, name := range crds {
		var crd struct {
			Status struct {
				Conditions []struct{ Type, Status, Message string }
			}
		}
		err := kube.Get(ctx, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/"+name, nil, &crd)
		switch {
		case apierrors.IsNotFound(err):
			absent = append(absent, name)
			continue
		case err != nil:
			return s.failed(err)
		}
		there = append(there, name)
		for _, c := range crd.Status.Conditions {
			if c.Type == "Established" && c.Status != "True" {
				return s.error("kubectl describe crd "+name, "%s is not established: %s", name, c.Message)
			}
		}
	}
	switch {
	case len(absent) == 0 && installed:
		return s.ok("%s", strings.Join(there, ", "))
	case len(absent) == 0:
		return s.ok("%s are there, from an installation before this; the policies in them are kept", strings.Join(there, ", "))
	case len(there) == 0 && !installed:
		return s.ok("absent; the chart brings them")
	}
	return s.error("apply deploy/crds, or install the chart again", "absent: %s", strings.Join(absent, ", "))
}

// checkNodes looks at the kernels and runtimes that the nodes report.
func checkNodes(ctx context.Context, kube *kubeclient.Cluster) []check {
	nodes, err := kubeclient.ListOf[corev1.Node](ctx, kube, "/api/v1/nodes")
	if err != nil {
		return []check{subjectNodes.failed(err)}
	}
	var old, foreign, runtimes, known []string
	for i := range nodes {
		info := nodes[i].Status.NodeInfo
		if info.OperatingSystem != "linux" {
			foreign = append(foreign, nodes[i].Name+" ("+info.OperatingSystem+")")
			continue
		}
		if olderKernel(info.KernelVersion) {
			old = append(old, nodes[i].Name+" ("+info.KernelVersion+")")
		}
		name, _, _ := strings.Cut(info.ContainerRuntimeVersion, "://")
		if name != "containerd" && name != "cri-o" {
			runtimes = append(runtimes, nodes[i].Name+" ("+info.ContainerRuntimeVersion+")")
		} else if !slices.Contains(known, name) {
			known = append(known, name)
		}
	}
	var checks []check
	switch {
	case len(nodes) == 0:
		checks = append(checks, subjectNodes.error("add a node", "the cluster has none"))
	case len(old) > 0:
		checks = append(checks, subjectNodes.error("upgrade these to a kernel of "+oldestKernel+" or newer", "too old a kernel: %s", strings.Join(old, ", ")))
	case len(foreign) > 0:
		checks = append(checks, subjectNodes.warning("keep enrolled namespaces off these nodes", "%s; pods cannot be in the mesh on %s", plural(len(nodes), "node", "nodes"), strings.Join(foreign, ", ")))
	default:
		checks = append(checks, subjectNodes.ok("%s, each with a kernel of %s or newer", plural(len(nodes), "node", "nodes"), oldestKernel))
	}
	if len(runtimes) > 0 {
		return append(checks, subjectRuntime.warning("use containerd or CRI-O; with others Signet is not tried", "%s", strings.Join(runtimes, ", ")))
	}
	return append(checks, subjectRuntime.ok("%s", orNone(strings.Join(known, ", "))))
}

// checkAdmission looks whether the release's namespace lets privileged pods in.
func (a *app) checkAdmission(ctx context.Context, kube *kubeclient.Cluster) check {
	s := subjectAdmission
	var ns corev1.Namespace
	err := kube.Get(ctx, "/api/v1/namespaces/"+a.cluster.namespace, nil, &ns)
	level := ns.Labels["pod-security.kubernetes.io/enforce"]
	switch {
	case apierrors.IsNotFound(err):
		return s.ok("namespace %s is not there yet; the chart labels it", a.cluster.namespace)
	case err != nil:
		return s.failed(err)
	case level != "" && level != "privileged":
		return s.error(fmt.Sprintf("kubectl label --overwrite namespace %s pod-security.kubernetes.io/enforce=privileged", a.cluster.namespace), "namespace %s lets no privileged pods in: it enforces %q", a.cluster.namespace, level)
	}
	return s.ok("namespace %s lets privileged pods in, as far as its labels say", a.cluster.namespace)
}

// checkInstalled looks at a release.
func (a *app) checkInstalled(ctx context.Context, kube *kubeclient.Cluster) []check {
	checks := []check{a.checkDeployment(ctx, kube), a.checkDaemonSet(ctx, kube, subjectAgents, kubeclient.AgentName), a.checkDaemonSet(ctx, kube, subjectProxies, kubeclient.ProxyName)}
	l, err := a.reach(ctx, kube)
	if err != nil {
		return append(checks, subjectAdmin.error("mend what is said, or what comes before", "%s", oneLine(err)))
	}
	// The link's end would be the cluster's, which the caller still has.
	l.close = l.close[1:]
	defer l.Close()
	doc, err := a.clusterStatus(ctx, l)
	if err != nil {
		return append(checks, subjectAdmin.error("kubectl -n "+a.cluster.namespace+" logs deployment/"+kubeclient.ControlName, "%s", oneLine(err)))
	}
	checks = append(checks, subjectAdmin.ok("the control plane answers, trust domain %s", doc.Control.TrustDomain), checkAnswers(doc), checkConfigured(doc), checkEnrolled(doc))
	certs, err := l.MeshCertificates(ctx, "")
	if err != nil {
		checks = append(checks, subjectCerts.error("kubectl -n "+a.cluster.namespace+" logs deployment/"+kubeclient.ControlName, "%s", oneLine(err)))
	} else {
		var bad []string
		for _, c := range certs.Certificates {
			if s := judgeCert(c.Certificate, a.now()); s.bad() {
				bad = append(bad, fmt.Sprintf("%s on %s is %s", c.Holder, c.Node, s.State))
			}
		}
		if len(bad) > 0 {
			checks = append(checks, subjectCerts.error("`signet certs` tells why", "%s", few(bad)))
		} else {
			checks = append(checks, subjectCerts.ok("%s, none expired or failing", plural(len(certs.Certificates), "certificate", "certificates")))
		}
	}
	if authority, err := l.Authority(ctx); err != nil {
		checks = append(checks, subjectAbove.error("kubectl -n "+a.cluster.namespace+" logs deployment/"+kubeclient.ControlName, "%s", oneLine(err)))
	} else if authority.Upstream != nil {
		checks = append(checks, checkAbove(authority.Upstream, a.now()))
	}
	return append(checks, checkVersions(doc))
}

// checkAbove: a request that waits is nothing to see to while the present
// intermediate has most of its second half before it.
func checkAbove(u *adminv1.UpstreamStatus, now time.Time) check {
	s := subjectAbove
	fix := "see to what is said; `signet ca status` tells more"
	switch {
	case u.Reason == "Ready":
		return s.ok("%s", u.Message)
	case now.Before(u.NotAfter):
		return s.warning(fix, "%s: %s; the present intermediate signs until %s", u.Reason, u.Message, u.NotAfter.UTC().Format(time.RFC3339))
	}
	return s.error(fix, "%s: %s", u.Reason, u.Message)
}

func (a *app) checkDeployment(ctx context.Context, kube *kubeclient.Cluster) check {
	d, err := kube.Control(ctx, a.cluster.namespace)
	want := int32(1)
	if d.Spec.Replicas != nil {
		want = *d.Spec.Replicas
	}
	switch {
	case err != nil:
		return subjectControl.failed(err)
	case d.Status.ReadyReplicas < want || want == 0 || d.Status.ObservedGeneration < d.Generation:
		return subjectControl.error(fmt.Sprintf("kubectl -n %s describe deployment,pods", a.cluster.namespace), "%d of %s ready", d.Status.ReadyReplicas, plural(int(want), "replica", "replicas"))
	case d.Status.UpdatedReplicas < want:
		return subjectControl.warning("wait for the upgrade, or see kubectl rollout status", "%d of %s are of the newest version", d.Status.UpdatedReplicas, plural(int(want), "replica", "replicas"))
	}
	return subjectControl.ok("%d of %s ready", d.Status.ReadyReplicas, plural(int(want), "replica", "replicas"))
}

func (a *app) checkDaemonSet(ctx context.Context, kube *kubeclient.Cluster, s subject, name string) check {
	var d appsv1.DaemonSet
	err := kube.Get(ctx, "/apis/apps/v1/namespaces/"+a.cluster.namespace+"/daemonsets/"+name, nil, &d)
	want := plural(int(d.Status.DesiredNumberScheduled), "node", "nodes")
	switch {
	case apierrors.IsNotFound(err):
		return s.error("install the chart again", "DaemonSet %s is absent", name)
	case err != nil:
		return s.failed(err)
	case d.Status.NumberReady < d.Status.DesiredNumberScheduled || d.Status.ObservedGeneration < d.Generation:
		return s.error(fmt.Sprintf("kubectl -n %s describe daemonset %s; kubectl -n %s get pods -o wide", a.cluster.namespace, name, a.cluster.namespace), "ready on %d of %s", d.Status.NumberReady, want)
	case d.Status.DesiredNumberScheduled == 0:
		return s.error("see the node selector and tolerations of DaemonSet "+name, "wanted on no node")
	case d.Status.UpdatedNumberScheduled < d.Status.DesiredNumberScheduled:
		return s.warning("wait for the upgrade, or see kubectl rollout status", "of the newest version on %d of %s", d.Status.UpdatedNumberScheduled, want)
	}
	return s.ok("ready on %d of %s", d.Status.NumberReady, want)
}

// few writes a list that may be long.
func few(all []string) string {
	const most = 5
	if len(all) <= most {
		return strings.Join(all, "; ")
	}
	return fmt.Sprintf("%s; and %d more", strings.Join(all[:most], "; "), len(all)-most)
}

func checkEnrolled(d *statusDoc) check {
	var bad []string
	pods := 0
	for _, ns := range d.Mesh.Namespaces {
		pods += ns.Pods
		for _, p := range ns.Problems {
			bad = append(bad, ns.Namespace+"/"+p.Pod+": "+p.Problem)
		}
	}
	if len(bad) > 0 {
		return subjectEnrolled.error("`signet status` tells of each", "%d of %s not captured: %s", len(bad), plural(pods, "pod", "pods"), few(bad))
	}
	return subjectEnrolled.ok("%s in %s, each captured", plural(pods, "pod", "pods"), plural(len(d.Mesh.Namespaces), "namespace", "namespaces"))
}

func checkAnswers(d *statusDoc) check {
	var bad []string
	for _, n := range d.Mesh.Missing {
		bad = append(bad, n.Node+": "+n.Error)
	}
	for i := range d.Mesh.Agents {
		if s := &d.Mesh.Agents[i]; !s.ControlConnected || !s.ProxyConnected {
			bad = append(bad, fmt.Sprintf("%s: control plane connected: %t, proxy connected: %t", s.Node, s.ControlConnected, s.ProxyConnected))
		}
	}
	if len(bad) > 0 {
		return subjectAnswers.error(missingFix, "%s", few(bad))
	}
	return subjectAnswers.ok("%s answer, each with its proxy", plural(len(d.Mesh.Agents), "node", "nodes"))
}

func checkConfigured(d *statusDoc) check {
	var bad []string
	for _, f := range d.Findings {
		if slices.Contains([]string{"SIG0302", "SIG0303", "SIG0305", "SIG0307", "SIG0308"}, f.Code) {
			bad = append(bad, f.Message)
		}
	}
	if len(bad) > 0 {
		return subjectConfigured.error("`signet status` tells of each, with a fix", "%s", few(bad))
	}
	return subjectConfigured.ok("%s", plural(d.Control.Policies, "policy", "policies"))
}

func checkVersions(d *statusDoc) check {
	own, _ := ownVersion()
	parts := map[string][]string{own: {"this program"}}
	add := func(version, part string) { parts[version] = append(parts[version], part) }
	add(d.Control.Version, "the control plane")
	for i := range d.Mesh.Agents {
		add(d.Mesh.Agents[i].Version, "node "+d.Mesh.Agents[i].Node)
	}
	if silent := parts[""]; len(silent) > 0 {
		return subjectVersions.warning("upgrade: newer versions say what they are", "not known of %s", few(silent))
	}
	if len(parts) == 1 {
		return subjectVersions.ok("%s everywhere", own)
	}
	var words []string
	for version, of := range parts {
		words = append(words, version+" ("+few(of)+")")
	}
	slices.Sort(words)
	return subjectVersions.warning("finish the upgrade, and use the program of the same version", "%s", strings.Join(words, ", "))
}

// olderKernel reports whether a kernel is older than what Signet is made for.
func olderKernel(release string) bool { return checkKernel(release).Level != levelOK }

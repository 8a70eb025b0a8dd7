package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/test/apiserver"
)

// clusterMesh is what the control plane of a test's cluster answers.
type clusterMesh struct {
	control adminv1.ControlStatus
	mesh    adminv1.MeshStatus
	certs   adminv1.MeshCertificates
	verify  adminv1.MeshVerification
	records []audit.Record
	missing []adminv1.MissingNode
	explain adminv1.Explanation
	ca      adminv1.AuthorityStatus
}

func (m *clusterMesh) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	enc := json.NewEncoder(w)
	switch r.URL.Path {
	case "/v1/status":
		_ = enc.Encode(m.control)
	case "/v1/ca/bundle":
		_ = enc.Encode(adminv1.TrustBundle{TrustDomain: "mesh.example", Document: testBundle})
	case "/v1/ca":
		_ = enc.Encode(m.ca)
	case "/v1/mesh/status":
		_ = enc.Encode(m.mesh)
	case "/v1/mesh/certificates":
		_ = enc.Encode(m.certs)
	case "/v1/mesh/audit/verify":
		_ = enc.Encode(m.verify)
	case "/v1/mesh/workload":
		if name := r.FormValue("name"); name == "shop/web-1" {
			_ = enc.Encode(adminv1.Workload{Workload: name, ID: id("shop/web"), Node: "n1", Mode: "enforce"})
			return
		}
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, `{"error":"name: it is no workload of this mesh"}`)
	case "/v1/explain":
		e := m.explain
		e.From, e.To = r.FormValue("from"), r.FormValue("to")
		_ = enc.Encode(e)
	case "/v1/mesh/audit":
		n := 0
		for _, rec := range m.records {
			if node := r.FormValue("node"); node == "" || node == rec.Node {
				n++
				_ = enc.Encode(rec)
			}
		}
		_ = enc.Encode(adminv1.AuditLast{Complete: adminv1.AuditEnd{Records: n, Missing: m.missing}})
	default:
		http.NotFound(w, r)
	}
}

const releasePath = "/apis/apps/v1/namespaces/signet-system/"

func policyObject(name string, accepted, programmed metav1.ConditionStatus, message string) v1alpha1.AllowPolicy {
	p := v1alpha1.AllowPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, CreationTimestamp: metav1.NewTime(testNow.Add(-time.Hour))}}
	p.Status = v1alpha1.AllowPolicyStatus{ProgrammedNodes: 1, Nodes: 2, Conditions: []metav1.Condition{
		{Type: v1alpha1.ConditionAccepted, Status: accepted, Message: message, LastTransitionTime: metav1.NewTime(testNow.Add(-time.Hour))},
		{Type: v1alpha1.ConditionProgrammed, Status: programmed, Message: message, LastTransitionTime: metav1.NewTime(testNow.Add(-time.Hour))},
	}}
	return p
}

func nodeObject(name, kernel, runtime string) corev1.Node {
	n := corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	n.Status.NodeInfo = corev1.NodeSystemInfo{KernelVersion: kernel, OperatingSystem: "linux", ContainerRuntimeVersion: runtime}
	return n
}

// startCluster starts an API server: one without Signet ("bare", or "poor",
// where nothing is as it should be), or with a mesh that is "well" or "ill".
// It writes a kubeconfig and returns its path.
func startCluster(dir, kind string) (path string, s *apiserver.Server, stop func(), err error) {
	s = apiserver.Start()
	version := map[string]string{"major": "1", "minor": "37", "gitVersion": "v1.37.2"}
	s.Objects["/version"] = version
	nodes := []corev1.Node{nodeObject("n1", "6.12.9", "containerd://2.1.0"), nodeObject("n2", "6.12.9", "containerd://2.1.0")}
	if kind != "bare" && kind != "poor" {
		for _, name := range crds {
			s.Objects["/apis/apiextensions.k8s.io/v1/customresourcedefinitions/"+name] = map[string]any{"status": map[string]any{"conditions": []any{map[string]string{"type": "Established", "status": "True"}}}}
		}
		replicas := int32(1)
		s.Objects[releasePath+"deployments/signet-control"] = appsv1.Deployment{
			Spec:   appsv1.DeploymentSpec{Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "signet-control"}}},
			Status: appsv1.DeploymentStatus{ReadyReplicas: 1, UpdatedReplicas: 1},
		}
		ready := int32(2)
		if kind == "ill" {
			ready = 1
		}
		for _, name := range []string{"signet-agent", "signet-proxy"} {
			s.Objects[releasePath+"daemonsets/"+name] = appsv1.DaemonSet{Status: appsv1.DaemonSetStatus{DesiredNumberScheduled: 2, NumberReady: ready, UpdatedNumberScheduled: 2}}
		}
		pod := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "signet-control-1"}}
		pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
		s.Objects["/api/v1/namespaces/signet-system/pods"] = corev1.PodList{Items: []corev1.Pod{pod}}
	}
	m := clusters[kind]
	switch kind {
	case "poor":
		version["minor"] = "30+"
		nodes = []corev1.Node{nodeObject("n1", "4.19.0", "docker://19.3")}
		s.Objects["/api/v1/namespaces/signet-system"] = corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"pod-security.kubernetes.io/enforce": "baseline"}}}
		s.Deny = func(r apiserver.Request) bool { return r.Resource == "clusterroles" || r.Resource == "daemonsets" }
	case "well":
		s.Objects["/apis/signet.dev/v1alpha1/allowpolicies"] = v1alpha1.AllowPolicyList{Items: []v1alpha1.AllowPolicy{policyObject("allow-web", "True", "True", "")}}
	case "ill":
		s.Objects["/apis/signet.dev/v1alpha1/allowpolicies"] = v1alpha1.AllowPolicyList{Items: []v1alpha1.AllowPolicy{
			policyObject("slow", "True", "False", "node n2 has not confirmed yet"), policyObject("bad", "False", "False", "spec.from[0].spiffeID: is no SPIFFE ID"),
		}}
	}
	s.Objects["/api/v1/nodes"] = corev1.NodeList{Items: nodes}
	var control *httptest.Server
	if m != nil {
		m.control.Version, _ = ownVersion()
		for i := range m.mesh.Agents {
			m.mesh.Agents[i].Version = m.control.Version
		}
		control = httptest.NewServer(m)
		s.Dial = func(ctx context.Context, _, _, port string) (net.Conn, error) {
			if port != "9441" {
				return nil, errors.New("connect: connection refused")
			}
			var d net.Dialer
			return d.DialContext(ctx, "tcp", control.Listener.Addr().String())
		}
	}
	path = filepath.Join(dir, "kubeconfig")
	stop = func() {
		s.Stop()
		if control != nil {
			control.CloseClientConnections()
			control.Close()
		}
	}
	return path, s, stop, os.WriteFile(path, []byte(s.Kubeconfig()), 0o600)
}

var clusters = map[string]*clusterMesh{
	"well": {
		control: adminv1.ControlStatus{
			TrustDomain: "mesh.example", Revision: "00112233445566ff", Since: testNow.Add(-time.Hour), Policies: 1,
			Nodes: []adminv1.NodeStatus{{Name: "n1", Connected: true, Revision: "00112233445566ff"}, {Name: "n2", Connected: true, Revision: "00112233445566ff"}},
		},
		mesh: adminv1.MeshStatus{
			Agents: []adminv1.AgentStatus{
				{Node: "n1", ControlConnected: true, ProxyConnected: true, Revision: "00112233445566ff", Workloads: []adminv1.WorkloadStatus{{Workload: "shop/web-1", ID: id("shop/web"), Mode: "enforce", Captured: true, Connections: 2}}},
				{Node: "n2", ControlConnected: true, ProxyConnected: true, Revision: "00112233445566ff", Audit: adminv1.AuditStatus{Records: 7}},
			},
			Namespaces: []adminv1.NamespaceStatus{{Namespace: "shop", Mode: "enforce", Pods: 1, Enrolled: 1}},
		},
		certs:   adminv1.MeshCertificates{Certificates: []adminv1.NodeCertificate{{Node: "n1", Certificate: adminv1.Certificate{Holder: "shop/web-1", ID: id("shop/web"), Serial: "02", NotBefore: testNow.Add(-time.Minute), NotAfter: testNow.Add(time.Hour), RenewAt: testNow.Add(30 * time.Minute), Issuer: "aa"}}}},
		verify:  adminv1.MeshVerification{Nodes: []adminv1.NodeVerification{{Node: "n1", AuditVerification: adminv1.AuditVerification{Batches: 1, Records: 2}}, {Node: "n2", AuditVerification: adminv1.AuditVerification{Batches: 3, Records: 5}}}},
		records: generated,
		explain: adminv1.Explanation{Port: 8443, Mode: "enforce", Verdict: "allowed", Reason: "allowed by pay/allow-checkout", Policy: "pay/allow-checkout"},
	},
	"ill": {
		control: adminv1.ControlStatus{
			TrustDomain: "mesh.example", Revision: "00112233445566ff", Since: testNow.Add(-time.Hour), Policies: 2,
			Nodes: []adminv1.NodeStatus{{Name: "n1", Connected: true, Revision: "00112233445566ff"}, {Name: "n2", Since: testNow.Add(-time.Minute)}},
		},
		mesh: adminv1.MeshStatus{
			Agents: []adminv1.AgentStatus{{Node: "n1", ControlConnected: true, Revision: "00112233445566ff"}},
			Namespaces: []adminv1.NamespaceStatus{{Namespace: "shop", Mode: "enforce", Pods: 3, Enrolled: 1, Problems: []adminv1.PodProblem{
				{Pod: "web-2", Node: "n1", Problem: "no rules in the kernel"}, {Pod: "web-3", Node: "n2", Problem: "not known: node n2 does not answer: no answer within 5s"},
			}}},
			Missing: []adminv1.MissingNode{{Node: "n2", Error: "no answer within 5s"}},
		},
		certs:   adminv1.MeshCertificates{Certificates: []adminv1.NodeCertificate{{Node: "n1", Certificate: adminv1.Certificate{Holder: "shop/web-1", ID: id("shop/web"), Serial: "02", NotBefore: testNow.Add(-time.Hour), NotAfter: testNow.Add(-time.Minute)}}}, Missing: []adminv1.MissingNode{{Node: "n2", Error: "no answer within 5s"}}},
		verify:  adminv1.MeshVerification{Nodes: []adminv1.NodeVerification{{Node: "n1", AuditVerification: adminv1.AuditVerification{Fault: "batch 2 does not follow batch 1"}}}},
		records: generated[:1],
		missing: []adminv1.MissingNode{{Node: "n2", Error: "no answer within 5s"}},
		ca: adminv1.AuthorityStatus{TrustDomain: "mesh.example", Stage: adminv1.RotationIdle, Upstream: &adminv1.UpstreamStatus{
			Name: "ClusterIssuer company", Reason: "Denied", Message: "isCA is not allowed", Wanted: "its life is half over",
			NotAfter: testNow.Add(time.Hour), RenewAt: testNow.Add(-time.Hour), RetryAt: testNow.Add(time.Minute)}},
		explain: adminv1.Explanation{Port: 8443, Mode: "enforce", Verdict: "denied", Reason: "default deny: no policy protects pay/ledger"},
	},
}

// runCluster runs the program against a kubeconfig, as HOME/.kube/config.
func runCluster(t *testing.T, called string, env map[string]string, argv ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	a := &app{in: strings.NewReader(""), out: &out, err: &errs, getenv: func(k string) string { return env[k] }, now: func() time.Time { return testNow }}
	argv = a.called(called, argv)
	return result{a.run(t.Context(), argv), out.String(), errs.String()}
}

// Which mesh is asked must follow from the command line and the machine, and
// never silently be another one than the user means.
func TestWhichMeshIsAsked(t *testing.T) {
	dir := t.TempDir()
	path, _, stop, err := startCluster(dir, "well")
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	local := t.TempDir()
	stopMesh, err := meshes["well"].serve(local)
	if err != nil {
		t.Fatal(err)
	}
	defer stopMesh()
	home := t.TempDir()
	if err := os.Mkdir(filepath.Join(home, ".kube"), 0o700); err != nil {
		t.Fatal(err)
	}
	config, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, ".kube", "config"), config, 0o600); err != nil {
		t.Fatal(err)
	}
	const cluster, machine = "NAMESPACE", "audit     3 records"
	empty := t.TempDir()
	for _, c := range []struct {
		name, called string
		env          map[string]string
		argv         string
		code         int
		want         string // in either output
	}{
		{"flag", "signet", nil, "status --kubeconfig " + path, 0, cluster},
		{"context before a local mesh", "signet", map[string]string{"KUBECONFIG": path, envRunDir: local}, "status --context test", 0, cluster},
		{"run-dir before a kubeconfig", "signet", map[string]string{"KUBECONFIG": path}, "status --run-dir " + local, 0, machine},
		{"SIGNET_RUN_DIR before a kubeconfig", "signet", map[string]string{"HOME": home, envRunDir: local}, "status", 0, machine},
		{"plugin", "kubectl-signet", map[string]string{"HOME": home, envRunDir: local}, "status", 0, cluster},
		{"both", "signet", nil, "status --context test --run-dir " + local, exitUsage, "give one of them"},
		{"namespace", "signet", map[string]string{"KUBECONFIG": path}, "status -n elsewhere", exitFailed, "signet is not installed in namespace elsewhere"},
		{"no credentials", "signet", map[string]string{"KUBECONFIG": path}, "status --context stranger", exitFailed, "does not know who you are"},
		{"no kubeconfig", "kubectl-signet", map[string]string{"HOME": empty}, "status", exitFailed, "no cluster is configured"},
		{"nothing", "signet", map[string]string{"HOME": empty, envRunDir: empty}, "status", exitFailed, "signet up"},
	} {
		got := runCluster(t, c.called, c.env, strings.Fields(c.argv)...)
		if got.code != c.code || !strings.Contains(got.out+got.err, c.want) {
			t.Errorf("%s: %+v, want %d and %q", c.name, got, c.code, c.want)
		}
	}
	// No flag, no mesh on this machine, and a kubeconfig: the cluster.
	var errs, out bytes.Buffer
	a := &app{out: &out, err: &errs, runDir: empty, getenv: func(k string) string { return map[string]string{"HOME": home}[k] }, now: func() time.Time { return testNow }}
	root := a.newRoot()
	a.runDir = empty
	cmd, _, err := root.Find([]string{"status"})
	if err != nil {
		t.Fatal(err)
	}
	if in, err := a.inCluster(cmd); err != nil || !in {
		t.Errorf("with a kubeconfig alone: %v, %v", in, err)
	}
	if a.runDir = local; a.meshListens() {
		if in, err := a.inCluster(cmd); err != nil || in {
			t.Errorf("with a mesh on this machine: %v, %v", in, err)
		}
	} else {
		t.Error("the mesh on this machine was not found")
	}
}

// Without the one permission, the operator is told which it is.
func TestMissingPermissionIsNamed(t *testing.T) {
	path, s, stop, err := startCluster(t.TempDir(), "well")
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	s.Deny = func(r apiserver.Request) bool { return r.Resource == "pods/portforward" }
	got := runCluster(t, "signet", nil, "audit", "--kubeconfig", path)
	if got.code != exitFailed || got.out != "" || !strings.Contains(got.err, "you may not get and create pods/portforward in namespace signet-system; ask for a Role") {
		t.Errorf("%+v", got)
	}
	// Policies are extra: who may not read them sees everything else.
	s.Deny = func(r apiserver.Request) bool { return r.Resource == "allowpolicies" }
	got = runCluster(t, "signet", nil, "status", "--kubeconfig", path)
	if got.code != exitGood || !strings.Contains(got.out, "note: the conditions of policies are not known") {
		t.Errorf("%+v", got)
	}
}

// The exit codes in a cluster are those of a machine, in every form.
func TestClusterExitCodes(t *testing.T) {
	for _, kind := range []string{"well", "ill"} {
		path, _, stop, err := startCluster(t.TempDir(), kind)
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]int{"well": exitGood, "ill": exitFindings}[kind]
		for _, argv := range []string{"status", "certs", "audit", "audit verify", "check", "policy generate", "policy explain --from pod/shop/web-1 --to pay/ledger --port 8443"} {
			for _, form := range []string{"table", "wide", "json", "yaml"} {
				got := runCluster(t, "signet", nil, append(strings.Fields(argv), "--kubeconfig", path, "-o", form)...)
				if got.code != want || got.out == "" || got.err != "" {
					t.Errorf("%s %s -o %s: %+v, want %d", kind, argv, form, got, want)
				}
				var doc struct{ APIVersion, Kind string }
				if form == "json" && (json.Unmarshal([]byte(got.out), &doc) != nil || doc.APIVersion == "" || doc.Kind == "") {
					t.Errorf("%s %s: JSON %+v", kind, argv, doc)
				}
			}
		}
		stop()
	}
}

// As a plugin, help shows what one types.
func TestPluginHelp(t *testing.T) {
	got := runCluster(t, "kubectl-signet", nil, "audit", "--help")
	if got.code != exitGood || !strings.Contains(got.out, "kubectl signet audit [flags]") || !strings.Contains(got.out, "  kubectl signet audit --since 10m") {
		t.Errorf("%+v", got)
	}
	if got := runCluster(t, "kubectl-signet", nil, "--help"); strings.Contains(got.out, "Start a mesh") || !strings.Contains(got.out, "kubectl signet [command]") {
		t.Errorf("%+v", got)
	}
	if got := runCluster(t, "kubectl_complete-signet", nil, "audit", "--verdict", ""); got.code != exitGood || !strings.Contains(got.out, "observed\n") {
		t.Errorf("%+v", got)
	}
}

// Whoever waits is told what for.
func TestProgress(t *testing.T) {
	var out bytes.Buffer
	p := &progress{out: &out}
	p.begin("quick")()
	end := p.begin("waiting \x1b for x")
	time.Sleep(slow + 300*time.Millisecond)
	end()
	if out.String() != "signet: still waiting \\x1b for x\n" {
		t.Errorf("%q", out.String())
	}
}

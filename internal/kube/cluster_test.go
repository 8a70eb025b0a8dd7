package kube

import (
	"context"
	"crypto/ecdsa"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/mesh"
	"github.com/signet-mesh/signet/test/kubeapiserver"
)

const release = "signet-system"

func testLog(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// installCRDs gives the server the kinds of signet.dev.
func installCRDs(t *testing.T, c *Client) {
	t.Helper()
	files, err := filepath.Glob("../../deploy/crds/*.yaml")
	if err != nil || len(files) < 3 {
		t.Fatalf("CRDs: %v, %v", files, err)
	}
	crds := c.Objects.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var crd unstructured.Unstructured
		if err := yaml.Unmarshal(data, &crd.Object); err != nil {
			t.Fatal(err)
		}
		if _, err := crds.Create(t.Context(), &crd, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, resource := range []string{"meshconfigs", "allowpolicies", "quarantines", "federations"} {
		eventually(t, 20*time.Second, func() error {
			_, err := c.Objects.Resource(v1alpha1.Resource(resource)).List(t.Context(), metav1.ListOptions{})
			return err
		})
	}
}

func createObject(t *testing.T, c *Client, resource, namespace, text string) {
	t.Helper()
	var o unstructured.Unstructured
	if err := yaml.Unmarshal([]byte("apiVersion: signet.dev/v1alpha1\n"+text), &o.Object); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Objects.Resource(v1alpha1.Resource(resource)).Namespace(namespace).Create(t.Context(), &o, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func createNamespace(t *testing.T, c *Client, n *corev1.Namespace) {
	t.Helper()
	if _, err := c.Core.CoreV1().Namespaces().Create(t.Context(), n, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// createPod makes a pod as a scheduler and a kubelet would have.
func createPod(t *testing.T, c *Client, namespace, name, account, node, ip string) *corev1.Pod {
	t.Helper()
	ctx := t.Context()
	p, err := c.Core.CoreV1().Pods(namespace).Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       corev1.PodSpec{NodeName: node, ServiceAccountName: account, Containers: []corev1.Container{{Name: "c", Image: "i"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p.Status.Phase, p.Status.PodIPs, p.Status.PodIP = corev1.PodRunning, []corev1.PodIP{{IP: ip}}, ip
	if p, err = c.Core.CoreV1().Pods(namespace).UpdateStatus(ctx, p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	return p
}

// told collects what a Watcher says.
type told struct {
	mu       sync.Mutex
	view     *mesh.View // guarded by mu
	views    int        // guarded by mu
	rejected []string   // guarded by mu
}

func (o *told) accept(v *mesh.View) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.view, o.rejected = v, nil
	o.views++
}

func (o *told) reject(lines ...string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.rejected = lines
}

func (o *told) get() (*mesh.View, []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.view, o.rejected
}

func runWatcher(t *testing.T, c *Client) (*Watcher, *told) {
	t.Helper()
	w, err := NewWatcher(c, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	o := &told{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := w.Run(ctx, o.accept, o.reject); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return w, o
}

// The whole way on a real API server: nothing before the MeshConfig; a pod, a
// service and policies reach the view; what became of them is written back;
// nodes join by the tokens that the server made, once.
func TestOnAPIServer(t *testing.T) {
	server := kubeapiserver.Start(t)
	c := connect(t, server.Config(kubeapiserver.Admin))
	installCRDs(t, c)
	createNamespace(t, c, ns(release))
	as := controlPlane(t, server, c)
	t.Run("watch", func(t *testing.T) { testWatch(t, c, as) })
	t.Run("join", func(t *testing.T) { testJoin(t, c, as) })
	t.Run("root", func(t *testing.T) { testRoot(t, c, as) })
	t.Run("jwt keys", func(t *testing.T) { testJWTKeys(t, c, as) })
	t.Run("federation", func(t *testing.T) { testFederation(t, c, as) })
	t.Run("authority", func(t *testing.T) { testAuthority(t, c, as) })
	t.Run("rights", func(t *testing.T) { testRights(t, as) })
}

func testWatch(t *testing.T, c, as *Client) {
	ctx := t.Context()
	createNamespace(t, c, enforced("shop"))
	p := createPod(t, c, "shop", "web-1", "web", "one", "10.0.0.1")
	w, o := runWatcher(t, as)
	eventually(t, 20*time.Second, func() error {
		if view, rejected := o.get(); view != nil || len(rejected) != 1 || !strings.Contains(rejected[0], "is missing") {
			return fmt.Errorf("without a MeshConfig: view %v, rejected %v", view, rejected)
		}
		return nil
	})
	createObject(t, c, "meshconfigs", "", "kind: MeshConfig\nmetadata: {name: mesh}\nspec: {trustDomain: mesh.example, svidTTL: 10m}")
	createObject(t, c, "allowpolicies", "shop", "kind: AllowPolicy\nmetadata: {name: good}\nspec: {target: {serviceAccount: web}, from: [{namespace: shop}]}")
	createObject(t, c, "allowpolicies", "shop", "kind: AllowPolicy\nmetadata: {name: other}\nspec: {target: {serviceAccount: none}, from: [{serviceAccount: web}]}")
	createObject(t, c, "quarantines", "", "kind: Quarantine\nmetadata: {name: cut}\nspec: {reason: stolen, nodes: [two]}")
	tcp, port, empty := corev1.ProtocolTCP, int32(8080), ""
	service, err := c.Core.CoreV1().Services("shop").Create(ctx, serviceOf("shop", "web", "10.96.0.9", func(s *corev1.Service) { s.Spec.ClusterIP = "10.96.0.9" }), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Core.DiscoveryV1().EndpointSlices("shop").Create(ctx, &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: "web-a", Labels: map[string]string{discoveryv1.LabelServiceName: service.Name}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &empty, Port: &port, Protocol: &tcp}},
		Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.1"}, TargetRef: &corev1.ObjectReference{
			Kind: "Pod", Namespace: "shop", Name: "web-1", UID: p.UID}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, func() error {
		view, rejected := o.get()
		if view == nil {
			return fmt.Errorf("no view; rejected %v", rejected)
		}
		_, cut := view.Model.QuarantinedNode("two")
		if keys(view.State) != "shop/web-1" || show(view.State, "shop/web") != "shop/web-1" || len(view.Model.Policies()) != 2 || !cut ||
			view.State.SVIDTTL != 10*time.Minute || len(rejected) > 0 {
			return fmt.Errorf("%+v, rejected %v", view.State, rejected)
		}
		return nil
	})

	// How long one change takes from the API server to the view.
	begin := time.Now()
	second := createPod(t, c, "shop", "web-2", "web", "one", "10.0.0.2")
	eventually(t, 5*time.Second, func() error {
		if view, _ := o.get(); keys(view.State) != "shop/web-1 shop/web-2" {
			return errors.New(keys(view.State))
		}
		return nil
	})
	t.Logf("a pod reached the view within %v of the request to make it", time.Since(begin).Round(time.Millisecond))

	// Status. Node one reports web-1 as good and web-2 as not.
	var revision atomic.Value
	revision.Store("old")
	reports := func() []caserver.NodeReport {
		return []caserver.NodeReport{{Node: "one", Connected: true, Clock: -10 * time.Minute, Revision: revision.Load().(string), At: time.Now(), Workloads: []*nodev1.WorkloadReport{
			{Workload: "shop/web-1", Uid: string(p.UID), Repaired: true},
			{Workload: "shop/web-2", Uid: string(second.UID), Problem: "its rules are gone"},
		}}}
	}
	authority, err := ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: testDomain})
	if err != nil {
		t.Fatal(err)
	}
	defer authority.Close()
	leader := &Leader{Client: as, Namespace: release, Identity: "r1", Watcher: w, Reports: reports, Bundle: authority.BundleUpdates, Log: testLog(t)}
	ctx2, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = leader.Run(ctx2) }()
	defer func() { cancel(); <-done }()

	condition := func(resource, namespace, name, kind, want string) {
		t.Helper()
		eventually(t, 15*time.Second, func() error {
			o, err := c.Objects.Resource(v1alpha1.Resource(resource)).Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			list, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
			for _, item := range list {
				if c := item.(map[string]any); c["type"] == kind {
					if got := fmt.Sprint(c["status"], " ", c["message"]); got != want {
						return fmt.Errorf("%s %s %s: %q, want %q", resource, name, kind, got, want)
					}
					return nil
				}
			}
			return fmt.Errorf("%s %s has no %s: %v", resource, name, kind, o.Object["status"])
		})
	}
	condition("allowpolicies", "shop", "good", "Accepted", "True valid")
	condition("allowpolicies", "shop", "good", "Programmed", "False on 0 of 1 nodes")
	condition("allowpolicies", "shop", "other", "Programmed", "True on 0 of 0 nodes")
	condition("quarantines", "", "cut", "Accepted", "True valid")
	condition("meshconfigs", "", "mesh", "Accepted", "True valid")
	view, _ := o.get()
	revision.Store(view.Revision)
	condition("allowpolicies", "shop", "good", "Programmed", "True on 1 of 1 nodes")
	annotation := func(want string) {
		t.Helper()
		eventually(t, 15*time.Second, func() error {
			n, err := c.Core.CoreV1().Namespaces().Get(ctx, "shop", metav1.GetOptions{})
			if err == nil && n.Annotations[v1alpha1.AnnotationStatus] != want {
				err = fmt.Errorf("%q, want %q", n.Annotations[v1alpha1.AnnotationStatus], want)
			}
			return err
		})
	}
	annotation("enforce: 1 of 2 pods enrolled")
	eventually(t, 15*time.Second, func() error {
		events, err := c.Core.CoreV1().Events("shop").List(ctx, metav1.ListOptions{})
		if err == nil && len(events.Items) != 2 {
			err = fmt.Errorf("events: %v", events.Items)
		}
		for _, e := range events.Items {
			switch of := e.InvolvedObject.UID; {
			case e.Reason == notEnrolled && of == second.UID && strings.Contains(e.Message, "its rules are gone"):
			case e.Reason == captureRepaired && of == p.UID && strings.Contains(e.Message, "something other than Signet changed"):
			default:
				err = fmt.Errorf("event: %v", e)
			}
		}
		return err
	})
	eventually(t, 15*time.Second, func() error {
		events, err := c.Core.CoreV1().Events("default").List(ctx, metav1.ListOptions{})
		for _, e := range events.Items {
			if of := e.InvolvedObject; of.Kind == "Node" && of.Name == "one" && e.Reason == "ClockOff" && strings.Contains(e.Message, "about 10m0s behind the control plane's") {
				return err
			}
		}
		return errors.Join(fmt.Errorf("no event of the node's clock: %v", events.Items), err)
	})
	eventually(t, 5*time.Second, func() error {
		m, err := c.Core.CoreV1().ConfigMaps(release).Get(ctx, bundleConfigMap, metav1.GetOptions{})
		if err != nil {
			return err
		}
		block, _ := pem.Decode([]byte(m.Data[bundleKey]))
		if block == nil || string(block.Bytes) != string(authority.Bundle()[0].Raw) {
			return fmt.Errorf("bundle %q", m.Data[bundleKey])
		}
		return nil
	})
	// What is revoked is in the view, and the status counts the nodes that act by it
	// when all of it is refused.
	configPatch := func(body string) {
		t.Helper()
		if _, err := c.Objects.Resource(v1alpha1.Resource("meshconfigs")).Patch(ctx, "mesh", types.MergePatchType, []byte(body), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	configPatch(fmt.Sprintf(`{"spec":{"revoked":[{"serial":"0a1b","reason":"stolen","since":%q}]}}`, time.Now().UTC().Add(time.Hour).Format(time.RFC3339)))
	began, first := time.Now(), ""
	eventually(t, 10*time.Second, func() error {
		view, _ := o.get()
		if len(view.State.Revoked) != 1 || view.State.Revoked[0].Serial != "0a1b" {
			return fmt.Errorf("revoked: %+v", view.State.Revoked)
		}
		first = view.Revision
		return nil
	})
	revoking, _ := o.get()
	revision.Store(revoking.Revision)
	condition("meshconfigs", "", "mesh", "Programmed", "False on 0 of 1 nodes")
	eventually(t, 10*time.Second, func() error {
		if view, _ := o.get(); view.Revision == first {
			return errors.New("the view does not change when the holder's time is over")
		}
		return nil
	})
	if since := time.Since(began); since < ca.RevokeGrace-time.Second {
		t.Errorf("refused after %s", since)
	}
	revoking, _ = o.get()
	revision.Store(revoking.Revision)
	condition("meshconfigs", "", "mesh", "Programmed", "True on 1 of 1 nodes")
	configPatch(`{"spec":{"revoked":null}}`)
	eventually(t, 10*time.Second, func() error {
		if view, _ := o.get(); len(view.State.Revoked) > 0 {
			return errors.New("still revoked")
		}
		return nil
	})
	revoking, _ = o.get()
	revision.Store(revoking.Revision)
	time.Sleep(2 * statusPeriod)

	o.mu.Lock()
	views := o.views
	o.mu.Unlock()
	time.Sleep(2 * statusPeriod)
	o.mu.Lock()
	if o.views != views {
		t.Errorf("%d views while nothing changed: what is written as status counts as a change", o.views-views)
	}
	o.mu.Unlock()

	// A misspelt mode enforces, and says so.
	patch := func(value string) {
		t.Helper()
		body := fmt.Sprintf(`{"metadata":{"annotations":{%q:%s}}}`, v1alpha1.AnnotationMesh, value)
		if _, err := c.Core.CoreV1().Namespaces().Patch(ctx, "shop", types.MergePatchType, []byte(body), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	patch(`"enfroce"`)
	annotation(`enforce: 1 of 2 pods enrolled; "enfroce" is no mode (enforce, observe or off) and is taken as enforce`)
	patch("null")
	annotation("")
	if view, _ := o.get(); keys(view.State) != "" {
		t.Errorf("after leaving: %s", keys(view.State))
	}

	// A MeshConfig that goes leaves its settings in force; another trust domain
	// is refused; both are said, and the rest goes on.
	configs := c.Objects.Resource(v1alpha1.Resource("meshconfigs"))
	if err := configs.Delete(ctx, "mesh", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	createObject(t, c, "meshconfigs", "", "kind: MeshConfig\nmetadata: {name: mesh}\nspec: {trustDomain: other.example}")
	patch(`"observe"`)
	eventually(t, 5*time.Second, func() error {
		view, rejected := o.get()
		if view.State.TrustDomain != testDomain || len(view.State.Workloads) != 2 || len(rejected) != 1 || !strings.Contains(rejected[0], "cannot be edited") {
			return fmt.Errorf("%s %s, rejected %v", view.State.TrustDomain, keys(view.State), rejected)
		}
		return nil
	})
	condition("meshconfigs", "", "mesh", "Accepted", `False the last good settings are in force: MeshConfig "mesh": spec.trustDomain: the mesh runs as "mesh.example"; a trust domain cannot be edited, start a new mesh for "other.example"`)
}

// tokenOf has the API server make a token bound to a pod, as a kubelet asks.
func tokenOf(t *testing.T, c *Client, account, audience string, p *corev1.Pod) string {
	t.Helper()
	seconds := int64(600)
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{audience}, ExpirationSeconds: &seconds}}
	namespace := release
	if p != nil {
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: p.Name, UID: p.UID}
		namespace = p.Namespace
	}
	out, err := c.Core.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), account, request, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return out.Status.Token
}

// Nodes join by tokens of a real API server. Everything else is refused.
func testJoin(t *testing.T, c, as *Client) {
	ctx := t.Context()
	createNamespace(t, c, ns("elsewhere"))
	for _, in := range []struct{ namespace, name string }{{release, "signet-agent"}, {release, "signet-control"}, {"elsewhere", "signet-agent"}} {
		if _, err := c.Core.CoreV1().ServiceAccounts(in.namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: in.name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, node := range []string{"one", "two"} {
		if _, err := c.Core.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	one := createPod(t, c, release, "signet-agent-a", "signet-agent", "one", "192.168.0.1")
	two := createPod(t, c, release, "signet-agent-b", "signet-agent", "two", "192.168.0.2")
	control := createPod(t, c, release, "signet-control-a", "signet-control", "one", "10.0.0.3")
	foreign := createPod(t, c, "elsewhere", "signet-agent-a", "signet-agent", "one", "10.0.0.4")
	j := NewJoiner(as, release)

	good := tokenOf(t, c, "signet-agent", joinAudience, one)
	var won atomic.Int32
	var wg sync.WaitGroup
	for range 16 { // two replicas, eight callers each
		replica := NewJoiner(as, release)
		wg.Go(func() {
			switch node, err := replica.Redeem(ctx, good); {
			case err == nil && node == "one":
				won.Add(1)
			case !errors.Is(err, caserver.ErrToken):
				t.Errorf("%q, %v", node, err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d joined with one token; want 1", won.Load())
	}
	if node, err := j.Redeem(ctx, tokenOf(t, c, "signet-agent", joinAudience, two)); err != nil || node != "two" {
		t.Errorf("the other node: %q, %v", node, err)
	}
	record, err := c.Core.CoreV1().ConfigMaps(release).Get(ctx, joinsConfigMap, metav1.GetOptions{})
	if err != nil || len(record.Data) != 2 {
		t.Errorf("record: %v, %v", record.Data, err)
	}

	gone := createPod(t, c, release, "signet-agent-c", "signet-agent", "one", "192.168.0.1")
	ofGone := tokenOf(t, c, "signet-agent", joinAudience, gone)
	zero := int64(0)
	if err := c.Core.CoreV1().Pods(release).Delete(ctx, gone.Name, metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
		t.Fatal(err)
	}
	createPod(t, c, release, "signet-agent-c", "signet-agent", "two", "192.168.0.1")
	fresh := tokenOf(t, c, "signet-agent", joinAudience, one)
	parts := strings.Split(fresh, ".")
	for name, token := range map[string]string{
		"used before":               good,
		"other audience":            tokenOf(t, c, "signet-agent", "vault", one),
		"other account":             tokenOf(t, c, "signet-control", joinAudience, control),
		"other namespace":           tokenOf(t, c, "signet-agent", joinAudience, foreign),
		"not bound to a pod":        tokenOf(t, c, "signet-agent", joinAudience, nil),
		"of a pod that is gone":     ofGone,
		"signature of another":      parts[0] + "." + parts[1] + "." + strings.Split(good, ".")[2],
		"no signature":              parts[0] + "." + parts[1] + ".",
		"empty":                     "",
		"not a token":               "signet-join-xyz",
		"too long":                  strings.Repeat("x", maxJoinToken) + fresh,
		"token of an administrator": kubeapiserver.Token(kubeapiserver.Admin),
	} {
		if node, err := j.Redeem(ctx, token); !errors.Is(err, caserver.ErrToken) {
			t.Errorf("%s: %q, %v; want ErrToken", name, node, err)
		}
	}
	if node, err := j.Redeem(ctx, fresh); err != nil || node != "one" {
		t.Errorf("a good token after the attacks: %q, %v", node, err)
	}
	// What has expired is swept.
	j.now = func() time.Time { return time.Now().Add(time.Hour) }
	if _, err := j.Redeem(ctx, tokenOf(t, c, "signet-agent", joinAudience, two)); err != nil {
		t.Fatal(err)
	}
	if record, err := c.Core.CoreV1().ConfigMaps(release).Get(ctx, joinsConfigMap, metav1.GetOptions{}); err != nil || len(record.Data) != 1 {
		t.Errorf("after a sweep: %v, %v", record.Data, err)
	}
}

// Replicas that start at once sign below one root; a Secret with half of it is
// refused, not replaced. A rotation goes through all of them, whoever takes the
// steps, and no root is written to a disk.
func testRoot(t *testing.T, c, as *Client) {
	ctx := t.Context()
	open := func(dir string) (*ca.Authority, error) {
		return ca.Open(ca.Options{Dir: dir, TrustDomain: testDomain, RootStore: NewRoots(as, release)})
	}
	replicas := make([]*ca.Authority, 4)
	dirs := make([]string, len(replicas))
	var wg sync.WaitGroup
	for i := range replicas {
		dirs[i] = filepath.Join(t.TempDir(), "ca")
		wg.Go(func() {
			var err error
			if replicas[i], err = open(dirs[i]); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	follow, stop := context.WithCancel(ctx)
	defer wg.Wait()
	defer stop()
	for _, a := range replicas {
		defer a.Close()
		wg.Go(func() { a.FollowRoots(follow) })
	}
	same := func(want ...ca.RootRole) {
		t.Helper()
		eventually(t, 20*time.Second, func() error {
			for i, a := range replicas {
				var got []ca.RootRole
				for j, root := range a.Roots() {
					got = append(got, root.Role)
					if first := replicas[0].Roots(); j >= len(first) || !root.Certificate.Equal(first[j].Certificate) {
						return fmt.Errorf("replica %d has other roots", i)
					}
				}
				if !slices.Equal(got, want) {
					return fmt.Errorf("replica %d has %v, want %v", i, got, want)
				}
			}
			return nil
		})
	}
	same(ca.RootSigns)
	first := replicas[0].Bundle()[0]
	if _, ok := first.PublicKey.(*ecdsa.PublicKey); !ok {
		t.Errorf("root key %T", first.PublicKey)
	}
	// All take each step at once: it is taken once.
	step := func(f func(*ca.Authority) error, want ...ca.RootRole) {
		t.Helper()
		var steps sync.WaitGroup
		for _, a := range replicas {
			steps.Go(func() {
				if err := f(a); err != nil && !errors.Is(err, ca.ErrRootsChanged) && !errors.Is(err, ca.ErrNoNextRoot) {
					t.Error(err)
				}
			})
		}
		steps.Wait()
		same(want...)
	}
	step((*ca.Authority).PrepareRoot, ca.RootSigns, ca.RootNext)
	step((*ca.Authority).SwitchRoot, ca.RootSigns, ca.RootFormer)
	if replicas[0].Bundle()[0].Equal(first) {
		t.Error("the same root signs")
	}
	step((*ca.Authority).RetireRoots, ca.RootSigns)
	for _, dir := range dirs {
		if left, _ := filepath.Glob(filepath.Join(dir, "*root*")); len(left) > 0 {
			t.Errorf("on disk: %v", left)
		}
	}

	stored, err := c.Core.CoreV1().Secrets(release).Get(ctx, rootSecret, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	delete(stored.Data, "root.key")
	if _, err := c.Core.CoreV1().Secrets(release).Update(ctx, stored, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := open(filepath.Join(t.TempDir(), "ca")); err == nil || !strings.Contains(err.Error(), "signet-ca/root.key does not") {
		t.Errorf("half a Secret: %v", err)
	}
	same(ca.RootSigns) // it stays in force
}

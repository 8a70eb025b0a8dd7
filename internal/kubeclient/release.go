package kubeclient

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The names of a release; see docs/kubernetes.md.
const (
	DefaultNamespace = "signet-system"
	ControlName      = "signet-control"
	AgentName        = "signet-agent"
	ProxyName        = "signet-proxy"
	// AdminPort is the operator's port of the control plane, on the loopback
	// address of its pod.
	AdminPort = 9441
)

// ErrNotInstalled says that a namespace has no control plane.
var ErrNotInstalled = errors.New("is not installed")

// Control reads the control plane's Deployment.
func (c *Cluster) Control(ctx context.Context, namespace string) (appsv1.Deployment, error) {
	var d appsv1.Deployment
	err := c.Get(ctx, "/apis/apps/v1/namespaces/"+url.PathEscape(namespace)+"/deployments/"+ControlName, nil, &d)
	if apierrors.IsNotFound(err) {
		return d, fmt.Errorf("signet %w in namespace %s of %s: it has no Deployment %s; install the chart, or name the release's namespace with -n", ErrNotInstalled, namespace, c.Server(), ControlName)
	}
	return d, denied(err, Access{Verb: "get", Group: "apps", Resource: "deployments", Namespace: namespace})
}

// ReadyControlPods returns the names of the control plane's ready pods, the
// oldest first. There is at least one when the error is nil.
func (c *Cluster) ReadyControlPods(ctx context.Context, namespace string) ([]string, error) {
	d, err := c.Control(ctx, namespace)
	if err != nil {
		return nil, err
	}
	selector, err := metav1.LabelSelectorAsSelector(d.Spec.Selector)
	if err != nil {
		return nil, fmt.Errorf("selector of Deployment %s/%s: %w", namespace, ControlName, err)
	}
	var pods corev1.PodList
	err = c.Get(ctx, "/api/v1/namespaces/"+url.PathEscape(namespace)+"/pods", url.Values{"labelSelector": {selector.String()}}, &pods)
	if err != nil {
		return nil, denied(err, Access{Verb: "list", Resource: "pods", Namespace: namespace})
	}
	slices.SortFunc(pods.Items, func(a, b corev1.Pod) int {
		if !a.CreationTimestamp.Equal(&b.CreationTimestamp) {
			return a.CreationTimestamp.Compare(b.CreationTimestamp.Time)
		}
		return strings.Compare(a.Name, b.Name)
	})
	var ready, not []string
	for i := range pods.Items {
		if why := notReady(&pods.Items[i]); why != "" {
			not = append(not, pods.Items[i].Name+": "+why)
			continue
		}
		ready = append(ready, pods.Items[i].Name)
	}
	switch {
	case len(ready) > 0:
		return ready, nil
	case len(not) == 0 && d.Spec.Replicas != nil && *d.Spec.Replicas == 0:
		return nil, fmt.Errorf("the control plane is scaled to 0 replicas: kubectl -n %s scale deployment %s --replicas=1", namespace, ControlName)
	case len(not) == 0:
		return nil, fmt.Errorf("the control plane has no pod: kubectl -n %s describe deployment,replicaset tells why", namespace)
	}
	return nil, fmt.Errorf("no pod of the control plane is ready (%s): kubectl -n %s describe pods and kubectl -n %s logs deployment/%s tell why", strings.Join(not, "; "), namespace, namespace, ControlName)
}

// notReady says why a pod cannot be asked, or nothing when it can.
func notReady(p *corev1.Pod) string {
	if p.DeletionTimestamp != nil {
		return "is being deleted"
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return ""
		}
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			return "has no node: " + c.Message
		}
	}
	for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if w := c.State.Waiting; w != nil {
			return strings.TrimSuffix(fmt.Sprintf("container %s waits: %s: %s", c.Name, w.Reason, w.Message), ": ")
		}
		if t := c.State.Terminated; t != nil && t.ExitCode != 0 {
			return fmt.Sprintf("container %s ended with code %d", c.Name, t.ExitCode)
		}
	}
	return fmt.Sprintf("is %s, and not ready", p.Status.Phase)
}

func cutResource(s string) (resource, sub string) {
	resource, sub, _ = strings.Cut(s, "/")
	return resource, sub
}

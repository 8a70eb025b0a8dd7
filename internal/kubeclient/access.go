package kubeclient

import (
	"context"
	"fmt"
	"net/http"
	"sync"

	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Access is one thing that one may do or not.
type Access struct {
	Verb      string
	Group     string // API group; empty is the core one
	Resource  string // plural, with a subresource behind a slash: pods/portforward
	Namespace string // empty: the whole cluster
}

// what names the resource with its group.
func (a Access) what() string {
	if a.Group == "" {
		return a.Resource
	}
	return a.Resource + "." + a.Group
}

// String returns "create deployments.apps in signet-system".
func (a Access) String() string {
	s := a.Verb + " " + a.what()
	if a.Namespace != "" {
		s += " in " + a.Namespace
	}
	return s
}

// MayI asks the API server which of these the caller may do, and returns those
// that it may not, in the same order.
func (c *Cluster) MayI(ctx context.Context, all []Access) (not []Access, err error) {
	allowed := make([]bool, len(all))
	errs := make([]error, len(all))
	free := make(chan struct{}, 8)
	var done sync.WaitGroup
	for i, a := range all {
		free <- struct{}{}
		done.Go(func() {
			defer func() { <-free }()
			allowed[i], errs[i] = c.may(ctx, a)
		})
	}
	done.Wait()
	for i, a := range all {
		if errs[i] != nil {
			return nil, fmt.Errorf("ask whether you may %s: %w", a, errs[i])
		}
		if !allowed[i] {
			not = append(not, a)
		}
	}
	return not, nil
}

func (c *Cluster) may(ctx context.Context, a Access) (bool, error) {
	resource, sub := cutResource(a.Resource)
	review := authorizationv1.SelfSubjectAccessReview{
		TypeMeta: metav1.TypeMeta{APIVersion: "authorization.k8s.io/v1", Kind: "SelfSubjectAccessReview"},
		Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
			Verb: a.Verb, Group: a.Group, Resource: resource, Subresource: sub, Namespace: a.Namespace,
		}},
	}
	var answer authorizationv1.SelfSubjectAccessReview
	if err := c.do(ctx, http.MethodPost, "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", nil, review, &answer); err != nil {
		return false, err
	}
	return answer.Status.Allowed, nil
}

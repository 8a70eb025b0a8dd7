package kubeclient

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// ServerError says that the API server itself cannot be used.
type ServerError struct {
	Server string // URL
	Err    error
}

func (e *ServerError) Error() string {
	if apierrors.IsUnauthorized(e.Err) {
		return fmt.Sprintf("the API server %s does not know who you are: renew the credentials of this context, or choose another with --context", e.Server)
	}
	return fmt.Sprintf("the API server %s does not answer: %v; look at the network, or choose another cluster with --context or --kubeconfig", e.Server, e.Err)
}

// Unwrap returns the cause.
func (e *ServerError) Unwrap() error { return e.Err }

// DeniedError says which permission the caller lacks.
type DeniedError struct {
	Access
	Err error // the API server's words
}

func (e *DeniedError) Error() string {
	scope, role := "of the cluster", "a ClusterRole"
	if e.Namespace != "" {
		scope, role = "in namespace "+e.Namespace, "a Role in namespace "+e.Namespace
	}
	return fmt.Sprintf("you may not %s %s %s; ask for %s that allows it:%s", e.Verb, e.what(), scope, role, e.rule())
}

// rule is the YAML of what is missing, in one line.
func (e *DeniedError) rule() string {
	return fmt.Sprintf(" {apiGroups: [%q], resources: [%s], verbs: [%s]}", e.Group, e.Resource, strings.ReplaceAll(e.Verb, " and ", ", "))
}

// Unwrap returns the API server's error.
func (e *DeniedError) Unwrap() error { return e.Err }

// denied names the permission in an error that is a refusal.
func denied(err error, a Access) error {
	if apierrors.IsForbidden(err) {
		return &DeniedError{Access: a, Err: err}
	}
	return err
}

// answered sorts out what the API server said.
func (c *Cluster) answered(err error) error {
	if apierrors.IsUnauthorized(err) {
		return &ServerError{Server: c.Server(), Err: err}
	}
	return err
}

// lost says that a request had no answer.
func (c *Cluster) lost(ctx context.Context, err error) error {
	if ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return ctx.Err()
	}
	var u *url.Error
	if errors.As(err, &u) {
		if u.Timeout() {
			err = fmt.Errorf("no answer in time")
		} else {
			err = u.Err
		}
	}
	return &ServerError{Server: c.Server(), Err: err}
}

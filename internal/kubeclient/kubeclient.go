// Package kubeclient is the operator's way into a cluster: it reads what
// kubectl reads (kubeconfig, contexts), asks the API server, and opens
// connections to the control plane's loopback port through the API server's
// port-forward. Its errors name what is missing and who can mend it.
package kubeclient

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Options choose a cluster.
type Options struct {
	// Kubeconfig is the file that was asked for; empty: Paths.
	Kubeconfig string
	// Paths are the files to merge where none was asked for, as in $KUBECONFIG.
	Paths []string
	// Context is one of the file's; empty: the current one.
	Context string
	// Timeout bounds one request to the API server; zero means 15 s.
	Timeout time.Duration
	// UserAgent names the program to the API server's audit log.
	UserAgent string
}

// Cluster is one API server and the credentials for it. It is safe for
// concurrent use.
type Cluster struct {
	config *rest.Config
	base   *url.URL
	http   *http.Client
}

// maxAnswer bounds one answer of the API server.
const maxAnswer = 64 << 20

// Load reads the configuration. It does not connect yet; Close it after use.
func Load(o Options) (*Cluster, error) {
	rules := &clientcmd.ClientConfigLoadingRules{ExplicitPath: o.Kubeconfig, Precedence: o.Paths}
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: o.Context}).ClientConfig()
	switch {
	case clientcmd.IsEmptyConfig(err):
		return nil, errors.New("no cluster is configured: name a file with --kubeconfig or $KUBECONFIG")
	case err != nil:
		return nil, fmt.Errorf("kubeconfig: %w; choose with --kubeconfig and --context", err)
	}
	if config.Timeout = o.Timeout; config.Timeout == 0 {
		config.Timeout = 15 * time.Second
	}
	config.UserAgent = o.UserAgent
	config.WarningHandler = rest.NoWarnings{}
	base, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: server %q: %w", config.Host, err)
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	return &Cluster{config: config, base: base, http: client}, nil
}

// Server returns the API server's URL.
func (c *Cluster) Server() string { return c.base.String() }

// Close gives up idle connections.
func (c *Cluster) Close() { c.http.CloseIdleConnections() }

// Get reads an object or a list at a path such as /version or
// /api/v1/namespaces/shop/pods into a value of its type. An error is a
// *ServerError, a *DeniedError, or the API server's own, for which
// apierrors.IsNotFound works.
func (c *Cluster) Get(ctx context.Context, path string, query url.Values, into any) error {
	return c.do(ctx, http.MethodGet, path, query, nil, into)
}

// Patch merges a value into the object at a path (RFC 7386), and reads the result
// into a value of its type.
func (c *Cluster) Patch(ctx context.Context, path string, send, into any) error {
	return c.do(ctx, http.MethodPatch, path, nil, send, into)
}

func (c *Cluster) do(ctx context.Context, method, at string, query url.Values, send, into any) error {
	u := *c.base
	u.Path = path.Join("/", u.Path, at)
	u.RawQuery = query.Encode()
	var body io.Reader
	if send != nil {
		b, err := json.Marshal(send)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	if send != nil {
		req.Header.Set("Content-Type", "application/json")
		if method == http.MethodPatch {
			req.Header.Set("Content-Type", "application/merge-patch+json")
		}
	}
	res, err := c.http.Do(req)
	if err != nil {
		return c.lost(ctx, err)
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return c.lost(ctx, err)
	}
	if len(b) > maxAnswer {
		return fmt.Errorf("the API server's answer to %s is larger than %d bytes", at, maxAnswer)
	}
	if res.StatusCode/100 != 2 {
		var status metav1.Status
		if json.Unmarshal(b, &status) != nil || status.Kind != "Status" {
			return &ServerError{Server: c.Server(), Err: fmt.Errorf("it answers %s to %s, which is not how an API server does", res.Status, at)}
		}
		return c.answered(&apierrors.StatusError{ErrStatus: status})
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("the API server's answer to %s is not what this version understands: %w", at, err)
	}
	return nil
}

// List reads every page of a list, giving each page's body to add, whose first
// error ends it.
func (c *Cluster) List(ctx context.Context, path string, query url.Values, add func(page []byte) error) error {
	q := url.Values{"limit": {"500"}}
	for key, values := range query {
		q[key] = values
	}
	for {
		var page json.RawMessage
		if err := c.Get(ctx, path, q, &page); err != nil {
			return err
		}
		var list struct {
			Metadata metav1.ListMeta `json:"metadata"`
		}
		if err := json.Unmarshal(page, &list); err != nil {
			return fmt.Errorf("the API server's answer to %s is no list: %w", path, err)
		}
		if err := add(page); err != nil {
			return err
		}
		if list.Metadata.Continue == "" {
			return nil
		}
		q.Set("continue", list.Metadata.Continue)
	}
}

// ListOf reads every page of a list of T.
func ListOf[T any](ctx context.Context, c *Cluster, path string) (items []T, err error) {
	err = c.List(ctx, path, nil, func(page []byte) error {
		var list struct {
			Items []T `json:"items"`
		}
		if err := json.Unmarshal(page, &list); err != nil {
			return fmt.Errorf("the API server's answer to %s is not what this version understands: %w", path, err)
		}
		items = append(items, list.Items...)
		return nil
	})
	return items, err
}

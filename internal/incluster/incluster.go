// Package incluster asks the API server, as a pod that runs in the cluster, the
// few questions that a node's programs have: with nothing but the standard
// library, so that they stay small, and with no right but to read one object.
package incluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Client asks the API server with the pod's own credentials. It is safe for
// concurrent use.
type Client struct {
	server string
	token  string // path of the file, whose content changes
	client *http.Client
	// witness is the file of another token; "" if there is none.
	witness string
}

// Credentials is the directory where kubelet puts a pod's credentials.
const Credentials = "/var/run/secrets/kubernetes.io/serviceaccount"

// Connect finds the API server as every pod does. It makes no request.
func Connect() (*Client, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set; this works in a pod only")
	}
	pem, err := os.ReadFile(filepath.Join(Credentials, "ca.crt"))
	if err != nil {
		return nil, err
	}
	c, err := New("https://"+net.JoinHostPort(host, port), filepath.Join(Credentials, "token"), pem)
	if err == nil {
		// The folder is there from the start, the token a little later.
		if _, err := os.Stat(filepath.Dir(Witness)); err == nil {
			c.witness = Witness
		}
	}
	return c, err
}

// New returns a Client of a server, with a file that holds a token and the
// roots to trust in PEM.
func New(server, token string, pem []byte) (*Client, error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, errors.New("the cluster's ca.crt holds no certificate")
	}
	return &Client{
		server: server, token: token,
		client: &http.Client{
			Timeout:   3 * time.Second,
			Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, DisableKeepAlives: true},
		},
	}, nil
}

// maxObject bounds what is read of an answer, in bytes.
const maxObject = 4 << 20

// get returns the answer's status and, with 200, decodes the object.
func (c *Client) get(ctx context.Context, path string, object any) (int, error) {
	token, err := os.ReadFile(c.token)
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.server+path, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	resp, err := c.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		if err := json.NewDecoder(io.LimitReader(resp.Body, maxObject)).Decode(object); err != nil {
			return 0, err
		}
	}
	return resp.StatusCode, nil
}

// ConfigMap returns the data of a ConfigMap.
func (c *Client) ConfigMap(ctx context.Context, namespace, name string) (map[string]string, error) {
	var object struct {
		Data map[string]string `json:"data"`
	}
	status, err := c.get(ctx, "/api/v1/namespaces/"+url.PathEscape(namespace)+"/configmaps/"+url.PathEscape(name), &object)
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK {
		return nil, fmt.Errorf("ConfigMap %s/%s: %s", namespace, name, http.StatusText(status))
	}
	return object.Data, nil
}

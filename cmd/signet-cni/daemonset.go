package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// daemonSet asks the API server about the DaemonSet that the installer is
// part of. It is the only thing that is asked, with nothing but the standard
// library, so that the plugin stays small.
type daemonSet struct {
	url    string
	token  string // path of the file, whose content changes
	client *http.Client

	mu  sync.Mutex
	uid string // guarded by mu; of the DaemonSet when it was seen first, "" before
}

// serviceAccount is where kubelet puts a pod's credentials.
const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

// inCluster finds the API server as every pod does.
func inCluster(namespace, name string) (*daemonSet, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("--daemonset: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set; use it in a pod only")
	}
	pem, err := os.ReadFile(filepath.Join(serviceAccount, "ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("--daemonset: %w", err)
	}
	return newDaemonSet("https://"+net.JoinHostPort(host, port), filepath.Join(serviceAccount, "token"), pem, namespace, name)
}

func newDaemonSet(server, token string, pem []byte, namespace, name string) (*daemonSet, error) {
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, errors.New("--daemonset: the cluster's ca.crt holds no certificate")
	}
	return &daemonSet{
		url:   server + "/apis/apps/v1/namespaces/" + url.PathEscape(namespace) + "/daemonsets/" + url.PathEscape(name),
		token: token,
		client: &http.Client{
			Timeout:   3 * time.Second,
			Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, DisableKeepAlives: true},
		},
	}, nil
}

// object is what is read of a DaemonSet.
type object struct {
	Metadata struct {
		UID               string  `json:"uid"`
		DeletionTimestamp *string `json:"deletionTimestamp"`
	} `json:"metadata"`
}

// get returns the answer's status and, with 200, the object.
func (d *daemonSet) get(ctx context.Context) (int, object, error) {
	token, err := os.ReadFile(d.token)
	if err != nil {
		return 0, object{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, d.url, nil)
	if err != nil {
		return 0, object{}, err
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	resp, err := d.client.Do(req)
	if err != nil {
		return 0, object{}, err
	}
	defer resp.Body.Close()
	var o object
	if resp.StatusCode == http.StatusOK {
		if err := json.NewDecoder(io.LimitReader(resp.Body, 4<<20)).Decode(&o); err != nil {
			return 0, object{}, err
		}
		if o.Metadata.UID == "" {
			return 0, object{}, errors.New("the API server's answer names no object")
		}
	}
	return resp.StatusCode, o, nil
}

// remember asks until the DaemonSet was seen once, or ctx ends.
func (d *daemonSet) remember(ctx context.Context, log *slog.Logger) {
	for first := true; ; first = false {
		status, o, err := d.get(ctx)
		if err == nil && status == http.StatusOK {
			d.mu.Lock()
			d.uid = o.Metadata.UID
			d.mu.Unlock()
			return
		}
		if first && ctx.Err() == nil {
			log.WarnContext(ctx, "cannot see the own DaemonSet; while that is so, signet-cni stays on this node when the release is deleted", "url", d.url, "status", status, "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(5 * time.Second):
		}
	}
}

// gone says whether the DaemonSet is known to be gone, and why. Whatever is
// not certain is not gone. It asks again until it is certain or ctx ends.
func (d *daemonSet) gone(ctx context.Context, log *slog.Logger) (why string, gone bool) {
	d.mu.Lock()
	uid := d.uid
	d.mu.Unlock()
	forbidden := 0
	for {
		status, o, err := d.get(ctx)
		switch {
		case err != nil:
			log.WarnContext(ctx, "ask for the own DaemonSet", "error", err)
		case status == http.StatusNotFound:
			return "the DaemonSet is not there", true
		case status == http.StatusOK && o.Metadata.DeletionTimestamp != nil:
			return "the DaemonSet is being deleted", true
		case status == http.StatusOK && uid != "" && o.Metadata.UID != uid:
			return "the DaemonSet is another one", true
		case status == http.StatusOK:
			return "", false
		case status == http.StatusForbidden && uid != "":
			// Known, but without a right that was there: it was deleted with
			// the release. Seen three times in a row, since a server that has
			// just started knows no rights yet.
			if forbidden++; forbidden == 3 {
				return "the right to see the DaemonSet was deleted", true
			}
		default:
			log.WarnContext(ctx, "ask for the own DaemonSet", "status", status)
		}
		if status != http.StatusForbidden || err != nil {
			forbidden = 0
		}
		select {
		case <-ctx.Done():
			return "", false
		case <-time.After(700 * time.Millisecond):
		}
	}
}

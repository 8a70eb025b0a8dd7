package incluster

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"sync"
	"time"
)

// Witness is the file with a token that no pod is bound to, of a service account
// that belongs to the release. The API server refuses a pod's own token when the
// pod is deleted as well as when the release is; this one only when the release
// is.
const Witness = "/var/run/secrets/signet-witness/token"

// DaemonSet is the one that the asking pod is part of.
type DaemonSet struct {
	client  *Client
	witness *Client // nil: there is none
	path    string

	mu      sync.Mutex
	uid     string // guarded by mu; when it was seen first, "" before
	trusted bool   // guarded by mu; the witness saw it
}

// DaemonSet returns what answers about a DaemonSet.
func (c *Client) DaemonSet(namespace, name string) *DaemonSet {
	d := &DaemonSet{
		client: c,
		path:   "/apis/apps/v1/namespaces/" + url.PathEscape(namespace) + "/daemonsets/" + url.PathEscape(name),
	}
	if c.witness != "" {
		d.witness = &Client{server: c.server, token: c.witness, client: c.client}
	}
	return d
}

// object is what is read of a DaemonSet.
type object struct {
	Metadata struct {
		UID               string  `json:"uid"`
		DeletionTimestamp *string `json:"deletionTimestamp"`
	} `json:"metadata"`
}

// get asks with the witness's token once that has been good, and with the pod's
// own until then.
func (d *DaemonSet) get(ctx context.Context) (int, object, error) {
	d.mu.Lock()
	client := d.client
	if d.trusted {
		client = d.witness
	}
	d.mu.Unlock()
	var o object
	status, err := client.get(ctx, d.path, &o)
	if err == nil && status == http.StatusOK && o.Metadata.UID == "" {
		err = errors.New("the API server's answer names no object")
	}
	return status, o, err
}

// Remember asks until the DaemonSet was seen once, by the witness too if there
// is one, or ctx ends.
func (d *DaemonSet) Remember(ctx context.Context, log *slog.Logger) {
	for first := true; ; first = false {
		status, o, err := d.get(ctx)
		if err == nil && status == http.StatusOK {
			d.mu.Lock()
			d.uid = o.Metadata.UID
			d.mu.Unlock()
			if d.witness == nil || d.ask(ctx) {
				return
			}
		} else if first && ctx.Err() == nil {
			log.WarnContext(ctx, "cannot see the own DaemonSet; while that is so, what this program put on the node stays there when the release is deleted", "path", d.path, "status", status, "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(5 * time.Second):
		}
	}
}

// ask reports whether the witness sees the DaemonSet, and remembers that it did.
func (d *DaemonSet) ask(ctx context.Context) bool {
	var o object
	status, err := d.witness.get(ctx, d.path, &o)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.trusted = err == nil && status == http.StatusOK && o.Metadata.UID == d.uid
	return d.trusted
}

// Gone says whether the DaemonSet is known to be gone, and why. Whatever is
// not certain is not gone. It asks again until it is certain or ctx ends.
func (d *DaemonSet) Gone(ctx context.Context, log *slog.Logger) (why string, gone bool) {
	d.mu.Lock()
	uid, trusted := d.uid, d.trusted
	d.mu.Unlock()
	refused := 0 // in a row
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
		case status == http.StatusForbidden && uid != "" || status == http.StatusUnauthorized && trusted:
			// Known, but without a right, or an account, that was there: it was
			// deleted with the release. Seen three times in a row, since a server
			// that has just started knows no rights yet.
			if refused++; refused == 3 {
				return "the right to see the DaemonSet was deleted", true
			}
		default:
			refused = 0
			log.WarnContext(ctx, "ask for the own DaemonSet", "status", status)
		}
		if err != nil {
			refused = 0
		}
		select {
		case <-ctx.Done():
			return "", false
		case <-time.After(700 * time.Millisecond):
		}
	}
}

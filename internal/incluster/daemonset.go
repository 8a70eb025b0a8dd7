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

// DaemonSet is the one that the asking pod is part of.
type DaemonSet struct {
	client *Client
	path   string

	mu  sync.Mutex
	uid string // guarded by mu; when it was seen first, "" before
}

// DaemonSet returns what answers about a DaemonSet.
func (c *Client) DaemonSet(namespace, name string) *DaemonSet {
	return &DaemonSet{
		client: c,
		path:   "/apis/apps/v1/namespaces/" + url.PathEscape(namespace) + "/daemonsets/" + url.PathEscape(name),
	}
}

// object is what is read of a DaemonSet.
type object struct {
	Metadata struct {
		UID               string  `json:"uid"`
		DeletionTimestamp *string `json:"deletionTimestamp"`
	} `json:"metadata"`
}

func (d *DaemonSet) get(ctx context.Context) (int, object, error) {
	var o object
	status, err := d.client.get(ctx, d.path, &o)
	if err == nil && status == http.StatusOK && o.Metadata.UID == "" {
		err = errors.New("the API server's answer names no object")
	}
	return status, o, err
}

// Remember asks until the DaemonSet was seen once, or ctx ends.
func (d *DaemonSet) Remember(ctx context.Context, log *slog.Logger) {
	for first := true; ; first = false {
		status, o, err := d.get(ctx)
		if err == nil && status == http.StatusOK {
			d.mu.Lock()
			d.uid = o.Metadata.UID
			d.mu.Unlock()
			return
		}
		if first && ctx.Err() == nil {
			log.WarnContext(ctx, "cannot see the own DaemonSet; while that is so, what this program put on the node stays there when the release is deleted", "path", d.path, "status", status, "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(5 * time.Second):
		}
	}
}

// Gone says whether the DaemonSet is known to be gone, and why. Whatever is
// not certain is not gone. It asks again until it is certain or ctx ends.
func (d *DaemonSet) Gone(ctx context.Context, log *slog.Logger) (why string, gone bool) {
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

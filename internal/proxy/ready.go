package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/signet-mesh/signet/internal/proxy/instance"
)

// Ready says why the proxy of an owner does not serve yet, nil if it does: the
// newest that is not draining. An empty owner asks for the newest of all.
//
// Each answers for itself. Kubelet ends the old proxy of a node when the new one
// is ready, or when the old one is not: one that serves must not answer for a
// new one that does not, and a new one that cannot serve must not make the old
// one seem broken.
func Ready(ctx context.Context, runDir, owner string) error {
	all, err := instance.List(runDir)
	if err != nil {
		return fmt.Errorf("proxy: %w", err)
	}
	var newest *instance.Instance
	for i := range all {
		if p := &all[i]; !p.Draining && (owner == "" || p.Owner == owner) && (newest == nil || p.Epoch.After(newest.Epoch)) {
			newest = p
		}
	}
	if newest == nil {
		return errors.New("proxy: none runs on this node" + of(owner))
	}
	if _, err := newAdmin(newest.Admin()).do(ctx, http.MethodGet, "/ready"); err != nil {
		return fmt.Errorf("proxy %s: %w", newest.ID, err)
	}
	return nil
}

func of(owner string) string {
	if owner == "" {
		return ""
	}
	return " for " + owner
}

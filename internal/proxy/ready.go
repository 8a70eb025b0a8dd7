package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/signet-mesh/signet/internal/proxy/instance"
)

// Ready says why the newest proxy of a node that is not draining does not serve
// yet, nil if it does. An older one beside it does not count: the question is
// whether that may end.
func Ready(ctx context.Context, runDir string) error {
	all, err := instance.List(runDir)
	if err != nil {
		return fmt.Errorf("proxy: %w", err)
	}
	var newest *instance.Instance
	for i := range all {
		if p := &all[i]; !p.Draining && (newest == nil || p.Epoch.After(newest.Epoch)) {
			newest = p
		}
	}
	if newest == nil {
		return errors.New("proxy: none runs on this node")
	}
	if _, err := newAdmin(newest.Admin()).do(ctx, http.MethodGet, "/ready"); err != nil {
		return fmt.Errorf("proxy %s: %w", newest.ID, err)
	}
	return nil
}

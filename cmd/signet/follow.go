package main

import (
	"context"
	"fmt"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/output"
)

const (
	followEvery = 500 * time.Millisecond
	// followOverlap is how far each question reaches back: a record that was
	// written late, because its writer was away, is still found.
	followOverlap = 2 * time.Minute
)

// followed holds when each printed connection ended, zero while it is open, so
// that each is printed once as it opens and once when it has ended.
type followed map[followKey]time.Time

// followKey names a connection: its id is unique on one side of one node.
type followKey struct {
	node string
	side audit.Side
	id   string
}

// fresh reports whether the record says something new, and remembers it.
func (s followed) fresh(r audit.Record) bool {
	key := followKey{r.Node, r.Side, r.ID}
	end, known := s[key]
	if known && (!end.IsZero() || r.End.IsZero()) {
		return false
	}
	s[key] = r.End
	return true
}

// forget drops what a question about the time since then cannot return.
func (s followed) forget(since time.Time) {
	for key, end := range s {
		if !end.IsZero() && end.Before(since) {
			delete(s, key)
		}
	}
}

func (a *app) followAudit(ctx context.Context, client *adminclient.Client, q adminclient.AuditQuery) error {
	printer := a.printer()
	seen := followed{}
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	first := q
	var missing []adminv1.MissingNode
	silent := map[string]bool{}
	for {
		asked := a.now()
		for r, err := range client.MeshAudit(ctx, q, &missing) {
			if err != nil {
				return stopped(ctx, err)
			}
			if !seen.fresh(r) {
				continue
			}
			if err := printer.Stream(&recordDoc{output.NewMeta("AuditRecord"), r}); err != nil {
				return err
			}
		}
		a.tellSilent(silent, missing)
		q.Limit = 0 // every new record, however many
		if since := asked.Add(-followOverlap); since.After(first.Since) {
			q.Since = since
		}
		seen.forget(q.Since)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// tellSilent says on the side when a node stops to answer, and when it is back:
// its records come late, if at all.
func (a *app) tellSilent(silent map[string]bool, missing []adminv1.MissingNode) {
	now := map[string]bool{}
	for _, m := range missing {
		now[m.Node] = true
		if !silent[m.Node] {
			silent[m.Node] = true
			a.complain(fmt.Errorf("node %s does not answer, its records are missing: %s", m.Node, m.Error))
		}
	}
	for node := range silent {
		if !now[node] {
			delete(silent, node)
			a.complain(fmt.Errorf("node %s answers again", node))
		}
	}
}

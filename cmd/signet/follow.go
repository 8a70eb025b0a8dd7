package main

import (
	"context"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
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

// followKey names a connection: its id is unique on one side.
type followKey struct {
	side audit.Side
	id   string
}

// fresh reports whether the record says something new, and remembers it.
func (s followed) fresh(r audit.Record) bool {
	key := followKey{r.Side, r.ID}
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
	for {
		asked := a.now()
		for r, err := range client.Audit(ctx, q) {
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

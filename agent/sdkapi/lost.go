package sdkapi

import (
	"context"
	"strings"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
)

const (
	// lostWorkload is Record.Ended of a connection whose process ended without
	// saying how the connection did.
	lostWorkload = "workload-lost"
	// lookEvery is how often it is looked. A process that has not watched at
	// two looks one after the other is gone; one whose agent was restarted is
	// back after a second or two.
	lookEvery = 10 * time.Second
)

// Run ends the records of processes that are gone, until ctx ends.
func (s *Server) Run(ctx context.Context) {
	missing := map[string]bool{} // at the last look
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(lookEvery):
		}
		var err error
		if missing, err = s.look(ctx, missing); err != nil && ctx.Err() == nil {
			s.cfg.Log.Error("ending the records of workloads that are gone", "error", err)
		}
	}
}

// look ends what was missing at the last look already, and returns what is now.
func (s *Server) look(ctx context.Context, before map[string]bool) (map[string]bool, error) {
	living := map[string]bool{}
	s.mu.Lock()
	for key, open := range s.sessions {
		if open.watches > 0 {
			living[recordPrefix(key.workload, []byte(key.session))] = true
			continue
		}
		if open.missed++; open.missed > 2 {
			delete(s.sessions, key)
			if a := s.workloads[key.workload]; a.sessions > 1 {
				a.sessions--
			} else {
				delete(s.workloads, key.workload)
			}
		}
	}
	s.mu.Unlock()
	missing := map[string]bool{}
	if s.cfg.Store == nil {
		return missing, nil
	}
	n, err := s.cfg.Store.CloseOpen(ctx, lostWorkload, time.Now(), func(r audit.Record) bool {
		at := strings.LastIndexByte(r.ID, ':') + 1
		if !Owns(&r) || living[r.ID[:at]] {
			return false
		}
		missing[r.ID[:at]] = true
		return before[r.ID[:at]]
	})
	if n > 0 {
		s.cfg.Log.Warn("a workload ended without a word about its open connections; their records were closed", "count", n)
	}
	return missing, err
}

package agent

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/wholefile"
)

// distrust ends the tunnels of this node's pods, once, for each root that was
// distrusted and is withdrawn: whoever is in them may have proven an identity with
// a certificate that somebody else made. Proxies and callers must have the newest
// certificates and roots by then, or the same tunnels would come back. It is called
// by the goroutine that reports.
func (a *agent) distrust(s *nodeState, waits string) {
	var gone []ca.Fingerprint
	for _, f := range s.distrusted {
		if !slices.Contains(fingerprints(s.bundle), f) {
			gone = append(gone, f)
		}
	}
	if slices.Equal(gone, a.distrusted) || waits != "" {
		return
	}
	done, known, err := a.loadDistrusted()
	if err != nil {
		a.log.Error("which distrusted roots are dealt with cannot be read; tunnels end again", "error", err)
	}
	news := slices.ContainsFunc(gone, func(f ca.Fingerprint) bool { return !slices.Contains(done, f.String()) })
	if known && news && !a.endTunnels(s) {
		return // again at the next report
	}
	if err := a.saveDistrusted(gone); err != nil {
		a.log.Error("which distrusted roots are dealt with cannot be stored; the next start ends tunnels again", "error", err)
	}
	a.distrusted = gone
}

func (a *agent) endTunnels(s *nodeState) (done bool) {
	total, done := 0, true
	for i := range s.workloads {
		w := &s.workloads[i]
		if w.Capture == nil || w.Capture.NetNS == "" {
			continue
		}
		n, err := capture.EndTunnels(w.Capture.NetNS)
		total += n
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			done = false
			a.log.Error("tunnels from before a root was distrusted could not be ended; it is tried again", "workload", w.Key(), "error", err)
		}
	}
	a.log.Warn("a distrusted root is withdrawn: tunnels from before were ended", "count", total)
	return done
}

func (a *agent) distrustedFile() string { return filepath.Join(a.cfg.StateDir, "distrusted-roots") }

// loadDistrusted returns the roots that were dealt with; known is false on a node
// that is new, whose tunnels all began later.
func (a *agent) loadDistrusted() (done []string, known bool, err error) {
	text, err := os.ReadFile(a.distrustedFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	return strings.Fields(string(text)), true, err
}

func (a *agent) saveDistrusted(done []ca.Fingerprint) error {
	var text strings.Builder
	for _, f := range done {
		text.WriteString(f.String() + "\n")
	}
	return wholefile.Write(a.distrustedFile(), []byte(text.String()))
}

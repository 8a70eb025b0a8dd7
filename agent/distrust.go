package agent

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/internal/wholefile"
)

// distrust ends the tunnels of this node's pods, once, for each root that was
// distrusted and is withdrawn: whoever is in them may have proven an identity with
// a certificate that somebody else made. Proxies and callers must have the newest
// certificates and roots by then, or the same tunnels would come back. It is called
// by the goroutine that reports.
func (a *agent) distrust(s *nodeState, waits string) {
	gone, published := []string{}, fingerprints(s.bundle)
	for _, f := range s.distrusted {
		if !slices.Contains(published, f) {
			gone = append(gone, f.String())
		}
	}
	if a.distrusted == nil {
		a.loadDistrusted(gone)
	}
	news := slices.ContainsFunc(gone, func(f string) bool { return !slices.Contains(a.distrusted, f) })
	if !news || waits != "" || !a.endTunnels(s) {
		return // if it is not done, again at the next report
	}
	a.distrusted = gone
	a.saveDistrusted()
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
	total += a.live.endDirects(s, "a root that was distrusted is withdrawn")
	a.log.Warn("a distrusted root is withdrawn: tunnels from before were ended", "count", total)
	return done
}

func (a *agent) distrustedFile() string { return filepath.Join(a.cfg.StateDir, "distrusted-roots") }

// loadDistrusted takes up the roots that were dealt with. On a node that is new,
// whose tunnels all begin later, those are all that there are.
func (a *agent) loadDistrusted(gone []string) {
	text, err := os.ReadFile(a.distrustedFile())
	if errors.Is(err, fs.ErrNotExist) {
		a.distrusted = gone
		a.saveDistrusted()
		return
	}
	if err != nil {
		a.log.Error("which distrusted roots are dealt with cannot be read; tunnels end once more", "error", err)
	}
	a.distrusted = append([]string{}, strings.Fields(string(text))...)
}

func (a *agent) saveDistrusted() {
	if err := wholefile.Write(a.distrustedFile(), []byte(strings.Join(a.distrusted, "\n")+"\n")); err != nil {
		a.log.Error("which distrusted roots are dealt with cannot be stored; the next start ends tunnels once more", "error", err)
	}
}

package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/test/harness"
)

// dies fails the test unless a stream's other end goes away soon.
func dies(t *testing.T, what string, h *held) {
	t.Helper()
	_ = h.SetReadDeadline(time.Now().Add(10 * time.Second))
	n, err := h.Read(make([]byte, 1))
	var late net.Error
	if n != 0 || err == nil || errors.As(err, &late) && late.Timeout() {
		t.Errorf("%s: the stream is still there (%d bytes, %v)", what, n, err)
	}
}

// ends returns, of the destination's records, how each stream ended; "open" for
// those that have not.
func ends(t *testing.T, m *harness.Mesh) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Source}) {
		out[r.Source.Address] = r.Ended
		if r.End.IsZero() {
			out[r.Source.Address] = "open"
		}
	}
	return out
}

// TestProxyEndsWithNobodyToTakeOver: a proxy that drained for an hour while the
// node has no other would keep the node without one all that time, since the
// one that replaces it starts only after its end.
func TestProxyEndsWithNobodyToTakeOver(t *testing.T) {
	m, p := upgradable(t)
	stream := hold(t, m.Pod("client"), serverAt)
	began := time.Now()
	p.signal(t, syscall.SIGTERM)
	time.Sleep(time.Second)
	if err := callEcho(t.Context(), m.Pod("client"), serverAt); err != nil {
		t.Errorf("while the proxy waits for another: %v", err)
	}
	if code := p.ended(t, 20*time.Second); code != 0 {
		t.Errorf("the proxy ended with code %d", code)
	}
	dies(t, "the proxy has ended", stream)
	if !strings.Contains(p.log.String(), "cut=2") { // as the caller's and as the callee's proxy
		t.Errorf("the log does not say that 2 connections were cut:\n%s", p.log.String())
	}
	t.Logf("ended %s after SIGTERM", time.Since(began).Round(time.Millisecond))
	if left, err := os.ReadDir(m.RunDir + "/proxies"); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestProxyIsCut: a second SIGTERM, and the limit, cut what is left, say how
// much that was, and touch nothing of the other proxy's.
func TestProxyIsCut(t *testing.T) {
	m, old := upgradable(t)
	for _, way := range []string{"second signal", "limit"} {
		if way == "limit" { // the proxy that serves now has none yet
			limited := startProxy(t, m, "--drain-limit", "4s")
			old.signal(t, syscall.SIGTERM)
			old.ended(t, 30*time.Second)
			old = limited
		}
		mine := hold(t, m.Pod("client"), serverAt)
		next := startProxy(t, m)
		old.signal(t, syscall.SIGTERM)
		m.Eventually(30*time.Second, "the old proxy to drain", func() error {
			if !strings.Contains(old.log.String(), "draining: another proxy") {
				return errors.New("it has not said so")
			}
			return nil
		})
		other := hold(t, m.Pod("client"), serverAt)
		if err := mine.ping(); err != nil {
			t.Fatalf("%s: a stream of the proxy that drains: %v", way, err)
		}
		if way == "second signal" {
			old.signal(t, syscall.SIGTERM)
		}
		if code := old.ended(t, 15*time.Second); code != 0 {
			t.Errorf("%s: the proxy ended with code %d", way, code)
		}
		dies(t, way, mine)
		if err := other.ping(); err != nil {
			t.Errorf("%s: a stream of the other proxy: %v", way, err)
		}
		if !strings.Contains(old.log.String(), "cut=2") {
			t.Errorf("%s: the log does not say that 2 connections were cut:\n%s", way, old.log.String())
		}
		other.Close()
		old = next
	}
}

// TestOneOfTwoProxiesDies: the records of what a dead proxy had open are
// closed, those of the proxy beside it are not, and its connections can still
// be ended by an edit. If all were closed, open connections would be missing
// from the audit, and would outlive their grant.
func TestOneOfTwoProxiesDies(t *testing.T) {
	m, first := upgradable(t)
	ofFirst := hold(t, m.Pod("client"), serverAt)
	second := startProxy(t, m)
	m.Eventually(30*time.Second, "the second proxy to be ready", func() error {
		if !strings.Contains(m.Log(), "proxy connected") || strings.Count(m.Log(), "proxy connected") < 2 {
			return errors.New("not connected")
		}
		return settledNode(t, m)
	})
	first.signal(t, syscall.SIGTERM)
	m.Eventually(30*time.Second, "the first proxy to drain", func() error {
		if !strings.Contains(first.log.String(), "draining: another proxy") {
			return errors.New("it has not said so")
		}
		return nil
	})
	ofSecond := hold(t, m.Pod("client"), serverAt)
	m.Eventually(10*time.Second, "both to be in the audit", func() error {
		if got := ends(t, m); got[ofFirst.own] != "open" || got[ofSecond.own] != "open" {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	// kill -9 of the parent takes its Envoy along.
	first.signal(t, syscall.SIGKILL)
	dies(t, "the parent was killed", ofFirst)
	m.Eventually(10*time.Second, "the dead proxy's record to be closed", func() error {
		if got := ends(t, m); got[ofFirst.own] != "proxy-lost" {
			return fmt.Errorf("%v", got)
		}
		return nil
	})
	if got := ends(t, m); got[ofSecond.own] != "open" {
		t.Errorf("the record of the proxy that lives: %v", got)
	}
	if err := ofSecond.ping(); err != nil {
		t.Errorf("the connection of the proxy that lives: %v", err)
	}
	m.Edit("mesh.yaml", harness.Config("1h")+harness.Namespace("shop", "enforce")+
		harness.Workload("shop", "client", "10.88.0.10")+harness.Workload("shop", "server", "10.88.0.12"))
	dies(t, "its grant is gone", ofSecond)
	second.signal(t, syscall.SIGTERM)
	second.ended(t, 30*time.Second)
}

package control

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/adminserver"
	"github.com/signet-mesh/signet/internal/fanout"
	"github.com/signet-mesh/signet/internal/mesh"
)

// serveAdmin answers the operator until ctx ends.
func (c *control) serveAdmin(ctx context.Context, l net.Listener, agents *fanout.Fanout) error {
	mux := http.NewServeMux()
	if agents != nil {
		defer agents.Close()
		agents.Register(mux)
	}
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { adminserver.Answer(w, c.status(), nil) })
	mux.HandleFunc("GET /v1/explain", func(w http.ResponseWriter, r *http.Request) {
		view, _ := c.feed.Get()
		e, err := Explain(view, r.FormValue("from"), r.FormValue("to"), r.FormValue("port"))
		adminserver.Answer(w, e, err)
	})
	mux.HandleFunc("GET /v1/ca", func(w http.ResponseWriter, _ *http.Request) { adminserver.Answer(w, c.rotation.status(), nil) })
	mux.HandleFunc("GET /v1/ca/bundle", func(w http.ResponseWriter, r *http.Request) {
		b, err := c.trustBundle(r.FormValue("trust-domain"))
		adminserver.Answer(w, b, err)
	})
	mux.HandleFunc("GET /v1/ca/issued", func(w http.ResponseWriter, r *http.Request) {
		issued, err := c.issued(r.FormValue("serial"))
		adminserver.Answer(w, issued, err)
	})
	mux.HandleFunc("GET /v1/ca/issued/to", func(w http.ResponseWriter, r *http.Request) {
		issued, err := c.issuedTo(r.FormValue("id"))
		adminserver.Answer(w, issued, err)
	})
	mux.HandleFunc("POST /v1/ca/rotate", func(w http.ResponseWriter, r *http.Request) {
		force, err := strconv.ParseBool(cmp.Or(r.FormValue("force"), "false"))
		if err == nil {
			err = c.rotation.rotate(force)
		}
		adminserver.Answer(w, c.rotation.status(), err)
	})
	mux.HandleFunc("GET /v1/ca/revoked", func(w http.ResponseWriter, _ *http.Request) { adminserver.Answer(w, c.revoked(), nil) })
	mux.HandleFunc("GET /v1/ca/refused", func(w http.ResponseWriter, r *http.Request) {
		list, err := c.refused(r.FormValue("since"), r.FormValue("limit"))
		adminserver.Answer(w, list, err)
	})
	mux.HandleFunc("POST /v1/ca/revoke", func(w http.ResponseWriter, r *http.Request) {
		err := c.revoke(r.FormValue("serial"), r.FormValue("id"), r.FormValue("reason"))
		adminserver.Answer(w, c.revoked(), err)
	})
	mux.HandleFunc("POST /v1/ca/distrust", func(w http.ResponseWriter, _ *http.Request) {
		err := c.rotation.distrust()
		adminserver.Answer(w, c.rotation.status(), err)
	})
	mux.HandleFunc("POST /v1/ca/abandon", func(w http.ResponseWriter, _ *http.Request) {
		err := c.rotation.abandon()
		adminserver.Answer(w, c.rotation.status(), err)
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(c.metrics(), promhttp.HandlerOpts{}))
	return adminserver.Serve(ctx, l, mux)
}

// issued looks a serial number up in the issuance log.
func (c *control) issued(serial string) (adminv1.Issuance, error) {
	if serial == "" {
		return adminv1.Issuance{}, errors.New("serial: is missing; give a certificate's serial number, or a token's jti")
	}
	e, found, err := c.authority.Load().IssuanceLog().Find(serial)
	if err != nil && !errors.Is(err, ca.ErrDamaged) || !found {
		return adminv1.Issuance{}, err
	}
	return issuance(&e), nil
}

func issuance(e *ca.Entry) adminv1.Issuance {
	return adminv1.Issuance{
		Found: true, Evidence: adminv1.EvidenceLog, Kind: e.Kind, Serial: e.Serial, ID: e.ID, Node: e.Node, Workload: e.Workload,
		At: e.Time, NotBefore: e.NotBefore, NotAfter: e.NotAfter, Outcome: string(e.Outcome),
	}
}

// issuedTo lists what was issued to an identity and has not expired.
func (c *control) issuedTo(id string) (adminv1.Issuances, error) {
	whose, err := spiffeid.FromString(id)
	if err != nil {
		return adminv1.Issuances{}, fmt.Errorf("id: %w", err)
	}
	entries, since, err := c.authority.Load().IssuanceLog().Of(whose, time.Now())
	if err != nil {
		return adminv1.Issuances{}, fmt.Errorf("not every certificate of %s may be known: %w", whose, err)
	}
	out := adminv1.Issuances{Since: since.UTC(), Issued: []adminv1.Issuance{}}
	for i := range entries {
		out.Issued = append(out.Issued, issuance(&entries[i]))
	}
	return out, nil
}

func (c *control) status() adminv1.ControlStatus {
	c.mu.Lock()
	s := adminv1.ControlStatus{Version: c.cfg.Version, TrustDomain: c.trust, Since: c.since, Rejected: c.rejected}
	c.mu.Unlock()
	view, _ := c.feed.Get()
	if view != nil {
		s.Revision = view.Revision
		s.Policies = len(view.Model.Policies())
	}
	if nodes := c.nodes.Load(); nodes != nil {
		s.Nodes = caserver.Nodes(view, c.peers.with(nodes.Reports()))
	}
	return s
}

// Explain answers whether from may reach to on a port, and why. Both are
// SPIFFE IDs of the view's trust domain.
func Explain(view *mesh.View, from, to, port string) (*adminv1.Explanation, error) {
	if view == nil {
		return nil, errors.New("no state is in force yet")
	}
	caller, err := spiffeid.FromString(from)
	if err != nil {
		return nil, fmt.Errorf("from: %q is not a SPIFFE ID: %w", from, err)
	}
	target, err := spiffeid.FromString(to)
	if err != nil {
		return nil, fmt.Errorf("to: %q is not a SPIFFE ID: %w", to, err)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return nil, fmt.Errorf("port: %q is not a port from 1 to 65535", port)
	}
	t, ok := view.Target(target)
	if !ok {
		return nil, fmt.Errorf("to: %s is no workload of this mesh", target)
	}
	d := view.Model.Decide(authz.Request{From: caller, Target: t, Port: uint16(n)})
	itself, _ := view.Model.Originated(t, uint16(n))
	return &adminv1.Explanation{
		From: caller.String(), To: target.String(), Port: int(n),
		Mode: view.State.Mode(t.Namespace).String(), Verdict: d.Verdict.String(),
		Reason: d.Reason, Policy: d.Policy, Near: d.Near, Revision: view.Model.Version(t),
		Terminate: view.Model.Terminated(t)[uint16(n)], Originate: itself.Policy,
	}, nil
}

// metrics describes the control plane at the instant it is asked.
func (c *control) metrics() *prometheus.Registry {
	r := prometheus.NewRegistry()
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
	}
	gauge("signet_control_policies", "Policies in force.", func() float64 { return float64(c.status().Policies) })
	gauge("signet_control_nodes_connected", "Nodes that are connected to this replica.", func() float64 {
		n := 0
		if nodes := c.nodes.Load(); nodes != nil {
			for _, r := range nodes.Reports() {
				if r.Connected {
					n++
				}
			}
		}
		return float64(n)
	})
	gauge("signet_control_edit_rejected", "1 while the newest edit is refused and an older state is in force.", func() float64 {
		if len(c.status().Rejected) > 0 {
			return 1
		}
		return 0
	})
	gauge("signet_control_renewal_failed", "1 while the root should sign another intermediate, and does not: its key cannot be used.", func() float64 {
		if a := c.authority.Load(); a != nil {
			if _, failed := a.Renewal(); failed != nil {
				return 1
			}
		}
		return 0
	})
	r.MustRegister(c.refusals.total)
	if c.cfg.Above != nil {
		status := func() (s ca.UpstreamStatus) {
			if above := c.above.Load(); above != nil { // else the trust domain is not known yet
				s, _ = above.Status()
			}
			return s
		}
		gauge("signet_control_intermediate_not_after_seconds", "When the intermediate ends that signs, as a Unix time; 0: none signs.", func() float64 {
			return float64(max(0, status().NotAfter.Unix()))
		})
		gauge("signet_control_upstream_ready", "0 while the authority above is asked and has not certified.", func() float64 {
			s := status()
			if reason, _ := s.Said(); reason == ca.UpstreamReady {
				return 1
			}
			return 0
		})
	}
	gauge("signet_control_workloads", "Workloads of the mesh.", func() float64 {
		view, _ := c.feed.Get()
		if view == nil {
			return 0
		}
		return float64(len(view.State.Workloads))
	})
	return r
}

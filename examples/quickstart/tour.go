package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
)

// An edit is in force within the promised time. A busy machine is forgiven
// for being late, but not for ever.
const (
	promised = time.Second
	patience = 10 * time.Second
)

// show is the tour, one step after the other. Any surprise ends it.
func (q *quickstart) show(ctx context.Context) error {
	for _, step := range []func(context.Context) error{
		q.services, q.startMesh, q.allowed, q.denied, q.observed, q.rotation, q.edit, q.balance,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (q *quickstart) services(ctx context.Context) error {
	if err := q.prepare(); err != nil {
		return err
	}
	q.servers = map[string]*program{}
	q.step("Four services that know nothing of a mesh, each in its own network namespace")
	if err := q.serve(ctx, "orders", "3 open orders"); err != nil {
		return err
	}
	if err := q.serve(ctx, "notebook", "a page of the notebook"); err != nil {
		return err
	}
	q.say("web and batch only call. What may happen is in %s", filepath.Join("examples", "quickstart", "*.yaml"))
	return nil
}

func (q *quickstart) startMesh(ctx context.Context) error {
	q.step("The mesh: control plane, agent and one Envoy for all of them")
	if err := q.up(ctx); err != nil {
		return err
	}
	return q.signet(ctx, 0, "status")
}

func (q *quickstart) allowed(ctx context.Context) error {
	q.step("An allowed call: web may call orders")
	if err := q.shown(ctx, "web", "shop/orders", ordersURL, audit.Allowed); err != nil {
		return err
	}
	q.say("It went encrypted between two proven identities, and both ends recorded it:")
	if err := q.reconcile(ctx); err != nil {
		return err
	}
	return q.signet(ctx, 0, "audit", "--from", "shop/web", "--to", "shop/orders")
}

func (q *quickstart) denied(ctx context.Context) error {
	q.step("A denied call: no policy lets batch call orders")
	before := q.requests("orders")
	if err := q.shown(ctx, "batch", "shop/orders", ordersURL, audit.Denied); err != nil {
		return err
	}
	if err := q.reconcile(ctx); err != nil {
		return err
	}
	if err := q.signet(ctx, 0, "audit", "--verdict", "denied"); err != nil {
		return err
	}
	if after := q.requests("orders"); after != before {
		return fmt.Errorf("orders logged %d requests before the denied call and %d after", before, after)
	}
	q.ok("the log of orders has no trace of that call")
	return q.signet(ctx, 3, "policy", "explain", "--from", "shop/batch", "--to", "shop/orders", "--port", "8080")
}

func (q *quickstart) observed(ctx context.Context) error {
	q.step("Observe mode: the namespace lab only takes note")
	if err := q.shown(ctx, "batch", "lab/notebook", notebookURL, audit.Observed); err != nil {
		return err
	}
	if err := q.reconcile(ctx); err != nil {
		return err
	}
	return q.signet(ctx, 0, "audit", "--to", "lab/notebook", "--verdict", "observed")
}

func (q *quickstart) rotation(ctx context.Context) error {
	q.step("Certificates rotate under open connections")
	if err := q.hold(ctx, "web", "shop/orders", "10.96.0.10", "80"); err != nil {
		return err
	}
	if err := q.hold(ctx, "web", "lab/notebook", addresses["notebook"], "8080"); err != nil {
		return err
	}
	q.say("web holds a connection to orders and one to notebook.")
	if err := q.signet(ctx, 0, "certs"); err != nil {
		return err
	}
	before, err := q.serials(ctx)
	if err != nil {
		return err
	}
	q.say("They live for 10 s and are renewed at about half of that.")
	after := before
	err = q.until(ctx, 15*time.Second, "every workload to have a new certificate", func() error {
		if after, err = q.serials(ctx); err != nil {
			return &finalError{err}
		}
		q.rotated = 0
		for holder, serial := range after {
			if serial != "" && serial != before[holder] {
				q.rotated++
			}
		}
		if q.rotated < len(before) {
			return fmt.Errorf("%d of %d have one", q.rotated, len(before))
		}
		return nil
	})
	if err != nil {
		return err
	}
	q.say("web before: %s", before["shop/web"])
	q.say("web after:  %s", after["shop/web"])
	if err := q.shown(ctx, "web", "shop/orders", ordersURL, audit.Allowed); err != nil {
		return err
	}
	for _, p := range q.held {
		if p.ended() {
			return fmt.Errorf("the rotation ended the connection of %s: %s", p.name, lastLine(p.out.String()))
		}
	}
	q.ok("a new certificate for each of %d workloads, and both open connections live on", q.rotated)
	return nil
}

func (q *quickstart) edit(ctx context.Context) error {
	q.step("The policy edited while it is in force: orders may be called by batch instead of web")
	file := filepath.Join(meshDir, "40-policies.yaml")
	toOrders, toNotebook := q.held[0], q.held[1]
	const script = "s/serviceAccount: web$/serviceAccount: batch/"
	q.command("node", "sed -i '"+script+"' "+file)
	if out, err := exec.CommandContext(ctx, "sed", "-i", script, file).CombinedOutput(); err != nil {
		return fmt.Errorf("sed: %w: %s", err, out)
	}
	at := time.Now()
	q.edited = at
	var refused time.Duration
	var why string
	err := q.until(ctx, patience, "web to be refused", func() error {
		out, answered, err := q.call(ctx, "web", "shop/orders", ordersURL, audit.Allowed)
		if err != nil {
			return &finalError{err}
		}
		if answered {
			return errors.New("web is still answered")
		}
		refused, why = time.Since(at), out
		cut, err := q.wasCut(ctx, "shop/web", "shop/orders")
		switch {
		case err != nil:
			return &finalError{err}
		case cut:
			return errors.New("a call was under way when the edit came")
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = q.until(ctx, patience, "web's open connection to orders to be ended", func() error {
		if !toOrders.ended() {
			return errors.New("it is still open")
		}
		return nil
	})
	if err != nil {
		return err
	}
	ended := toOrders.at.Sub(at)
	if max(refused, ended) > promised {
		q.say("Later than the promised %s: this machine is busy.", promised)
	}
	ms := func(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
	q.ok("web's next call is refused %s after the edit: %s", ms(refused), why)
	q.ok("web's open connection to orders is ended %s after the edit: %s", ms(ended), lastLine(toOrders.out.String()))
	if err := q.shown(ctx, "batch", "shop/orders", ordersURL, audit.Allowed); err != nil {
		return err
	}
	if toNotebook.ended() {
		return fmt.Errorf("the edit has nothing to do with notebook, yet web's connection to it ended: %s", lastLine(toNotebook.out.String()))
	}
	q.ok("batch is answered now, and web's connection to notebook lives on")
	return nil
}

func (q *quickstart) balance(ctx context.Context) error {
	q.step("The balance: what the callers saw against what the audit has")
	if err := q.reconcile(ctx); err != nil {
		return err
	}
	if err := q.revoked(ctx); err != nil {
		return err
	}
	q.ok("every connection is in the audit once for each side, with the right identities and verdict")
	return q.signet(ctx, 0, "audit", "verify")
}

// revoked checks that the audit says which connections the edit ended: the one
// that was open before it, and at most calls that came at the same moment.
func (q *quickstart) revoked(ctx context.Context) error {
	return q.until(ctx, 5*time.Second, "the audit to tell the revocation", func() error {
		records, err := q.records(ctx)
		if err != nil {
			return &finalError{err}
		}
		open := 0
		for _, r := range records {
			if r.Ended != "revoked" || r.Side != audit.Destination {
				continue
			}
			if from, to := account(r.Source), account(r.Destination); from != "shop/web" || to != "shop/orders" {
				return &finalError{fmt.Errorf("a connection of %s to %s was revoked, which the edit does not concern", from, to)}
			}
			if r.Start.Before(q.edited) {
				open++
			}
		}
		if open != 1 {
			return fmt.Errorf("%d connections from before the edit are recorded as revoked, want 1", open)
		}
		return nil
	})
}

// requests counts what a server's own log has.
func (q *quickstart) requests(name string) int {
	return strings.Count(q.servers[name].out.String(), "HTTP/1.1\"")
}

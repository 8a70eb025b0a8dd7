package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/tally"
)

// maxRefusedText is how many bytes of a caller's words are kept.
const maxRefusedText = 512

// refusals is what the control plane refused nodes, and others.
type refusals struct {
	total *prometheus.CounterVec
	tally *tally.Tally[caserver.Refusal]
}

func newRefusals() *refusals {
	r := &refusals{
		total: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "signet_control_refused_total",
			Help: "Calls of nodes, and of whoever else called, that this replica refused.",
		}, []string{"reason"}),
		tally: tally.New[caserver.Refusal](),
	}
	for _, reason := range caserver.Reasons { // so that a first refusal shows as a rise
		r.total.WithLabelValues(string(reason))
	}
	return r
}

// add notes a refusal. It does not block.
func (r *refusals) add(one caserver.Refusal) {
	r.total.WithLabelValues(string(one.Reason)).Inc()
	if one.Reason == caserver.ReasonStarting {
		return // the same caller is answered in a moment
	}
	one.Workload, one.Message = tally.Text(one.Workload, maxRefusedText), tally.Text(one.Message, maxRefusedText)
	who := "node " + one.Node
	if one.Node == "" {
		who = "from " + one.From
	}
	r.tally.Add(who, strings.Join([]string{one.Call, string(one.Reason), one.Workload, one.From}, "\n"), one)
}

// keep writes refusals into the issuance log until ctx ends; package tally says
// how many.
func (r *refusals) keep(ctx context.Context, authority *ca.Authority, log *slog.Logger) {
	r.tally.Run(ctx, func(_ context.Context, entries []tally.Entry[caserver.Refusal]) error {
		list := make([]ca.Refused, len(entries))
		for i, e := range entries {
			list[i] = ca.Refused{
				First: e.First, Last: e.Last, Count: e.Count, Several: e.Several, Call: e.Event.Call, Node: e.Event.Node,
				Workload: e.Event.Workload, From: e.Event.From, Why: string(e.Event.Reason), Reason: e.Event.Message,
			}
		}
		err := authority.LogRefused(list)
		if err != nil {
			log.Error("writing what was refused into the issuance log", "error", err)
		}
		return err
	})
}

// refused reads what was refused out of the issuance log.
func (c *control) refused(since, limit string) (adminv1.Refusals, error) {
	out := adminv1.Refusals{Refused: []adminv1.Refused{}}
	var after time.Time
	if since != "" {
		var err error
		if after, err = time.Parse(time.RFC3339Nano, since); err != nil {
			return out, fmt.Errorf("since: %q is not a time like 2006-01-02T15:04:05Z", since)
		}
	}
	most := 0
	if limit != "" {
		var err error
		if most, err = strconv.Atoi(limit); err != nil || most < 0 {
			return out, fmt.Errorf("limit: %q is not a number from 0", limit)
		}
	}
	list, err := c.authority.Load().IssuanceLog().Refused(after, most)
	if err != nil && !errors.Is(err, ca.ErrDamaged) {
		return out, err
	}
	for _, r := range list {
		out.Refused = append(out.Refused, adminv1.Refused{
			First: r.First, Last: r.Last, Count: r.Count, Several: r.Several, Call: r.Call, Node: r.Node,
			Workload: r.Workload, From: r.From, Why: r.Why, Reason: r.Reason,
		})
	}
	return out, nil
}

package fanout

import (
	"context"
	"fmt"
	"sync"
	"time"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/adminclient"
)

// ask puts one question to all nodes at once and returns the answers in the
// order of the nodes, with those that did not answer apart.
func ask[T any](ctx context.Context, f *Fanout, nodes []Node, timeout time.Duration, question func(context.Context, *adminclient.Client, string) (T, error)) (answers []T, missing []adminv1.MissingNode) {
	all := make([]T, len(nodes))
	errs := make([]error, len(nodes))
	free := make(chan struct{}, maxParallel)
	var done sync.WaitGroup
	for i, n := range nodes {
		free <- struct{}{}
		done.Go(func() {
			defer func() { <-free }()
			ctx, cancel := context.WithTimeout(ctx, timeout)
			defer cancel()
			all[i], errs[i] = question(ctx, f.client(n.Name), n.Name)
		})
	}
	done.Wait()
	for i, n := range nodes {
		if errs[i] != nil {
			missing = append(missing, adminv1.MissingNode{Node: n.Name, Error: why(errs[i], timeout)})
			continue
		}
		answers = append(answers, all[i])
	}
	return answers, missing
}

// Status asks every node how it is.
func (f *Fanout) Status(ctx context.Context) (adminv1.MeshStatus, error) {
	nodes, err := f.nodes("")
	if err != nil {
		return adminv1.MeshStatus{}, err
	}
	agents, missing := ask(ctx, f, nodes, f.cfg.Timeout, func(ctx context.Context, c *adminclient.Client, node string) (adminv1.AgentStatus, error) {
		s, err := c.AgentStatus(ctx)
		if err == nil && s.Node != node {
			err = fmt.Errorf("it answers as node %q", s.Node)
		}
		return s, err
	})
	out := adminv1.MeshStatus{Agents: agents, Missing: missing}
	if out.Agents == nil {
		out.Agents = []adminv1.AgentStatus{}
	}
	if view := f.cfg.View(); view != nil {
		out.Namespaces = Namespaces(view.State, agents, missing)
	}
	return out, nil
}

// Certificates asks every node, or one, for its certificates.
func (f *Fanout) Certificates(ctx context.Context, only string) (adminv1.MeshCertificates, error) {
	nodes, err := f.nodes(only)
	if err != nil {
		return adminv1.MeshCertificates{}, err
	}
	answers, missing := ask(ctx, f, nodes, f.cfg.Timeout, func(ctx context.Context, c *adminclient.Client, node string) (of []adminv1.NodeCertificate, err error) {
		certs, err := c.Certificates(ctx)
		for _, cert := range certs {
			of = append(of, adminv1.NodeCertificate{Node: node, Certificate: cert})
		}
		return of, err
	})
	out := adminv1.MeshCertificates{Certificates: []adminv1.NodeCertificate{}, Missing: missing}
	for _, a := range answers {
		out.Certificates = append(out.Certificates, a...)
	}
	return out, nil
}

// VerifyAudit has every node, or one, read its whole audit store.
func (f *Fanout) VerifyAudit(ctx context.Context, only string) (adminv1.MeshVerification, error) {
	nodes, err := f.nodes(only)
	if err != nil {
		return adminv1.MeshVerification{}, err
	}
	answers, missing := ask(ctx, f, nodes, f.cfg.VerifyTimeout, func(ctx context.Context, c *adminclient.Client, node string) (adminv1.NodeVerification, error) {
		v, err := c.VerifyAudit(ctx)
		return adminv1.NodeVerification{Node: node, AuditVerification: v}, err
	})
	if answers == nil {
		answers = []adminv1.NodeVerification{}
	}
	return adminv1.MeshVerification{Nodes: answers, Missing: missing}, nil
}

package adminclient

import (
	"context"
	"fmt"
	"net/url"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
)

// MeshStatus asks for the state of every node. Of a mesh on one machine that is
// its agent's.
func (c *Client) MeshStatus(ctx context.Context) (s adminv1.MeshStatus, err error) {
	if c.cluster {
		return s, c.control.get(ctx, "/v1/mesh/status", nil, &s)
	}
	a, err := c.AgentStatus(ctx)
	if err != nil {
		return s, err
	}
	return adminv1.MeshStatus{Agents: []adminv1.AgentStatus{a}}, nil
}

// MeshCertificates asks for the certificates of every node, or of one.
func (c *Client) MeshCertificates(ctx context.Context, node string) (m adminv1.MeshCertificates, err error) {
	if c.cluster {
		return m, c.control.get(ctx, "/v1/mesh/certificates", ofNode(node), &m)
	}
	if err := c.isNode(ctx, node); err != nil {
		return m, err
	}
	certs, err := c.Certificates(ctx)
	for _, cert := range certs {
		m.Certificates = append(m.Certificates, adminv1.NodeCertificate{Certificate: cert})
	}
	return m, err
}

// VerifyMeshAudit asks every node, or one, to read its whole audit store and
// check the chain.
func (c *Client) VerifyMeshAudit(ctx context.Context, node string) (m adminv1.MeshVerification, err error) {
	if c.cluster {
		return m, c.control.get(ctx, "/v1/mesh/audit/verify", ofNode(node), &m)
	}
	if err := c.isNode(ctx, node); err != nil {
		return m, err
	}
	v, err := c.VerifyAudit(ctx)
	return adminv1.MeshVerification{Nodes: []adminv1.NodeVerification{{AuditVerification: v}}}, err
}

// Workload asks about one workload, "namespace/name".
func (c *Client) Workload(ctx context.Context, name string) (w adminv1.Workload, err error) {
	if c.cluster {
		return w, c.control.get(ctx, "/v1/mesh/workload", url.Values{"name": {name}}, &w)
	}
	s, err := c.AgentStatus(ctx)
	if err != nil {
		return w, err
	}
	for _, local := range s.Workloads {
		if local.Workload == name {
			return adminv1.Workload{Workload: name, ID: local.ID, Node: s.Node, Mode: local.Mode}, nil
		}
	}
	return w, fmt.Errorf("%s is no workload of this mesh", name)
}

func ofNode(node string) url.Values {
	if node == "" {
		return nil
	}
	return url.Values{"node": {node}}
}

// isNode fails unless the mesh on this machine is the node, or no node is asked
// for.
func (c *Client) isNode(ctx context.Context, node string) error {
	if node == "" {
		return nil
	}
	s, err := c.AgentStatus(ctx)
	if err == nil && s.Node != node {
		err = fmt.Errorf("node %s is not of this mesh, whose only node is %s", node, s.Node)
	}
	return err
}

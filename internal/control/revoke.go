package control

import (
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/mesh"
)

// hold takes up the authority, which is not before the first view.
func (c *control) hold(authority *ca.Authority) {
	c.setting.Lock()
	defer c.setting.Unlock()
	declareRevoked(authority, c.view())
	c.authority.Store(authority)
}

// set puts a view in force. What it says is revoked is so before anybody can see
// the view: a node that acts by its revision refuses all that it says.
func (c *control) set(view *mesh.View) {
	c.setting.Lock()
	defer c.setting.Unlock()
	if authority := c.authority.Load(); authority != nil {
		declareRevoked(authority, view)
	}
	c.feed.Set(view)
}

func declareRevoked(authority *ca.Authority, view *mesh.View) {
	var list []ca.Revoked
	for _, r := range view.State.Revoked {
		list = append(list, ca.Revoked{Serial: r.Serial, ID: r.ID, Reason: r.Reason, At: r.Since, NotAfter: r.NotAfter})
	}
	authority.DeclareRevoked(list)
}

// revoke revokes one certificate, by its serial number, or all of an identity.
// Replicas do not share what one of them revokes, so where there may be others it
// is declared, where the API server checks who may.
func (c *control) revoke(serial, id, reason string) error {
	if c.cfg.Agents != nil {
		return errors.New("in a cluster certificates are revoked by spec.revoked of the MeshConfig, which `kubectl signet ca revoke` writes")
	}
	if id == "" {
		_, err := c.authority.Load().Revoke(serial, reason)
		return err
	}
	if serial != "" {
		return errors.New("give a serial number or an identity, not both")
	}
	whose, err := spiffeid.FromString(id)
	if err != nil {
		return fmt.Errorf("id: %w", err)
	}
	_, err = c.authority.Load().RevokeIdentity(whose, reason)
	return err
}

func (c *control) revoked() adminv1.Revocations {
	out := adminv1.Revocations{Now: time.Now().UTC(), Certificates: []adminv1.RevokedCertificate{}}
	list, _, _ := c.authority.Load().Revoked()
	for _, r := range list {
		out.Certificates = append(out.Certificates, adminv1.RevokedCertificate{
			Serial: r.Serial, ID: r.ID, Reason: r.Reason, At: r.At, NotAfter: r.NotAfter, Refused: r.Refused(time.Now()),
		})
	}
	if c.cfg.Agents == nil {
		return out
	}
	status := c.status()
	for _, n := range status.Nodes {
		if n.Connected {
			out.Nodes++
			if n.Revision == status.Revision {
				out.Acting++
			}
		}
	}
	return out
}

package control

import (
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
)

// revoke revokes one certificate, by its serial number, or all of an identity. Replicas do not share what one of them revokes,
// so where there may be others nothing is.
func (c *control) revoke(serial, id, reason string) error {
	if c.cfg.Agents != nil {
		return errors.New("in a cluster single certificates cannot be revoked yet; cut the identity off with a Quarantine, or replace the root with `kubectl signet ca distrust`")
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
	out := adminv1.Revocations{Certificates: []adminv1.RevokedCertificate{}}
	list, _, _ := c.authority.Load().Revoked()
	for _, r := range list {
		out.Certificates = append(out.Certificates, adminv1.RevokedCertificate{
			Serial: r.Serial, ID: r.ID, Reason: r.Reason, At: r.At, NotAfter: r.NotAfter, Refused: r.Refused(time.Now()),
		})
	}
	return out
}

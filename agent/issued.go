package agent

import (
	"context"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/signet-mesh/signet/agent/audit"
)

// issuedWrite bounds how long an answer of the control plane waits for the disk.
const issuedWrite = 5 * time.Second

// issued writes into the audit what the control plane has issued, before anybody
// has it. It knows it too, but in a cluster only until its pod ends. That it cannot be
// written is no reason to let certificates expire: then the log has it.
func (a *agent) issued(ctx context.Context, records ...audit.Record) {
	if a.cfg.NoAudit || len(records) == 0 {
		return
	}
	// Who asked may have gone; it was issued all the same.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), issuedWrite)
	defer cancel()
	now := time.Now().Round(0)
	events := make([]audit.Event, len(records))
	for i, r := range records {
		r.ID, r.Verdict, r.Start, r.End = "issued:"+r.Source.Serial, audit.Issued, now, now
		events[i] = audit.Event{Record: r, Final: true}
	}
	if err := a.store.Add(ctx, events); err != nil {
		for _, r := range records {
			a.log.Error("storing what was issued", "id", r.Source.ID, "workload", r.Source.Workload, "serial", r.Source.Serial, "not_after", r.Issuance.NotAfter, "error", err)
		}
	}
}

// issuedCertificate describes a certificate; workload is empty for the node's own.
func issuedCertificate(workload string, leaf *x509.Certificate) audit.Record {
	r := audit.Record{
		Source: audit.Party{Workload: workload, Serial: fmt.Sprintf("%x", leaf.SerialNumber.Bytes())},
		Issuance: &audit.Issuance{
			Kind: audit.KindX509, NotBefore: leaf.NotBefore.UTC(), NotAfter: leaf.NotAfter.UTC(), Issuer: fmt.Sprintf("%x", leaf.AuthorityKeyId),
		},
	}
	if len(leaf.URIs) == 1 {
		r.Source.ID = leaf.URIs[0].String()
	}
	return r
}

// issuedChain describes a chain's certificate; none, if it is none: nobody can use it.
func issuedChain(workload string, chain [][]byte) []audit.Record {
	if len(chain) == 0 {
		return nil
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil
	}
	return []audit.Record{issuedCertificate(workload, leaf)}
}

// issuedToken describes a token that is for the audience; none, if it is no token.
func issuedToken(workload string, audience []string, token string) []audit.Record {
	svid, err := jwtsvid.ParseInsecure(token, audience)
	if err != nil {
		return nil
	}
	number, _ := svid.Claims["jti"].(string)
	return []audit.Record{{
		Source: audit.Party{ID: svid.ID.String(), Workload: workload, Serial: number},
		Issuance: &audit.Issuance{
			Kind: audit.KindJWT, NotAfter: svid.Expiry.UTC(), Audience: svid.Audience,
		},
	}}
}

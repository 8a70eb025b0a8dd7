package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/output"
)

// That the root's key does not sign the next intermediate is said long before
// anything ends by it.
func TestAuthorityRenewalShown(t *testing.T) {
	now := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	doc := &caDoc{At: now, AuthorityStatus: adminv1.AuthorityStatus{
		TrustDomain: "mesh.example", Stage: adminv1.RotationIdle, Renewal: "the token does not answer", NotAfter: now.Add(50 * time.Hour),
		Roots: []adminv1.RootStatus{{Fingerprint: strings.Repeat("ab", 32), Role: "signs", Key: "pkcs11:id=%01"}},
	}}
	for format, want := range map[output.Format]string{
		output.Table: "the intermediate could not be renewed, and ends in 50h0m0s: the token does not answer",
		output.Wide:  "pkcs11:id=%01",
		output.JSON:  `"renewal": "the token does not answer"`,
	} {
		var out bytes.Buffer
		if err := output.NewPrinter(&out, format, false).Print(doc); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out.String(), want) {
			t.Errorf("%s: no %q in\n%s", format, want, &out)
		}
	}
}

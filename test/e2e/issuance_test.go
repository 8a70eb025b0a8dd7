package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/test/harness"
)

// issuedHere is what the node's audit says of the issuance of a certificate or token.
func issuedHere(m *harness.Mesh, serial string) (out []string) {
	for _, r := range m.Records(adminclient.AuditQuery{Serial: serial, Verdicts: []audit.Verdict{audit.Issued}}) {
		out = append(out, r.Source.Workload+" "+r.Source.ID)
	}
	return out
}

// TestCertificatesTogether: an agent that starts asks for its workloads' certificates
// in few calls; each workload has its own, and each is in the issuance log and in the
// node's audit. One that comes later is asked for by itself.
func TestCertificatesTogether(t *testing.T) {
	const count = 30
	entry := func(i int) string {
		return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: WorkloadEntry
metadata: {name: w%[1]d, namespace: shop}
spec: {serviceAccount: w%[1]d, attest: {uid: %[2]d}}
---
`, i, 20000+i)
	}
	var documents strings.Builder
	documents.WriteString(harness.Config("1h") + harness.Namespace("shop", "enforce"))
	for i := range count {
		documents.WriteString(entry(i))
	}
	m := harness.Start(t, harness.Options{Documents: map[string]string{"mesh.yaml": documents.String()}})
	held := func(want int) {
		t.Helper()
		m.Eventually(20*time.Second, "all certificates", func() error {
			certs, err := m.Client.Certificates(t.Context())
			if err != nil {
				return err
			}
			serials := map[string]bool{}
			for _, c := range certs {
				if c.Holder == "node" && !slices.Contains(issuedHere(m, c.Serial), " "+c.ID) {
					t.Fatalf("the node's own certificate is not in its audit: %+v", c)
				}
				if c.Holder == "node" || c.Serial == "" {
					continue
				}
				serials[c.Serial] = true
				if name := strings.TrimPrefix(c.Holder, "shop/"); c.ID != "spiffe://mesh.test/ns/shop/sa/"+name {
					t.Fatalf("%s has the certificate of %s", c.Holder, c.ID)
				}
				if i, err := m.Client.Issued(t.Context(), c.Serial); err != nil || i.ID != c.ID || i.Workload != c.Holder || i.Outcome != "issued" {
					t.Fatalf("of %s the log has %+v, %v", c.Holder, i, err)
				}
				if !slices.Contains(issuedHere(m, c.Serial), c.Holder+" "+c.ID) {
					t.Fatalf("the node has the certificate of %s, and not in its audit", c.Holder)
				}
			}
			if len(serials) != want {
				return fmt.Errorf("%d of %d", len(serials), want)
			}
			return nil
		})
	}
	calls := func(call string) (n int) {
		for line := range strings.Lines(m.Log()) {
			if strings.Contains(line, "msg=issued") && strings.Contains(line, "call="+call+" ") && strings.Contains(line, "workload=shop/") {
				n++
			}
		}
		return n
	}
	held(count)
	together, alone := calls("IssueMany"), calls("Issue")
	t.Logf("%d certificates came together, %d by themselves", together, alone)
	if together < count/2 || together+alone != count {
		t.Errorf("%d certificates came together and %d by themselves, of %d", together, alone, count)
	}
	time.Sleep(2 * time.Second) // a while of quiet
	m.Edit("mesh.yaml", documents.String()+entry(count))
	held(count + 1)
	if got := calls("Issue"); got != alone+1 || calls("IssueMany") != together {
		t.Errorf("of one that came later %d certificates came by themselves", got-alone)
	}
}

package manifest

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/authz"
)

const quarantineDocuments = meshConfig + `---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: signet.dev/v1alpha1
kind: Quarantine
metadata: {name: incident-7}
spec:
  reason: leaked key
  serviceAccounts: [shop/web]
`

// A quarantine in a directory cuts off as one in a cluster does, and is part
// of what the revision names: nodes that have the old revision must hear of it.
func TestQuarantine(t *testing.T) {
	m, err := Load(write(t, quarantineDocuments), "here")
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Quarantines) != 1 || m.Quarantines[0].Name != "incident-7" || m.Quarantines[0].Spec.Reason != "leaked key" {
		t.Fatalf("quarantines %+v", m.Quarantines)
	}
	model, diagnostics := authz.Compile(m.State.TrustDomain, m.Policies, m.Quarantines...)
	id := spiffeid.RequireFromString("spiffe://" + m.State.TrustDomain.Name() + "/ns/shop/sa/web")
	if name, ok := model.Quarantined(id); !ok || name != "incident-7" || len(diagnostics) != 0 {
		t.Errorf("%s: %q %v %+v", id, name, ok, diagnostics)
	}
	if revision(m.State, nil, nil) == m.Revision || revision(m.State, nil, m.Quarantines) != m.Revision {
		t.Error("the revision does not depend on the quarantine")
	}
}

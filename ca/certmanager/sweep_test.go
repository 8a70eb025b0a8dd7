package certmanager_test

import (
	"context"
	"log/slog"
	"slices"
	"testing"
	"time"

	cmv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	"github.com/cert-manager/cert-manager/pkg/client/clientset/versioned/fake"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/certmanager"
)

// What was left behind, by a node that is gone say, does not stay for ever; what may
// be waited for does, and so does all that is no workload's or not the mesh's.
func TestSweep(t *testing.T) {
	request := func(name, purpose string, age time.Duration) *cmv1.CertificateRequest {
		r := &cmv1.CertificateRequest{ObjectMeta: metav1.ObjectMeta{Namespace: release, Name: name, CreationTimestamp: metav1.NewTime(time.Now().Add(-age))}}
		if purpose != "" {
			r.Labels = map[string]string{certmanager.LabelPurpose: purpose}
		}
		return r
	}
	client := fake.NewClientset(
		request("old", certmanager.PurposeWorkload, time.Hour), request("young", certmanager.PurposeWorkload, 5*time.Minute),
		request("intermediate", certmanager.PurposeIntermediate, time.Hour), request("others", "", time.Hour))
	u, err := certmanager.New(client.CertmanagerV1(), release, certmanager.Issuer{Name: "mesh"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	id := workload(t, 1)
	csr := wholeCSR(t, id)
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		_, err = u.CertifyLeaf(ctx, ca.LeafRequest{ID: id, CSR: csr, TTL: time.Hour, Record: func() error { return nil }})
		cancel()
		if err == nil {
			t.Error("certified by nobody")
		}
	}
	list, err := client.CertmanagerV1().CertificateRequests(release).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range list.Items {
		names = append(names, r.Name)
	}
	if len(names) != 4 || slices.Contains(names, "old") {
		t.Errorf("there are %q", names)
	}
	lists := 0
	for _, a := range client.Actions() {
		if a.GetVerb() == "list" {
			lists++
		}
	}
	if lists != 2 { // one of them is the test's
		t.Errorf("listed %d times", lists)
	}
}

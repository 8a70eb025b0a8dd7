package kube

import (
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/ca"
)

// A list with mistakes in it, as an API server without the newest CRD may let
// through, is in force as far as it can be read; each mistake is said. Who writes
// an instant that is still to come does not put it off.
func TestRevokedWithMistakes(t *testing.T) {
	now := time.Now()
	ahead, behind := metav1.NewTime(now.Add(time.Hour)), metav1.NewTime(now.Add(-time.Hour))
	spec := v1alpha1.MeshConfigSpec{TrustDomain: "mesh.example", Revoked: []v1alpha1.Revocation{
		{Serial: "no number", Reason: "x"}, {Serial: "0A", Reason: ""}, {Serial: "0b", Reason: "x", Since: &ahead},
		{Serial: "0c", Reason: "x", Since: &behind}, {Serial: "0c", Reason: "again"},
	}}
	var r revocations
	faults := r.read(&spec, now)
	if len(faults) != 2 || !strings.HasPrefix(faults[0], "spec.revoked[0].serial: ") || !strings.HasPrefix(faults[1], "spec.revoked[1].reason: ") {
		t.Errorf("faults %q", faults)
	}
	var serials []string
	for _, one := range r.list {
		serials = append(serials, one.Serial)
	}
	if got := strings.Join(serials, " "); got != "0a 0b 0c" {
		t.Fatalf("in force: %s", got)
	}
	if !r.look(now) || r.refused != 2 || !r.pending() {
		t.Errorf("%d are refused at once, want those without an instant and with one that is over", r.refused)
	}
	var other revocations // another replica, which reads it later
	other.read(&spec, now.Add(time.Second))
	other.look(now.Add(time.Second))
	x := newIndex(caches{}, testDomain, nil)
	if a, b := x.view(settings{td: testDomain}, &documents{}, &r), x.view(settings{td: testDomain}, &documents{}, &other); a.Revision != b.Revision {
		t.Error("two replicas name the same list differently, and neither knows which nodes act by the other's")
	}
	r.read(&spec, now.Add(time.Second)) // an edit elsewhere
	if r.look(now.Add(time.Second)) {
		t.Error("the same list counts as a change")
	}
	if !r.look(now.Add(ca.RevokeGrace)) || r.pending() {
		t.Error("an instant that is still to come puts a revocation off")
	}
	r.read(&v1alpha1.MeshConfigSpec{}, now)
	if len(r.list) != 3 {
		t.Error("a MeshConfig that cannot be read takes the list away")
	}
	spec.Revoked = nil
	r.read(&spec, now)
	if !r.look(now) || len(r.list) != 0 {
		t.Error("what is no longer revoked stays so")
	}
}

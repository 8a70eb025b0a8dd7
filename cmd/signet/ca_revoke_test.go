package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/api/v1alpha1"
)

// What is written into the MeshConfig keeps what is there and has not expired, also
// what somebody wrote by hand without an end, has nothing twice, and never more than
// the API server takes.
func TestWithRevoked(t *testing.T) {
	at := func(d time.Duration) *metav1.Time { return &metav1.Time{Time: testNow.Add(d)} }
	had := []v1alpha1.Revocation{
		{Serial: "0a", Reason: "by hand"}, {Serial: "0b", NotAfter: at(-2 * time.Minute)},
		{Serial: "0c", NotAfter: at(-30 * time.Second)}, {Serial: "0d", Reason: "first", NotAfter: at(time.Hour)},
	}
	got, err := withRevoked(had, []v1alpha1.Revocation{{Serial: "0d", Reason: "again"}, {Serial: "0e", Reason: "new"}}, testNow)
	if err != nil {
		t.Fatal(err)
	}
	var text []string
	for _, r := range got {
		text = append(text, strings.TrimSpace(r.Serial+" "+r.Reason))
	}
	if s := strings.Join(text, ", "); s != "0a by hand, 0c, 0d first, 0e new" {
		t.Errorf("%s", s)
	}
	var many []v1alpha1.Revocation
	for i := range 256 {
		many = append(many, v1alpha1.Revocation{Serial: fmt.Sprintf("%04x", i+4096)})
	}
	if _, err := withRevoked(many, nil, testNow); err != nil {
		t.Error(err)
	}
	if _, err := withRevoked(many, []v1alpha1.Revocation{{Serial: "0e"}}, testNow); err == nil || !strings.Contains(err.Error(), "256 is the most") {
		t.Errorf("one too many: %v", err)
	}
}

// The command is done when a replica has all of it, refuses all of it, and every node
// acts by it.
func TestNotYet(t *testing.T) {
	want := []v1alpha1.Revocation{{Serial: "0a"}, {Serial: "0b"}}
	one := func(serial string, refused bool) adminv1.RevokedCertificate {
		return adminv1.RevokedCertificate{Serial: serial, Refused: refused}
	}
	for _, c := range []struct {
		list adminv1.Revocations
		want string
	}{
		{adminv1.Revocations{Acting: 2, Nodes: 2, Certificates: []adminv1.RevokedCertificate{one("0a", true)}}, "has not read 0b"},
		{adminv1.Revocations{Acting: 2, Nodes: 2, Certificates: []adminv1.RevokedCertificate{one("0a", true), one("0b", false)}}, "the holder of 0b"},
		{adminv1.Revocations{Acting: 1, Nodes: 2, Certificates: []adminv1.RevokedCertificate{one("0a", true), one("0b", true)}}, "1 of 2 nodes"},
		{adminv1.Revocations{Acting: 2, Nodes: 2, Certificates: []adminv1.RevokedCertificate{one("0a", true), one("0b", true)}}, ""},
	} {
		if got := notYet(&c.list, want); got != c.want && (c.want == "" || !strings.Contains(got, c.want)) {
			t.Errorf("%+v: %q, want %q", c.list, got, c.want)
		}
	}
}

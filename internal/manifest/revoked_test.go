package manifest

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// A revocation in a directory is in force as one in a cluster is, and is part of
// what the revision names. A mistake in one refuses the edit.
func TestRevoked(t *testing.T) {
	with := func(list string) string {
		return "apiVersion: signet.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: mesh}\nspec: {trustDomain: mesh.example, revoked: [" + list + "]}\n"
	}
	m, err := Load(write(t, with(`{serial: "0A:1B", reason: stolen, notAfter: "2026-01-02T03:04:05Z"}, {serial: "00c", reason: lost}`)), "here")
	if err != nil {
		t.Fatal(err)
	}
	got := m.State.Revoked
	if len(got) != 2 || got[0].Serial != "0a1b" || got[0].Reason != "stolen" || got[0].NotAfter.Year() != 2026 || got[1].Serial != "0c" || !got[1].NotAfter.IsZero() {
		t.Errorf("%+v", got)
	}
	other, err := Load(write(t, with(`{serial: "0c", reason: lost}`)), "here")
	if err != nil || other.Revision == m.Revision {
		t.Errorf("the revision does not depend on the list: %v", err)
	}
	for list, want := range map[string]string{
		`{serial: "xyz", reason: stolen}`:                         "spec.revoked[0].serial",
		`{serial: "0:0", reason: stolen}`:                         "spec.revoked[0].serial",
		`{serial: "ff"}`:                                          "spec.revoked[0].reason",
		`{serial: "ff", reason: x}, {serial: "00:ff", reason: x}`: "spec.revoked[1].serial",
		`{serial: "ff", reason: x, since: "` + time.Now().Add(time.Hour).Format(time.RFC3339) + `"}`: "spec.revoked[0].since",
	} {
		var bad *Error
		if _, err := Load(write(t, with(list)), "here"); !errors.As(err, &bad) || len(bad.Findings) != 1 || !strings.Contains(bad.Findings[0].String(), want) {
			t.Errorf("%s: %v, want a finding at %s", list, err, want)
		}
	}
}

package attest

import (
	"testing"

	"github.com/signet-mesh/signet/internal/mesh"
)

// One attestation of the test itself by user id, path and digest, with the
// digest remembered.
func BenchmarkAttest(b *testing.B) {
	p := ownProcess(b)
	f := &facts{ctx: b.Context(), p: p, digests: newDigests()}
	path, err := f.readPath()
	if err != nil {
		b.Fatal(err)
	}
	f.digests.settled = 0
	sum, err := f.readSHA256()
	if err != nil {
		b.Fatal(err)
	}
	a := attestor(mesh.Attest{UID: &p.UID, Path: path, SHA256: sum})
	a.digests = f.digests
	for b.Loop() {
		if _, err := a.Attest(b.Context(), p); err != nil {
			b.Fatal(err)
		}
	}
}

package manifest

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// revision hashes the state, the compiled policies and the quarantines, all
// sorted: what two sets of documents mean, not how they are written.
func revision(state *mesh.State, docs []v1alpha1.AllowPolicy, quarantines []v1alpha1.Quarantine) string {
	model, _ := state.Domains().Compile(docs, quarantines...)
	content := struct {
		Format int // rises when the same documents come to mean something else
		State  *mesh.State
		authz.Content
	}{Format: 1, State: state, Content: model.Content()}
	// Only plain data: nothing in it can fail to be encoded, and maps are
	// encoded in the order of their keys.
	data, err := json.Marshal(content)
	if err != nil {
		panic(fmt.Sprintf("manifest: encode revision: %v", err))
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}

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
	type policy struct {
		Namespace, Name, Target string
		Ports                   []uint16
		From                    []string
	}
	type quarantine struct {
		Name, Reason      string
		Identities, Nodes []string
	}
	content := struct {
		Format   int // rises when the same documents come to mean something else
		State    *mesh.State
		Policies []policy
		// Absent when there is none, so that meshes without any keep their revisions.
		Quarantines []quarantine `json:",omitempty"`
	}{Format: 1, State: state}
	model, _ := authz.Compile(state.TrustDomain, docs, quarantines...)
	for _, p := range model.Policies() {
		out := policy{Namespace: p.Namespace, Name: p.Name, Target: p.TargetServiceAccount, Ports: p.Ports}
		for _, from := range p.From {
			out.From = append(out.From, from.String())
		}
		content.Policies = append(content.Policies, out)
	}
	for _, q := range model.Quarantines() {
		out := quarantine{Name: q.Name, Reason: q.Reason, Nodes: q.Nodes}
		for _, id := range q.Identities {
			out.Identities = append(out.Identities, id.String())
		}
		content.Quarantines = append(content.Quarantines, out)
	}
	// Only plain data: nothing in it can fail to be encoded, and maps are
	// encoded in the order of their keys.
	data, err := json.Marshal(content)
	if err != nil {
		panic(fmt.Sprintf("manifest: encode revision: %v", err))
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}

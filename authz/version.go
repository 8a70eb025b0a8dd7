package authz

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// Version names the policy state of one target: a hash over the policies that
// protect it and over the identities that are cut off from everything. It
// changes exactly when one of them does, so that an edit elsewhere in the mesh
// leaves it alone; so does an edit of a quarantine's reason or nodes.
func (m *Model) Version(t Target) string {
	h := sha256.New()
	fmt.Fprintf(h, "%q\n", t.String())
	for _, p := range m.protecting(t) {
		fmt.Fprintf(h, "%q %v %q\n", p.Key(), p.Ports, p.From)
		if p.Terminate {
			fmt.Fprintf(h, "terminate %q\n", p.Key())
		}
		if p.Originate {
			fmt.Fprintf(h, "originate %q %q\n", p.Key(), p.ALPN)
		}
	}
	if m != nil {
		for _, q := range m.quarantines {
			if len(q.Identities) > 0 {
				fmt.Fprintf(h, "cut off %q %q\n", q.Name, q.Identities)
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// Content is what a model holds, as plain data that encodes the same way
// whenever the model means the same: for a hash over all of it.
type Content struct {
	Policies []PolicyContent
	// Absent when there is none, so that meshes without any keep their hashes.
	Quarantines []QuarantineContent `json:",omitempty"`
}

// PolicyContent is a Policy with its patterns as text.
type PolicyContent struct {
	Namespace, Name, Target string
	Ports                   []uint16
	From                    []string
	// Absent when it is not, so that meshes without any keep their hashes.
	Terminate bool   `json:",omitempty"`
	Originate bool   `json:",omitempty"`
	ALPN      string `json:",omitempty"`
}

// QuarantineContent is a Quarantine with its patterns as text.
type QuarantineContent struct {
	Name, Reason      string
	Identities, Nodes []string
}

// Content returns what the model holds, sorted. The caller owns it.
func (m *Model) Content() Content {
	var out Content
	for _, p := range m.Policies() {
		out.Policies = append(out.Policies, PolicyContent{p.Namespace, p.Name, p.TargetServiceAccount, p.Ports, texts(p.From), p.Terminate, p.Originate, p.ALPN})
	}
	for _, q := range m.Quarantines() {
		out.Quarantines = append(out.Quarantines, QuarantineContent{q.Name, q.Reason, texts(q.Identities), q.Nodes})
	}
	return out
}

func texts(patterns []Pattern) []string {
	var out []string
	for _, p := range patterns {
		out = append(out, p.String())
	}
	return out
}

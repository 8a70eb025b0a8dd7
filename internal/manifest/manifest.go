// Package manifest reads the YAML documents that describe a mesh on one
// machine. It is strict: anything unknown, doubled or out of place is refused
// with file, line and field, and one fault refuses the whole set, so that a
// bad edit never takes effect in part.
package manifest

import (
	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Manifest is one good state of the documents. It is immutable.
type Manifest struct {
	State *mesh.State
	// Policies are sorted by namespace, then name. Every one of them compiles.
	Policies []v1alpha1.AllowPolicy
	// Quarantines are sorted by name. Every one of them compiles.
	Quarantines []v1alpha1.Quarantine
	// Revision is 16 hex digits that depend on what the documents mean, not
	// on comments, labels, file names or the order of documents.
	Revision string
}

// Load reads a file, or the *.yaml and *.yml files of a directory (not of its
// subdirectories, and not those whose name starts with a dot). Workloads that
// name no node are placed on the given one. The error is an *Error with every
// problem that was found.
func Load(path, node string) (*Manifest, error) {
	r := &report{}
	b := newBuilder(r, documents(r, []string{path}), path, node)
	m := b.build()
	if err := r.err(); err != nil {
		return nil, err
	}
	return m, nil
}

// placeholderNode stands for the machine when documents are only checked.
const placeholderNode = "this-node"

// Check reads files and directories together as one set and returns what is
// wrong with them, nil if nothing is.
//
// The set may be a part of a mesh, such as a file of policies alone. Therefore
// a missing MeshConfig is no fault; namespaces have to be declared only if the
// set declares any, and workloads behind services have to exist only if the
// set declares any workload. Without a MeshConfig the trust domain is that of
// the first SPIFFE ID in a policy, or a placeholder; no verdict of Check
// depends on which.
func Check(paths []string) []Finding {
	r := &report{}
	b := newBuilder(r, documents(r, paths), "", placeholderNode)
	b.partial = true
	b.build()
	return r.sorted()
}

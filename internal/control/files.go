package control

import (
	"context"
	"errors"
	"log/slog"

	"github.com/signet-mesh/signet/internal/manifest"
	"github.com/signet-mesh/signet/internal/mesh"
)

// files is the Source that reads a file or a directory of YAML.
type files struct {
	path, node string
	log        *slog.Logger
}

// Files returns a Source that reads a file or directory of YAML and follows
// its edits. Workloads without a node run on the given one. Its Run fails at
// once when the documents that it starts with are not valid; later, what is
// wrong leaves the last good state in force.
func Files(path, node string, log *slog.Logger) Source { return &files{path, node, log} }

// Run implements Source.
func (f *files) Run(ctx context.Context, accept func(*mesh.View), reject func(lines ...string)) error {
	first, err := manifest.Load(f.path, f.node)
	if err != nil {
		return err
	}
	accept(f.view(first))
	manifest.Watch(ctx, f.path, f.node, f.log, func(m *manifest.Manifest, err error) {
		var bad *manifest.Error
		switch {
		case errors.As(err, &bad):
			var lines []string
			for _, finding := range bad.Findings {
				lines = append(lines, finding.String())
			}
			reject(lines...)
		case err != nil:
			reject(err.Error())
		default:
			accept(f.view(m))
		}
	})
	return nil
}

func (f *files) view(m *manifest.Manifest) *mesh.View {
	model, diagnostics := m.State.Domains().Compile(m.Policies, m.Quarantines...)
	for _, d := range diagnostics { // Load refuses these; a policy that slips by grants nothing
		f.log.Error("policy is not valid and grants nothing", "policy", d.Policy, "field", d.Field, "message", d.Message)
	}
	return &mesh.View{Revision: m.Revision, State: m.State, Model: model}
}

package main

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/internal/output"
)

// version is set by the linker; without it the module's own version counts.
var version = ""

type versionDoc struct {
	output.Meta
	Version string `json:"version"`
	Commit  string `json:"commit,omitempty"`
	Go      string `json:"go"`
	// Envoy is the version of the proxy that this one was made for.
	Envoy string `json:"envoy"`
}

func (d *versionDoc) Text(t *output.Text) {
	t.Line("signet ", d.Version)
	if !t.Wide {
		return
	}
	if d.Commit != "" {
		t.Line("commit ", d.Commit)
	}
	t.Line("go     ", d.Go)
	t.Line("envoy  ", d.Envoy)
}

func (a *app) newVersionCommand() *cobra.Command {
	return a.answers(&cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Long:    "Print the version of this program and of the Envoy it was made for.",
		Example: "  signet version -o json",
		Args:    args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			doc := &versionDoc{Meta: output.NewMeta("Version"), Go: runtime.Version(), Envoy: envoyVersion}
			doc.Version, doc.Commit = ownVersion()
			return a.printer().Print(doc)
		},
	})
}

// ownVersion returns this program's version and commit.
func ownVersion() (v, commit string) {
	v = version
	if info, ok := debug.ReadBuildInfo(); ok {
		if v == "" {
			v = info.Main.Version
		}
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				commit = s.Value
			}
		}
	}
	return v, commit
}

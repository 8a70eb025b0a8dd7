package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/internal/manifest"
)

func (a *app) newReleaseCommand() *cobra.Command {
	var documents string
	cmd := &cobra.Command{
		Use:   "release -c FILE|DIR",
		Short: "Let captured network namespaces go",
		Long: `Remove the capture rules that a mesh left in the network namespaces of its
workloads when it stopped. Their traffic is in plain and unrestricted from then
on. Refused while a mesh runs: it would put the rules back.`,
		Example: "  signet release -c /etc/signet",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if documents == "" {
				return usage(errors.New("-c is missing: the file or directory of documents"))
			}
			if _, err := a.client().AgentStatus(cmd.Context()); err == nil {
				return fmt.Errorf("a mesh runs with %s: stop it first, or set its namespaces to off", a.runDir)
			}
			host, err := os.Hostname()
			if err != nil {
				return err
			}
			m, err := manifest.Load(documents, host)
			if err != nil {
				return err
			}
			for _, w := range m.State.Workloads {
				if w.Capture == nil {
					continue
				}
				switch err := capture.Remove(w.Capture.NetNS); {
				case errors.Is(err, fs.ErrNotExist):
					_, _ = fmt.Fprintf(a.out, "%s: %s is gone\n", w.Key(), w.Capture.NetNS)
				case err != nil:
					return fmt.Errorf("%s: %w", w.Key(), err)
				default:
					_, _ = fmt.Fprintf(a.out, "%s: %s released\n", w.Key(), w.Capture.NetNS)
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&documents, "config", "c", "", "file or directory of documents")
	return cmd
}

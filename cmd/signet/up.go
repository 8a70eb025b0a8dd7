package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func newUpCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "up -c FILE|DIR",
		Short:   "Start a mesh on this machine",
		Long:    "Start the control plane, the agent and the proxy as one supervised tree.",
		Example: "  signet up -c examples/quickstart",
		RunE:    func(*cobra.Command, []string) error { return errors.New("not built yet") },
	}
	cmd.Flags().StringP("config", "c", "", "file or directory of documents")
	return cmd
}

package main

import (
	"errors"

	"github.com/spf13/cobra"
)

// The exit codes, the same for every command and every form of output.
const (
	exitGood     = 0
	exitFailed   = 1 // the tool could not do its work
	exitUsage    = 2 // it was called in a way that makes no sense
	exitFindings = 3 // it did its work, and what it found is not good
)

// errFindings ends a command whose output already says what was found.
var errFindings = errors.New("findings")

// usageError is a mistake in the command line.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usage(err error) error { return &usageError{err} }

// findings turns a verdict into a command's error.
func findings(bad bool) error {
	if bad {
		return errFindings
	}
	return nil
}

func exitCode(err error) int {
	var u *usageError
	switch {
	case err == nil:
		return exitGood
	case errors.Is(err, errFindings):
		return exitFindings
	case errors.As(err, &u):
		return exitUsage
	}
	return exitFailed
}

// args makes a mistake in the arguments a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		if err := check(cmd, given); err != nil {
			return usage(err)
		}
		return nil
	}
}

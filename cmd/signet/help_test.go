package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// leaves returns every command of a tree, the groups too.
func leaves(c *cobra.Command) []*cobra.Command {
	all := []*cobra.Command{c}
	for _, sub := range c.Commands() {
		all = append(all, leaves(sub)...)
	}
	return all
}

// callsOfSignet finds command lines in text.
var callsOfSignet = regexp.MustCompile(`(?m)(?:^|[\s(;&|])(?:bin/)?signet( [^|>#)\n]*)?`)

// parses tells whether a command line names an existing command and flags.
func parses(line string) error {
	root := (&app{getenv: os.Getenv}).newRoot()
	cmd, rest, err := root.Find(strings.Fields(line))
	if err != nil {
		return err
	}
	if err := cmd.ParseFlags(rest); err != nil {
		return err
	}
	return cmd.ValidateArgs(cmd.Flags().Args())
}

// Help that shows a command line which does not work is worse than none.
func TestHelpOfEveryCommand(t *testing.T) {
	for _, c := range leaves((&app{getenv: os.Getenv}).newRoot()) {
		if c.Short == "" || c.Long == "" || c.Example == "" {
			t.Errorf("%s: Short, Long and Example are all needed", c.CommandPath())
		}
		for _, call := range callsOfSignet.FindAllStringSubmatch(c.Example, -1) {
			if err := parses(call[1]); err != nil {
				t.Errorf("%s: example `signet%s`: %v", c.CommandPath(), call[1], err)
			}
		}
	}
}

// The command lines of the README and of the documents are those of this program.
func TestDocumentedCommandLines(t *testing.T) {
	files, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range append(files, "../../README.md") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, block := range regexp.MustCompile("(?ms)^ *```(\\w*)\n(.*?)^ *```$").FindAllStringSubmatch(string(text), -1) {
			if block[1] != "" && block[1] != "sh" && block[1] != "text" {
				continue
			}
			for line := range strings.Lines(strings.ReplaceAll(block[2], "\\\n", " ")) {
				line, _, _ = strings.Cut(line, "#")
				for _, call := range callsOfSignet.FindAllStringSubmatch(line, -1) {
					n++
					if err := parses(call[1]); err != nil {
						t.Errorf("%s: `signet%s`: %v", filepath.Base(file), call[1], err)
					}
				}
			}
		}
		if least := map[string]int{"README.md": 8, "identity.md": 5}[filepath.Base(file)]; n < least {
			t.Errorf("found %d command lines in %s, which cannot be all", n, file)
		}
	}
}

// Every command refuses what it does not know, with the code for usage.
func TestUnknownFlagsAndArguments(t *testing.T) {
	for _, c := range leaves((&app{getenv: os.Getenv}).newRoot()) {
		path := strings.Fields(c.CommandPath())[1:]
		if c.Name() == "help" {
			continue
		}
		if got := runIn(t, t.TempDir(), append(path, "--no-such-flag")...); got.code != exitUsage || !strings.Contains(got.err, "--help") || got.out != "" {
			t.Errorf("%s --no-such-flag: %+v", c.CommandPath(), got)
		}
		switch strings.Join(path, " ") {
		case "policy check": // takes files
			path = append(path, "-o", "xml")
		case "svid files": // takes a directory
			path = append(path, "--key-mode", "0777")
		}
		if got := runIn(t, t.TempDir(), append(path, "no-such-argument")...); got.code != exitUsage || got.out != "" {
			t.Errorf("%s no-such-argument: %+v", c.CommandPath(), got)
		}
	}
}

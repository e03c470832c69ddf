package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

// newDocsCommand writes docs/cli.md; a test fails if that is not current.
func newDocsCommand(*app) *cobra.Command {
	return &cobra.Command{
		Use:    "docs DIR",
		Short:  "Write cli.md, this program's manual",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return os.WriteFile(filepath.Join(args[0], "cli.md"), manual(cmd.Root()), 0o644)
		},
	}
}

// manual is the help of all commands as one page. cobra's own generator makes a
// page for each, and brings a renderer of manual pages along.
func manual(root *cobra.Command) []byte {
	root.InitDefaultCompletionCmd("")
	var b bytes.Buffer
	fmt.Fprintf(&b, "# stasis\n\n<!-- Generated: go run ./cmd/stasis docs docs -->\n\n%s\n", markdown(root.Long))
	fmt.Fprintf(&b, "\nOptions of every command:\n\n```\n%s```\n\n", root.PersistentFlags().FlagUsages())
	b.WriteString("| command | |\n|---|---|\n")
	for _, cmd := range root.Commands() {
		if cmd.IsAvailableCommand() && cmd.Name() != "help" {
			fmt.Fprintf(&b, "| [`%s`](#stasis-%s) | %s |\n", cmd.Name(), cmd.Name(), cmd.Short)
		}
	}
	for _, cmd := range root.Commands() {
		if !cmd.IsAvailableCommand() || cmd.Name() == "help" {
			continue
		}
		fmt.Fprintf(&b, "\n## stasis %s\n\n", cmd.Name())
		if cmd.Name() == "completion" { // cobra's own, whose help is about each shell
			names := []string{}
			for _, shell := range cmd.Commands() {
				names = append(names, "`"+shell.Name()+"`")
			}
			fmt.Fprintf(&b, "%s: %s. `stasis completion SHELL --help` says how to load it.\n", cmd.Short, strings.Join(names, ", "))
			continue
		}
		fmt.Fprintf(&b, "```\n%s\n```\n\n", cmd.UseLine())
		text := cmd.Long
		if text == "" {
			text = cmd.Short + "."
		}
		fmt.Fprintf(&b, "%s\n", markdown(text))
		if cmd.HasAvailableSubCommands() {
			b.WriteString("\n| command | |\n|---|---|\n")
			for _, sub := range cmd.Commands() {
				if sub.IsAvailableCommand() {
					fmt.Fprintf(&b, "| `%s` | %s |\n", strings.TrimSuffix(sub.UseLine(), " [flags]"), sub.Short)
				}
			}
		}
		if usages := cmd.LocalFlags().FlagUsages(); usages != "" {
			fmt.Fprintf(&b, "\n```\n%s```\n", usages)
		}
		if cmd.Example != "" {
			fmt.Fprintf(&b, "\nExamples:\n\n```\n%s\n```\n", unindent(cmd.Example))
		}
	}
	return b.Bytes()
}

// markdown keeps help's words from being taken for markup.
func markdown(s string) string {
	return strings.NewReplacer("<", "&lt;", "*", "\\*", "_", "\\_").Replace(s)
}

func unindent(s string) string {
	return strings.ReplaceAll(strings.TrimPrefix(s, "  "), "\n  ", "\n")
}

package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/inspect"
	"github.com/stasis-run/stasis/checkpoint/policy/allow"
	"github.com/stasis-run/stasis/node"
)

func newInspectCommand(a *app) *cobra.Command {
	var secrets bool
	var html string
	cmd := &cobra.Command{
		Use:   "inspect CHECKPOINT",
		Short: "Show what is in a checkpoint",
		Long: `Show what is in a checkpoint: processes, memory, open files, sockets, mounts, what
a host must have to restore it, and what its spec asks for beyond what an ordinary
container has, with the flags of "stasis restore" that grant it. CHECKPOINT is an
image, an archive, or a folder of CRIU's images.

Arguments and environment are read out of the memory of the processes.`,
		Example: `  stasis inspect backup/db:1
  stasis inspect --html db.html /var/lib/backup/db
  stasis inspect -o json backup/db:1 | jq '.processes[].args'`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: firstArgs(1, a.completeCheckpoints()),
		RunE: func(cmd *cobra.Command, args []string) error {
			in, err := a.operations().Inspect(cmd.Context(), node.InspectRequest{Checkpoint: args[0], Secrets: secrets, MaxSize: int64(a.maxSize)})
			if err != nil {
				return err
			}
			if html != "" {
				if err := a.outputTo(html).Write(cmd.Context(), func(w io.Writer) error { return in.WritePage(w, args[0]) }); err != nil {
					return fmt.Errorf("write the page: %w", err)
				}
				if !a.json() {
					return nil
				}
			}
			if a.json() {
				return printJSON(a.out, in)
			}
			return printInspection(a.out, args[0], in)
		},
	}
	a.addMaxSize(cmd)
	cmd.Flags().BoolVar(&secrets, "show-secrets", false, "show the environment of the processes as well")
	cmd.Flags().StringVar(&html, "html", "", "write a page with a map of the memory to this `FILE` instead")
	must(cmd.MarkFlagFilename("html", "html"))
	return cmd
}

// printInspection prints a report for people.
func printInspection(out io.Writer, name string, in *node.Inspection) error {
	fmt.Fprintln(out, node.Printable(name))
	printFacts(out, in.Facts())

	heading(out, "PROCESSES")
	t := newTable(out, "PID", "USER", "THREADS", "MEMORY", "STATE", "COMMAND")
	for _, p := range in.Processes {
		t.row(fmt.Sprint(p.PID), fmt.Sprintf("%d:%d", p.Credentials.UID, p.Credentials.GID), fmt.Sprint(len(p.Threads)),
			size(p.Memory.Dumped), p.State, strings.Repeat("  ", p.Depth)+p.Command())
	}
	t.end()
	for _, p := range in.Processes {
		printProcess(out, p)
	}
	if len(in.Sockets) > 0 {
		heading(out, "SOCKETS")
		t := newTable(out, "KIND", "STATE", "LOCAL", "REMOTE")
		for _, s := range in.Sockets {
			t.row(s.Kind, s.State, s.Local, s.Remote+outside(s.External))
		}
		t.end()
	}
	if len(in.Mounts) > 0 {
		heading(out, "MOUNTS")
		t := newTable(out, "MOUNTPOINT", "TYPE", "SOURCE", "FROM OUTSIDE")
		for _, m := range in.Mounts {
			t.row(m.Mountpoint, m.Type, m.Source, m.External)
		}
		t.end()
	}
	heading(out, "A HOST MUST HAVE")
	printFacts(out, node.NeedsFacts(in.Needs))
	if len(in.AsksFor) > 0 {
		heading(out, "ASKS FOR")
		t := newTable(out, "FIELD", "WHAT", "RESTORE")
		for _, ask := range in.AsksFor {
			becomes := string(ask.Verdict)
			if ask.Verdict == allow.NeedsFlag {
				becomes = ask.Flag
			}
			t.row(ask.Field, ask.What, becomes)
		}
		t.end()
	}
	return nil
}

func printProcess(out io.Writer, p inspect.Process) {
	if len(p.Memory.Mappings) == 0 {
		return
	}
	heading(out, fmt.Sprintf("MEMORY OF %d (%s)", p.PID, node.Printable(p.Comm)))
	t := newTable(out, "ADDRESS", "", "MAPPED", "SAVED", "WHAT")
	none := 0
	for _, m := range p.Memory.Mappings {
		if m.Dumped == 0 {
			none++
			continue
		}
		t.row(m.Start.String(), m.Protection, size(m.Size), size(m.Dumped), m.What())
	}
	t.end()
	if none > 0 {
		fmt.Fprintf(out, "and %d mappings with nothing saved, as it is in a file or unused\n", none)
	}
	if len(p.Descriptors) > 0 {
		heading(out, fmt.Sprintf("OPEN IN %d (%s)", p.PID, node.Printable(p.Comm)))
		t := newTable(out, "FD", "KIND", "OFFSET", "FLAGS", "WHAT")
		for _, d := range p.Descriptors {
			t.row(fmt.Sprint(d.FD), d.Kind, fmt.Sprint(d.Offset), d.Flags, d.Path+outside(d.External)+deleted(d.Deleted))
		}
		t.end()
	}
	if len(p.Environment) > 0 {
		heading(out, fmt.Sprintf("ENVIRONMENT OF %d (%s)", p.PID, node.Printable(p.Comm)))
		for _, v := range p.Environment {
			fmt.Fprintln(out, node.Printable(v))
		}
	}
}

func heading(out io.Writer, text string) { fmt.Fprintf(out, "\n%s\n", text) }

func printFacts(out io.Writer, list []node.Fact) {
	t := newTable(out)
	for _, f := range list {
		t.row(f.Name, f.Value)
	}
	t.end()
}

func outside(is bool) string {
	if is {
		return " (outside)"
	}
	return ""
}

func deleted(is bool) string {
	if is {
		return " (deleted)"
	}
	return ""
}

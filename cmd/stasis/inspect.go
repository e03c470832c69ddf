package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/inspect"
	"github.com/stasis-run/stasis/checkpoint/policy/allow"
	"github.com/stasis-run/stasis/checkpoint/sign"
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
			in, err := a.node().Inspect(cmd.Context(), node.InspectRequest{Checkpoint: args[0], Secrets: secrets, MaxSize: int64(a.maxSize)})
			if err != nil {
				return err
			}
			if html != "" {
				if err := a.outputTo(html).Write(cmd.Context(), func(w io.Writer) error { return writeHTML(w, args[0], in) }); err != nil {
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

// fact is one line about a checkpoint.
type fact struct{ Name, Value string }

// facts are what there is to say about a checkpoint as a whole.
func facts(in *node.Inspection) (list []fact) {
	add := func(name, format string, args ...any) { list = append(list, fact{name, fmt.Sprintf(format, args...)}) }
	known := func(name, value string) {
		if strings.TrimSpace(value) != "" {
			add(name, "%s", strings.TrimSpace(value))
		}
	}
	if i := in.Info; i != nil {
		known("Container", i.ContainerName)
		known("ID", i.ContainerID)
		known("Namespace", i.Namespace)
		if i.Pod != nil {
			known("Pod", i.Pod.Namespace+"/"+i.Pod.Name)
		}
		known("Image", i.Base.Name)
		known("Engine", i.Engine.Name+" "+i.Engine.Version)
		known("Runtime", i.OCIRuntime.Name+" "+i.OCIRuntime.Version)
		known("CRIU", i.CRIU)
		known("Kernel", i.Host.Kernel)
		if !i.Checkpointed.IsZero() {
			add("Checkpointed", "%s", i.Checkpointed.Format(time.RFC3339))
		}
	}
	if m := in.Manifest; m != nil && in.Info == nil {
		known("ID", m.Container.ID)
		known("Namespace", m.Container.Namespace)
		known("Runtime", m.Runtime.Name+" "+m.Runtime.Version)
		known("CRIU", m.CRIU)
		known("Kernel", m.Kernel)
		add("Checkpointed", "%s", m.Created.Format(time.RFC3339))
	}
	known("Signed by", signature(in))
	known("Architecture", in.Architecture)
	known("Hostname", in.Hostname)
	known("Security module", in.LSM)
	add("Size", "%s in %d files, %s of it memory", size(in.Sizes.Total), in.Sizes.Files, size(in.Sizes.Memory))
	if s := in.Stats; s != nil {
		add("Frozen", "%v, of which memory %v", us(s.FrozenUS), us(s.MemoryDumpUS))
		add("Pages", "%d scanned, %d written", s.PagesScanned, s.PagesWritten)
	}
	return list
}

func us(n uint32) time.Duration { return time.Duration(n) * time.Microsecond }

// needs are what a host must have, as facts.
func needs(n inspect.Needs) (list []fact) {
	for _, f := range []struct {
		name   string
		values []string
	}{
		{"Kernel options", n.KernelOptions}, {"Addresses for TCP", n.Addresses}, {"Mounts from outside", n.Mounts},
		{"Sockets outside", n.Sockets}, {"Files, unchanged", n.Files},
	} {
		if len(f.values) > 0 {
			list = append(list, fact{f.name, strings.Join(f.values, ", ")})
		}
	}
	if len(n.CPUFeatures) > 0 {
		list = append(list, fact{"CPU features", fmt.Sprintf("%d, of %s", len(n.CPUFeatures), n.Architecture)})
	}
	return list
}

// printInspection prints a report for people.
func printInspection(out io.Writer, name string, in *node.Inspection) error {
	fmt.Fprintln(out, node.Printable(name))
	printFacts(out, facts(in))

	heading(out, "PROCESSES")
	t := newTable(out, "PID", "USER", "THREADS", "MEMORY", "STATE", "COMMAND")
	for _, p := range in.Processes {
		t.row(fmt.Sprint(p.PID), fmt.Sprintf("%d:%d", p.Credentials.UID, p.Credentials.GID), fmt.Sprint(len(p.Threads)),
			size(p.Memory.Dumped), p.State, strings.Repeat("  ", p.Depth)+command(p))
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
	printFacts(out, needs(in.Needs))
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

// signature says who has signed a checkpoint.
func signature(in *node.Inspection) string {
	if in.Invalid != nil {
		return "not valid: " + in.Invalid.Error()
	}
	var list []string
	for _, s := range in.Signers {
		list = append(list, sign.Short(s.KeyID)+" ("+whose(s)+")")
	}
	for _, id := range in.Unknown {
		list = append(list, sign.Short(id)+" (not trusted here)")
	}
	if list == nil {
		list = []string{"nobody"}
	}
	return strings.Join(list, ", ")
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
		t.row(m.Start.String(), m.Protection, size(m.Size), size(m.Dumped), what(m))
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

func printFacts(out io.Writer, list []fact) {
	t := newTable(out)
	for _, f := range list {
		t.row(f.Name, f.Value)
	}
	t.end()
}

// command is how a process was started, else its name.
func command(p inspect.Process) string {
	if len(p.Args) == 0 {
		return "[" + p.Comm + "]"
	}
	return strings.Join(p.Args, " ")
}

// what says what a mapping is for.
func what(m inspect.Mapping) string {
	if m.File != "" {
		return m.File
	}
	return m.Kind
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

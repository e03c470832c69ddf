package node

import (
	"fmt"
	"strings"
	"time"

	"github.com/stasis-run/stasis/checkpoint/inspect"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// Fact is one line about a checkpoint, for people.
type Fact struct{ Name, Value string }

// Facts are what there is to say about a checkpoint as a whole.
func (in *Inspection) Facts() (list []Fact) {
	add := func(name, format string, args ...any) { list = append(list, Fact{name, fmt.Sprintf(format, args...)}) }
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
	known("Signed by", in.signature())
	known("Architecture", in.Architecture)
	known("Hostname", in.Hostname)
	known("Security module", in.LSM)
	add("Size", "%s in %d files, %s of it memory", Size(in.Sizes.Total), in.Sizes.Files, Size(in.Sizes.Memory))
	if s := in.Stats; s != nil {
		add("Frozen", "%v, of which memory %v", us(s.FrozenUS), us(s.MemoryDumpUS))
		add("Pages", "%d scanned, %d written", s.PagesScanned, s.PagesWritten)
	}
	return list
}

func us(n uint32) time.Duration { return time.Duration(n) * time.Microsecond }

// NeedsFacts are what a host must have, as facts.
func NeedsFacts(n inspect.Needs) (list []Fact) {
	for _, f := range []struct {
		name   string
		values []string
	}{
		{"Kernel options", n.KernelOptions}, {"Addresses for TCP", n.Addresses}, {"Mounts from outside", n.Mounts},
		{"Sockets outside", n.Sockets}, {"Files, unchanged", n.Files},
	} {
		if len(f.values) > 0 {
			list = append(list, Fact{f.name, strings.Join(f.values, ", ")})
		}
	}
	if len(n.CPUFeatures) > 0 {
		list = append(list, Fact{"CPU features", fmt.Sprintf("%d, of %s", len(n.CPUFeatures), n.Architecture)})
	}
	return list
}

// signature says who has signed a checkpoint.
func (in *Inspection) signature() string {
	if in.Invalid != "" {
		return "not valid: " + in.Invalid
	}
	var list []string
	for _, s := range in.Signers {
		list = append(list, sign.Short(s.KeyID)+" ("+s.Whose()+")")
	}
	for _, id := range in.Unknown {
		list = append(list, sign.Short(id)+" (not trusted here)")
	}
	if list == nil {
		list = []string{"nobody"}
	}
	return strings.Join(list, ", ")
}

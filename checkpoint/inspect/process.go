package inspect

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/checkpoint-restore/go-criu/v8/crit"
	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	fsimage "github.com/checkpoint-restore/go-criu/v8/crit/images/fs"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/containerd/containerd/v2/pkg/cap"

	"github.com/stasis-run/stasis/checkpoint/criu/img"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// machines are CRIU's names of architectures, in Go's words.
var machines = map[core.CoreEntryMarch]string{
	core.CoreEntry_X86_64: "amd64", core.CoreEntry_AARCH64: "arm64", core.CoreEntry_ARM: "arm",
	core.CoreEntry_PPC64: "ppc64le", core.CoreEntry_S390: "s390x", core.CoreEntry_MIPS: "mips64le",
	core.CoreEntry_LOONGARCH64: "loong64", core.CoreEntry_RISCV64: "riscv64",
}

var states = map[crit.TaskState]string{
	crit.TaskAlive: "alive", crit.TaskStopped: "stopped", crit.TaskZombie: "zombie", crit.TaskDead: "dead",
}

// readProcesses reads the tree and what belongs to each process.
func (r *reader) readProcesses() error {
	var all []Process
	seen := map[uint32]bool{}
	err := r.folder.each(layout.ProcessTree, "PSTREE", func(msg []byte) error {
		var e pstree.PstreeEntry
		if err := img.Decode(msg, &e); err != nil {
			return err
		}
		if err := r.take(1 + len(e.GetThreads())); err != nil {
			return err
		}
		if seen[e.GetPid()] {
			return fault.Invalid("process %d is listed twice", e.GetPid())
		}
		seen[e.GetPid()] = true
		p, err := r.readProcess(&e)
		all = append(all, p)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) && len(all) == 0 {
		return fault.Invalid("pstree.img: missing")
	}
	if err == nil && len(all) == 0 {
		err = fault.Invalid("pstree.img: lists no process")
	}
	if err != nil {
		return err
	}
	r.report.Processes, err = inTreeOrder(all)
	return err
}

// inTreeOrder sorts processes so that each follows its parent, and sets Depth.
func inTreeOrder(all []Process) ([]Process, error) {
	children := map[uint32][]int{}
	for i, p := range all {
		children[p.PPID] = append(children[p.PPID], i)
	}
	sorted := make([]Process, 0, len(all))
	type item struct{ index, depth int }
	var stack []item
	push := func(parent uint32, depth int) {
		for _, i := range slices.Backward(children[parent]) {
			stack = append(stack, item{i, depth})
		}
		delete(children, parent) // a loop ends here
	}
	for push(0, 0); len(stack) > 0; {
		next := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		p := all[next.index]
		p.Depth = next.depth
		sorted = append(sorted, p)
		push(p.PID, next.depth+1)
	}
	if len(sorted) != len(all) {
		return nil, fault.Invalid("pstree.img: %d of %d processes are below none that is listed", len(all)-len(sorted), len(all))
	}
	return sorted, nil
}

func (r *reader) readProcess(e *pstree.PstreeEntry) (Process, error) {
	p := Process{PID: e.GetPid(), PPID: e.GetPpid(), PGID: e.GetPgid(), SID: e.GetSid()}
	var c core.CoreEntry
	if err := r.folder.one(layout.Core.Name(p.PID), "CORE", &c); err != nil {
		return p, missing(err, "process %d has none", p.PID)
	}
	if arch := machines[c.GetMtype()]; r.report.Architecture == "" {
		r.report.Architecture = arch
	}
	state := crit.TaskState(c.GetTc().GetTaskState())
	p.Comm = text(c.GetTc().GetComm())
	p.State = states[state]
	if !state.IsAliveOrStopped() {
		return p, nil // its list of threads is rubbish
	}
	p.Credentials = credentials(c.GetThreadCore())
	for _, tid := range e.GetThreads() {
		t := Thread{TID: tid}
		if tid == p.PID {
			t.Comm = text(c.GetThreadCore().GetComm())
		} else {
			var c core.CoreEntry
			if err := r.folder.one(layout.Core.Name(tid), "CORE", &c); err != nil {
				return p, missing(err, "thread %d of process %d has none", tid, p.PID)
			}
			t.Comm = text(c.GetThreadCore().GetComm())
		}
		p.Threads = append(p.Threads, t)
	}
	ids := c.GetIds()
	if ids == nil {
		ids = &core.TaskKobjIdsEntry{}
		err := r.folder.one(layout.IDs.Name(p.PID), "IDS", ids)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return p, err
		}
	}
	if r.namespace == nil {
		r.namespace = ids
	}
	var err error
	if p.Descriptors, err = r.readDescriptors(ids.GetFilesId()); err != nil {
		return p, err
	}
	var f fsimage.FsEntry
	if err := r.folder.one(layout.Root.Name(p.PID), "FS", &f); err == nil {
		p.Cwd, p.Root = r.files.path(f.GetCwdId()), r.files.path(f.GetRootId())
	} else if !errors.Is(err, fs.ErrNotExist) {
		return p, err
	}
	return p, r.readMemory(&p)
}

// missing says what an image that is not there would have been for.
func missing(err error, format string, args ...any) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fault.Invalid("%v: %s", err, fmt.Sprintf(format, args...))
	}
	return err
}

func credentials(t *core.ThreadCoreEntry) Credentials {
	c := t.GetCreds()
	out := Credentials{
		UID: c.GetEuid(), GID: c.GetEgid(), Groups: c.GetGroups(),
		NoNewPrivs: c.GetNoNewPrivs() != 0, LSMProfile: text(c.GetLsmProfile()),
	}
	if mode := t.GetSeccompMode(); mode != core.SeccompMode_disabled {
		out.Seccomp = mode.String()
	}
	var bits uint64
	for i, word := range c.GetCapEff() {
		if i < 2 {
			bits |= uint64(word) << (32 * i)
		}
	}
	out.Capabilities, _ = cap.FromBitmap(bits)
	return out
}

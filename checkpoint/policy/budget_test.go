package policy

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/creds"
	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint"
)

// What each kind of loop spends, all of them spend: a checkpoint of the size that a
// container has is refused if the budget is too small.
func TestBudget(t *testing.T) {
	f := newForgery(t)
	ckpt, err := checkpoint.Open(t.Context(), f.dir)
	must(t, err)
	for _, tc := range []struct {
		name string
		cut  func(*budget)
	}{
		{"entries", func(b *budget) { b.entries = 20 }},
		{"bytes", func(b *budget) { b.bytes = 100 }},
		{"steps", func(b *budget) { b.steps = 3 }},
		{"runs", func(b *budget) { b.runs = 3 }},
	} {
		c := newChecker(t.Context(), ckpt, f.spec)
		tc.cut(&c.budget)
		err := errors.Join(c.checkInventory(), c.checkTasks(), c.checkLimits(), c.checkMounts(f.root), c.checkPaths(f.root))
		if !errors.Is(err, errBudget) || !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	// The context ends each kind.
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cancel(gone)
	for name, spend := range map[string]func(*budget) error{
		"entries": func(b *budget) error { return b.spend(1, 1) }, "steps": (*budget).step, "runs": (*budget).run,
	} {
		b, err := newBudget(ctx), error(nil)
		for i := 0; i < 1000 && err == nil; i++ {
			err = spend(&b)
		}
		if !errors.Is(err, gone) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestCost makes checkpoints that ask for much work.
func TestCost(t *testing.T) {
	lists := func(f *forgery, n, mounts int) {
		msgs := make([]proto.Message, mounts)
		for i := range msgs {
			msgs[i] = filled(&mnt.MntEntry{MntId: u32(uint32(i)), Mountpoint: proto.String(fmt.Sprintf("/m%d", i)), Root: proto.String("/")})
		}
		for i := range n {
			f.write(fmt.Sprintf("mountpoints-%d.img", 20+i), "MNTS", msgs...)
		}
	}
	for _, tc := range []struct {
		name string
		fn   func(*forgery)
		want string
	}{
		{"ten lists of mounts", func(f *forgery) { lists(f, 9, 1000) }, "10 mount namespaces, which needs CAP_SYS_ADMIN"},
		{"where they are granted", func(f *forgery) { f.grantCap("CAP_SYS_ADMIN"); lists(f, 9, 5000) }, fmt.Sprintf("more than %d mounts", maxMounts)},
		{"as many as there may be", func(f *forgery) { lists(f, 1, maxMounts-50); f.grantCap("CAP_SYS_ADMIN") }, "more"},
		{"a thread many times", func(f *forgery) {
			one(f, "pstree.img", "PSTREE", func(e *pstree.PstreeEntry) {
				for range 100_000 {
					e.Threads = append(e.Threads, 6)
				}
			})
		}, "thread 6 of process 6 is listed twice"},
		{"one process's thread in another", func(f *forgery) {
			f.core(func(e *core.CoreEntry) { f.write("core-7.img", "CORE", e); f.write("core-8.img", "CORE", e) })
			for _, name := range []string{"mm", "ids", "fs", "pagemap"} {
				data := f.read(name + "-6.img")
				f.raw(name+"-7.img", data)
			}
			alter(f, "pstree.img", "PSTREE", func(all []*pstree.PstreeEntry) []*pstree.PstreeEntry {
				all[0].Threads = []uint32{6, 8}
				return append(all, filled(&pstree.PstreeEntry{Pid: u32(7), Ppid: u32(6), Threads: []uint32{7, 8}}))
			})
		}, "thread 8 of process 7 is listed twice"},
		{"a process twice", func(f *forgery) {
			alter(f, "pstree.img", "PSTREE", func(all []*pstree.PstreeEntry) []*pstree.PstreeEntry { return append(all, all[0]) })
		}, "process 6 is listed twice"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newForgery(t)
			tc.fn(f)
			f.refused(tc.want)
		})
	}
	f := newForgery(t)
	f.creds(func(*creds.CredsEntry) {})
	f.accepted()
}

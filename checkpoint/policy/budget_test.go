package policy

import (
	"context"
	"errors"
	"fmt"
	"math"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/creds"
	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
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

// ending is a context that ends when it has been looked at so often.
type ending struct {
	context.Context
	left, looks int
}

var errGone = errors.New("gone")

func (e *ending) Err() error {
	if e.looks++; e.looks > e.left {
		return errGone
	}
	return nil
}

// A check ends with its context, wherever it is, and does not go on with something
// else: that of a checkpoint which takes long to check, and of one which does not.
func TestCancelled(t *testing.T) {
	f := newForgery(t)
	small, err := checkpoint.Open(t.Context(), f.dir)
	must(t, err)
	gone := &ending{Context: context.Background()}
	if err := Check(gone, small, f.spec); !errors.Is(err, errGone) {
		t.Errorf("Check: %v", err)
	}
	if err := CheckMounts(gone, small, f.spec, f.root); !errors.Is(err, errGone) {
		t.Errorf("CheckMounts: %v", err)
	}
	if gone.looks != 2 {
		t.Errorf("they went on: %d looks", gone.looks)
	}
	alter(f, mountsImage, "MNTS", func(all []*mnt.MntEntry) []*mnt.MntEntry {
		for i := range uint32(3000) {
			all = append(all, filled(&mnt.MntEntry{MntId: u32(1000 + i), ParentMntId: all[0].MntId, Mountpoint: proto.String(fmt.Sprintf("./m%d", i)), Root: proto.String("/")}))
		}
		return all
	})
	alter(f, "files.img", "FILES", func(all []*fdinfo.FileEntry) []*fdinfo.FileEntry {
		for i := range uint32(500) {
			all = append(all, filled(&fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: u32(1000 + i),
				Reg: &regfile.RegFileEntry{Id: u32(1000 + i), Name: proto.String("/a/b/c/d")}}))
		}
		return all
	})
	ckpt, err := checkpoint.Open(t.Context(), f.dir)
	must(t, err)
	for name, check := range map[string]func(context.Context) error{
		"Check":       func(ctx context.Context) error { return Check(ctx, ckpt, f.spec) },
		"CheckMounts": func(ctx context.Context) error { return CheckMounts(ctx, ckpt, f.spec, f.root) },
	} {
		all := &ending{Context: context.Background(), left: math.MaxInt}
		if err := check(all); errors.Is(err, errGone) {
			t.Errorf("%s: %v", name, err)
		}
		if all.looks < 15 {
			t.Errorf("%s looks %d times only", name, all.looks)
		}
		for left := 0; left < all.looks; left += 1 + all.looks/15 {
			ctx := &ending{Context: context.Background(), left: left}
			// A reader that has ended asks once more, for the cause.
			if err := check(ctx); !errors.Is(err, errGone) || ctx.looks > left+2 {
				t.Errorf("%s, gone after %d of %d looks: %v after %d", name, left, all.looks, err, ctx.looks)
			}
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

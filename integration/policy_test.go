package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/cgroup"
	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/seccomp"
	"github.com/containerd/containerd/api/types/runc/options"
	seccompprofile "github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sign"
	"github.com/stasis-run/stasis/checkpoint/sum"
	"github.com/stasis-run/stasis/integration/stack"
)

// A forgery makes a checkpoint ask for more than its container may have.
type forgery struct {
	file string // the image that it changes
	kind proto.Message
	do   func([]*crit.CriuEntry) []*crit.CriuEntry
	late bool // it is noticed in Start, when the root filesystem is there
	full bool // CRIU is told to set the limits of the checkpoint (cgroups_mode full)
	want []string
	also []forgery // of other images, of which only the first three fields matter
}

// first changes the first message of an image.
func first[M proto.Message](fn func(M)) func([]*crit.CriuEntry) []*crit.CriuEntry {
	return func(all []*crit.CriuEntry) []*crit.CriuEntry { fn(all[0].Message.(M)); return all }
}

func taskCore(fn func(*core.CoreEntry)) forgery {
	return forgery{file: "core-1.img", kind: &core.CoreEntry{}, do: first(fn), want: []string{"process 1 (sleep)"}}
}

func oneMount(at string, fn func(*mnt.MntEntry) bool) forgery {
	return forgery{file: "mountpoints-*.img", kind: &mnt.MntEntry{}, late: true, do: func(all []*crit.CriuEntry) (rest []*crit.CriuEntry) {
		for _, e := range all {
			if m := e.Message.(*mnt.MntEntry); m.GetMountpoint() != at || fn(m) {
				rest = append(rest, e)
			}
		}
		return rest
	}}
}

func openFile(fn func(*fdinfo.FileEntry)) forgery {
	return forgery{file: "files.img", kind: &fdinfo.FileEntry{}, do: func(all []*crit.CriuEntry) []*crit.CriuEntry {
		for _, e := range all {
			if f := e.Message.(*fdinfo.FileEntry); f.GetReg().GetName() == "/dev/null" {
				fn(f)
			}
		}
		return all
	}, want: []string{"process 1: fd 0: open file"}}
}

func (f forgery) says(want ...string) forgery { f.want = append(f.want, want...); return f }

func (f forgery) and(also ...forgery) forgery { f.also = append(f.also, also...); return f }

// forgeries has one for each kind of rule; checkpoint/policy tests each rule.
var forgeries = map[string]forgery{
	"user":         taskCore(func(e *core.CoreEntry) { *e.ThreadCore.Creds.Euid = 7 }).says("euid 7, the spec grants [0]"),
	"group":        taskCore(func(e *core.CoreEntry) { e.ThreadCore.Creds.Groups = []uint32{7} }).says("group 7, the spec grants [0]"),
	"capabilities": taskCore(func(e *core.CoreEntry) { e.ThreadCore.Creds.CapEff[0] |= 1 << 21 }).says("effective capabilities beyond the spec's: CAP_SYS_ADMIN"),
	"securebits":   taskCore(func(e *core.CoreEntry) { *e.ThreadCore.Creds.Secbits = 1 }).says("securebits"),
	"no_new_privs": taskCore(func(e *core.CoreEntry) { *e.ThreadCore.Creds.NoNewPrivs = 0 }).says("no_new_privs"),
	"credentials":  taskCore(func(e *core.CoreEntry) { e.ThreadCore.Creds = nil }).says("has no credentials"),
	"LSM profile":  taskCore(func(e *core.CoreEntry) { e.ThreadCore.Creds.LsmProfile = proto.String("unlimited") }).says("LSM profile"),
	"no seccomp": taskCore(func(e *core.CoreEntry) {
		e.ThreadCore.SeccompMode, e.ThreadCore.SeccompFilter = nil, nil
	}).says("has no seccomp filter"),
	"seccomp of another": {file: "seccomp.img", kind: &seccomp.SeccompEntry{}, do: first(func(e *seccomp.SeccompEntry) {
		e.SeccompFilters[0].Filter = []byte{unix.BPF_RET, 0, 0, 0, 0, 0, 0xff, 0x7f} // allow, on little endian
	}), want: []string{"process 1 (sleep)", "permit more than the spec's profile"}},
	"real-time":   taskCore(func(e *core.CoreEntry) { e.ThreadCore.SchedPolicy = proto.Uint32(unix.SCHED_FIFO) }).says("scheduling policy"),
	"null page":   {file: "mm-1.img", kind: &mm.MmEntry{}, do: first(func(e *mm.MmEntry) { *e.Vmas[0].Start = 0 }), want: []string{"process 1 (sleep)", "0x0"}},
	"threads":     {file: "pstree.img", kind: &pstree.PstreeEntry{}, do: first(func(e *pstree.PstreeEntry) { e.Threads = append(e.Threads, 1, 1, 1, 1, 1, 1, 1, 1) }), want: []string{"thread 1 of process 1 is listed twice"}},
	"cgroup":      {file: "cgroup.img", kind: &cgroup.CgroupEntry{}, do: first(func(e *cgroup.CgroupEntry) { *e.Sets[0].Ctls[0].Path = "/" }), want: []string{"is outside of the container's"}},
	"agent":       {file: "cgroup.img", kind: &cgroup.CgroupEntry{}, do: first(func(e *cgroup.CgroupEntry) { *e.Controllers[0].Dirs[0].Properties[0].Name = "release_agent" }), want: []string{"release_agent"}},
	"run ID":      {file: "inventory.img", kind: &inventory.InventoryEntry{}, do: first(func(e *inventory.InventoryEntry) { e.DumpCriuRunId = proto.String("x; flush ruleset") }), want: []string{"run ID"}},
	"climbing":    openFile(func(f *fdinfo.FileEntry) { *f.Reg.Name = "/../../etc/shadow" }).says("climbs with .."),
	"device":      openFile(func(f *fdinfo.FileEntry) { *f.Reg.Name = "/dev/mem" }).says("/dev/mem", "device"),
	"external":    openFile(func(f *fdinfo.FileEntry) { f.Reg.Ext = proto.Bool(true) }).says("is external"),
	"user's own":  {file: "ids-1.img", kind: &core.TaskKobjIdsEntry{}, do: first(func(e *core.TaskKobjIdsEntry) { *e.UserNsId = 99 }), want: []string{"user namespace of its own"}},
	"host's pids": {file: "ids-1.img", kind: &core.TaskKobjIdsEntry{}, do: first(func(e *core.TaskKobjIdsEntry) { *e.PidNsId = 1 }), want: []string{"process 1 (sleep)", "host's pid namespace"}},

	"unmasked":  oneMount("/proc/keys", func(*mnt.MntEntry) bool { return false }).says("/proc/keys is not masked"),
	"writable":  oneMount("/proc/sys", func(m *mnt.MntEntry) bool { *m.Flags &^= unix.MS_RDONLY; return true }).says("/proc/sys", "not read-only"),
	"volume":    oneMount("/volume", func(m *mnt.MntEntry) bool { *m.Flags &^= unix.MS_RDONLY; return true }).says("/volume", "is not ro"),
	"no volume": oneMount("/volume", func(*mnt.MntEntry) bool { return false }).says("no mount at /volume"),
	"mount":     oneMount("/volume", func(m *mnt.MntEntry) bool { *m.Mountpoint = "/other"; return true }).says(`mount at "/other"`, "no mount at /volume"),
	"host's fs": oneMount("/dev/mqueue", func(m *mnt.MntEntry) bool { *m.Fstype = uint32(mnt.Fstype_OVERLAYFS); return true }).says("/dev/mqueue", "overlayfs"),
}

// TestPolicy restores a checkpoint that was made here and altered since, with a
// manifest that fits it, and without its signature: none is restored, and nothing is
// left. A signature of this node's grants no more: that is tried with one forgery of
// each image.
func TestPolicy(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	faults := s.Faults()
	volume := filepath.Join(s.Dir, "volume")
	must(t, os.Mkdir(volume, 0o755))
	// Descriptor 3 is a deleted file.
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "exec 3>/deleted; rm /deleted; echo ready; exec sleep 1000"), seccompprofile.WithDefaultProfile(),
		oci.WithMounts([]specs.Mount{{Type: "bind", Source: volume, Destination: "/volume", Options: []string{"rbind", "ro"}}}),
		oci.WithPidsLimit(8), oomScore(321), oci.WithNoNewPrivileges, oci.WithDroppedCapabilities([]string{"CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE"}))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "ready")
	must(t, os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", c.Task.Pid()), []byte("100"), 0))
	// Links to where CRIU has the host's root while it restores.
	must(t, os.Symlink(hostRoot, filepath.Join(volume, "x")))
	c.Exec(ctx, "ln", "-s", hostRoot, "/x")
	c.Exec(ctx, "ln", "-s", hostRoot, "/dev/shm/x")
	good := filepath.Join(s.Dir, "good")
	c.Checkpoint(ctx, good, &options.CheckpointOptions{Exit: true})
	maps.Copy(forgeries, hostileForgeries)
	key, err := sign.Dir(s.ConfigDir()).ReadKey()
	must(t, err)
	signed := map[string]bool{} // images of which one forgery was
	for _, name := range slices.Sorted(maps.Keys(forgeries)) {
		f := forgeries[name]
		dir := filepath.Join(s.Dir, "forged", strings.ReplaceAll(name, " ", "-"))
		refused := func(t *testing.T) {
			seen := len(faults.Calls())
			err := c.RestoreErr(ctx, dir)
			if err == nil {
				t.Fatal("restored")
			}
			for _, want := range append(f.want, "restore container c", dir) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v; want %q in it", err, want)
				}
			}
			if late := strings.Contains(err.Error(), "start task"); late != f.late {
				t.Errorf("late: %v, %v", late, err)
			}
			if calls := faults.Calls()[seen:]; len(calls) > 0 && !onlyDelete(calls) {
				t.Errorf("the runtime was called: %q", calls)
			}
			if c.Task != nil {
				c.DeleteTask(ctx)
			}
			nothingOf(ctx, t, s, c)
		}
		t.Run(name, func(t *testing.T) {
			must(t, os.CopyFS(dir, os.DirFS(good)))
			forge(t, dir, f)
			refused(t)
		})
		if class := fmt.Sprint(f.file, f.late); !signed[class] {
			signed[class] = true
			t.Run(name+"/signed", func(t *testing.T) {
				must(t, checkpoint.Sign(ctx, dir, key, checkpoint.Manifest{}))
				trust, err := sign.Dir(s.ConfigDir()).Trust()
				must(t, err)
				if v, err := checkpoint.SignedBy(dir, trust); err != nil || len(v.Signers) != 1 || !v.Signers[0].Own {
					t.Errorf("signed by %+v, %v", v, err)
				}
				refused(t)
			})
		}
	}
	// What was copied and signed anew in the same way, but not altered.
	dir := filepath.Join(s.Dir, "same")
	must(t, os.CopyFS(dir, os.DirFS(good)))
	forge(t, dir, forgery{file: "core-1.img", kind: &core.CoreEntry{}, do: first(func(*core.CoreEntry) {})})
	c.Restore(ctx, dir)
	if out := c.Exec(ctx, "grep", "-h", "-e", "^Seccomp:", "-e", "^NoNewPrivs:", "/proc/1/status"); out != "NoNewPrivs:\t1\nSeccomp:\t2\n" {
		t.Errorf("the restored process has %q", out)
	}
	// The spec decides, not what it had when it was checkpointed.
	if out := c.Exec(ctx, "cat", "/proc/1/oom_score_adj"); out != "321\n" {
		t.Errorf("the restored process has the OOM score %q", out)
	}
}

// oomScore is the OOM score of a container's processes.
func oomScore(score int) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
		s.Process.OOMScoreAdj = &score
		return nil
	}
}

// forge alters images, and writes a manifest that fits.
func forge(t *testing.T, dir string, f forgery) {
	t.Helper()
	altered := map[string]bool{}
	for _, f := range append([]forgery{f}, f.also...) {
		altered[forgeImage(t, dir, f)] = true
	}
	path := filepath.Join(dir, layout.Manifest)
	data, err := os.ReadFile(path)
	must(t, err)
	var m checkpoint.Manifest
	must(t, json.Unmarshal(data, &m))
	if f.full {
		m.Options.CgroupsMode = "full"
	}
	for i := range m.Files {
		file := &m.Files[i]
		if !altered[file.Name] {
			continue
		}
		data, err := os.ReadFile(filepath.Join(dir, file.Name))
		must(t, err)
		w := sum.NewWriter()
		_, _ = w.Write(data)
		file.Size, file.Sum, file.Chunks = int64(len(data)), w.Sum().Text, w.Sum().Chunks
	}
	data, err = json.Marshal(m)
	must(t, err)
	must(t, os.WriteFile(path, data, 0o600))
	// A forger has no key, so it is not signed; what is altered below a signature, none
	// takes (TestSigned).
	must(t, os.Remove(filepath.Join(dir, layout.Signature)))
}

// forgeImage alters one image, and returns its name.
func forgeImage(t *testing.T, dir string, f forgery) string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, f.file))
	must(t, err)
	if len(paths) != 1 {
		t.Fatalf("images %q", paths)
	}
	in, err := os.Open(paths[0])
	must(t, err)
	img, err := crit.New(in, nil, "", false, false).Decode(f.kind)
	must(t, err)
	must(t, in.Close())
	img.Entries = f.do(img.Entries)
	out, err := os.Create(paths[0])
	must(t, err)
	must(t, crit.New(nil, out, "", false, false).Encode(img))
	must(t, out.Close())
	return filepath.Base(paths[0])
}

// TestPolicyKeeps checks that what confines a container confines it after a restore:
// the filter of each thread, read-only files, masked paths.
func TestPolicyKeeps(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Python, seccompprofile.WithDefaultProfile(), oci.WithNoNewPrivileges, oci.WithRootFSReadonly(),
		stack.Args("python3", "-u", "-c", `
import threading, time
for i in range(2): threading.Thread(target=time.sleep, args=(1000,)).start()
print("ready")
time.sleep(1000)`))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "ready")
	look := func() string {
		return c.Exec(ctx, "sh", "-c", `
grep -h -e ^Seccomp: -e ^NoNewPrivs: -e ^CapBnd: /proc/1/task/*/status
cat /proc/keys /proc/timer_list; ls /sys/firmware
for f in /file /proc/sys/kernel/core_pattern /sys/file; do (echo x > $f) 2>/dev/null && echo "wrote $f"; done
awk '{print $5, substr($6, 1, 2)}' /proc/1/mountinfo | sort`)
	}
	before := look()
	if strings.Count(before, "Seccomp:\t2") != 3 || strings.Contains(before, "wrote") {
		t.Fatal(before)
	}
	dir := filepath.Join(s.Dir, "checkpoint")
	c.Checkpoint(ctx, dir, &options.CheckpointOptions{Exit: true})
	c.Restore(ctx, dir)
	if after := look(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

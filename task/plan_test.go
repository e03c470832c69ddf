package task

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// TestPlanRefused: a restore that is refused in Create has changed nothing.
func TestPlanRefused(t *testing.T) {
	denied := errors.New("the spec does not grant that")
	type refusal struct {
		arrange func(f *fixture, dir string)
		says    string
		class   func(error) bool
	}
	everywhere := map[string]refusal{
		"altered": {func(f *fixture, dir string) { f.alter(dir) }, "inventory.img: altered", errdefs.IsInvalidArgument},
		"missing": {func(f *fixture, dir string) { must(f.T, os.RemoveAll(dir)) }, "", nil},
		"by the spec": {func(f *fixture, dir string) { f.policy.check = func() error { return denied } }, denied.Error(),
			func(err error) bool { return errors.Is(err, denied) }},
		"not signed in a pod": {func(f *fixture, dir string) { f.joinPod("ns"); f.unsign(dir) }, "would do without", errdefs.IsPermissionDenied},
		"of another namespace": {func(f *fixture, dir string) { f.joinPod("other") }, `is of namespace "ns"`,
			errdefs.IsPermissionDenied},
		"wrong configuration": {func(f *fixture, dir string) { f.joinPod("ns"); f.nodeConfig("[restore]\nunsigned = 'allow'") },
			"node's configuration", errdefs.IsFailedPrecondition},
		"keys that cannot be read": {func(f *fixture, dir string) { must(f.T, os.WriteFile(filepath.Join(f.keys, "trusted"), nil, 0o644)) },
			"read the trusted keys", nil},
	}
	recorded := map[string]refusal{
		"user namespace": {func(f *fixture, dir string) {
			f.joinPod("ns")
			f.spec.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
		}, "user namespace", errdefs.IsFailedPrecondition},
	}
	annotated := map[string]refusal{
		"of another container": {func(f *fixture, dir string) { f.joinPod("ns"); f.spec.Annotations[criContainerName] = "other" },
			`is of a container "app"`, errdefs.IsInvalidArgument},
		"other base": {func(f *fixture, dir string) { f.fetched(capture.Fetched{OtherBase: "made from another image"}) }, "another image",
			errdefs.IsFailedPrecondition},
		"not copied": {func(f *fixture, dir string) {
			must(f.T, os.WriteFile(filepath.Join(filepath.Dir(dir), "error"), []byte("no such image"), 0o600))
		}, "no such image", errdefs.IsFailedPrecondition},
		"not understood": {func(f *fixture, dir string) {
			must(f.T, os.WriteFile(filepath.Join(filepath.Dir(dir), "fetched.json"), []byte("{"), 0o600))
		}, "not of this shim's version", nil},
	}
	for _, src := range restoreSources {
		refusals := maps.Clone(everywhere)
		if src.recorded {
			maps.Copy(refusals, recorded)
		}
		if strings.Contains(src.name, "annotation") {
			maps.Copy(refusals, annotated)
		}
		for name, tc := range refusals {
			if name == "missing" && strings.Contains(src.name, "image") {
				continue // that is an image without a checkpoint
			}
			t.Run(src.name+" "+name, func(t *testing.T) {
				f := newFixture(t)
				r := f.createRequest()
				dir := src.arrange(f, r, "ns")
				tc.arrange(f, dir)
				f.createRequest()
				wanted, before := proto.Clone(r), listing(t, f.touched(r)...)
				_, err := f.s.Create(t.Context(), r)
				if err == nil || !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), src.says) || tc.class != nil && !tc.class(err) {
					t.Fatalf("%v; want an error that says %q and %q", err, src.says, tc.says)
				}
				if after := listing(t, f.touched(r)...); !slices.Equal(before, after) {
					t.Errorf("the bundle or the root filesystem was changed:\n%q\n%q", before, after)
				}
				if src.copied != nil && !strings.Contains(src.name, "image") {
					if _, err := os.Lstat(src.copied(f)); !errors.Is(err, fs.ErrNotExist) {
						t.Errorf("a copy is left: %v", err)
					}
				}
				if !proto.Equal(r, wanted) {
					t.Errorf("the request was changed: %v", r)
				}
				if calls := f.rt.Calls(); len(calls) > 0 {
					t.Errorf("the runtime was called: %q", calls)
				}
				f.wantEvents()
				f.nothingLeft()
			})
		}
	}
}

// joinPod is inPod, and leaves the other annotations.
func (f *fixture) joinPod(namespace string) {
	others := f.spec.Annotations
	f.inPod(namespace, "app")
	maps.Copy(f.spec.Annotations, others)
}

// touched are the folders that a Create of r writes to.
func (f *fixture) touched(r *taskapi.CreateTaskRequest) []string {
	dirs := []string{f.bundle}
	for _, m := range r.Rootfs {
		if m.Type == "bind" {
			dirs = append(dirs, m.Source)
		}
		for _, o := range m.Options {
			if key, dir, _ := strings.Cut(o, "="); key == "upperdir" || key == "workdir" {
				dirs = append(dirs, dir)
			}
		}
	}
	return dirs
}

// listing is what is in folders and below: names, types, sizes, the file systems they are
// in, and what is recorded of restores.
func listing(t *testing.T, dirs ...string) (lines []string) {
	t.Helper()
	for _, dir := range dirs {
		must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil {
				return err
			}
			line := fmt.Sprint(path, " ", d.Type(), " ", st.Dev)
			if d.IsDir() {
				state, err := recordFolder(path).get()
				if err != nil {
					return err
				}
				line += " " + string(state)
			} else {
				line += fmt.Sprint(" ", st.Size)
			}
			lines = append(lines, line)
			return nil
		}))
	}
	return lines
}

// TestPlanRefusedByPath: what cannot be a checkpoint is refused before anything is read.
func TestPlanRefusedByPath(t *testing.T) {
	f := newFixture(t)
	r := f.createRequest()
	r.Checkpoint = "checkpoint"
	if _, err := f.s.Create(t.Context(), r); !errdefs.IsInvalidArgument(err) {
		t.Errorf("relative: %v", err)
	}
	r.Checkpoint = ""
	f.annotate(annotationRestoreFrom, filepath.Join(t.TempDir(), "checkpoint.tar"))
	f.createRequest()
	if _, err := f.s.Create(t.Context(), r); !errdefs.IsPermissionDenied(err) {
		t.Errorf("an archive outside of the folders: %v", err)
	}
	f.nothingLeft()
}

// TestPlanPrefers: what the request names comes before what others do.
func TestPlanPrefers(t *testing.T) {
	f := newFixture(t)
	r := f.createRequest()
	restoreSources[6].arrange(f, r, "") // in the image
	restoreSources[3].arrange(f, r, "") // an annotation
	restoreSources[2].arrange(f, r, "") // options
	r.Checkpoint = filepath.Join(t.TempDir(), "none")
	f.createRequest()
	want := func(says string) {
		t.Helper()
		if _, err := f.s.Create(t.Context(), r); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want an error that says %q", err, says)
		}
	}
	want("none: no such folder")
	f.policy.check = func() error { return errTest }
	r.Checkpoint = ""
	want("restore container c: " + errTest.Error())
	r.Options = nil
	want("restore container c from registry/checkpoint:1: " + errTest.Error())
	delete(f.spec.Annotations, annotationRestoreFrom)
	f.createRequest()
	want("restore container c from its image: " + errTest.Error())
}

// TestNodeConfigIsReadOnce in a Create, whatever it decides.
func TestNodeConfigIsReadOnce(t *testing.T) {
	for _, src := range restoreSources {
		f := newFixture(t)
		f.inPod("ns", "app")
		f.nodeConfig("")
		r := f.createRequest()
		src.arrange(f, r, "ns")
		f.createRequest()
		watch, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
		must(t, err)
		// Of two events that are the same and follow each other, one is lost; hence
		// those of the closing, too.
		_, err = unix.InotifyAddWatch(watch, filepath.Join(f.keys, "config.toml"), unix.IN_OPEN|unix.IN_CLOSE)
		must(t, err)
		_, err = f.s.Create(t.Context(), r)
		must(t, err)
		buf := make([]byte, 4096)
		n, err := unix.Read(watch, buf)
		unix.Close(watch)
		if err != nil || n != 2*unix.SizeofInotifyEvent {
			t.Errorf("%s: it was opened and closed: %d events, want 2; %v", src.name, max(n, 0)/unix.SizeofInotifyEvent, err)
		}
	}
}

// TestFindEmbedded does not change what it looks at, and leaves the layer of the
// checkpoint out of what is mounted.
func TestFindEmbedded(t *testing.T) {
	f := newFixture(t)
	base, layer := t.TempDir(), t.TempDir()
	f.embed(layer, "")
	overlay := func(lower ...string) []mount.Mount {
		return []mount.Mount{{Type: "overlay", Options: []string{"index=off", "lowerdir=" + strings.Join(lower, ":"), "workdir=/work"}}}
	}
	for name, tc := range map[string]struct {
		mounts []mount.Mount
		rest   string // lowerdir
		found  bool
		fails  bool
	}{
		"none":       {overlay(base, base), "lowerdir=" + base + ":" + base, false, false},
		"top":        {overlay(layer, base), "lowerdir=" + base, true, false},
		"middle":     {overlay(base, layer, base), "lowerdir=" + base + ":" + base, true, false},
		"only":       {overlay(layer), "", false, true},
		"two mounts": {append(overlay(layer, base), overlay(base)...), "lowerdir=" + layer + ":" + base, false, false},
	} {
		before := slices.Clone(tc.mounts[0].Options)
		found, rest, err := findEmbedded(tc.mounts)
		if (err != nil) != tc.fails || (found != nil) != tc.found {
			t.Errorf("%s: %+v, %v", name, found, err)
			continue
		}
		if !slices.Equal(tc.mounts[0].Options, before) {
			t.Errorf("%s: the mounts were changed: %q", name, tc.mounts[0].Options)
		}
		if err == nil && rest[0].Options[1] != tc.rest {
			t.Errorf("%s: to be mounted: %q, want %q", name, rest[0].Options, tc.rest)
		}
		if tc.found && (found.own != "/work" || found.folder != "") {
			t.Errorf("%s: %+v", name, found)
		}
	}
	must(t, os.WriteFile(filepath.Join(layer, "other"), nil, 0o600))
	if _, _, err := findEmbedded(overlay(layer, base)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a layer with other files: %v", err)
	}
}

// TestSeenWhenMounted: only a file system of its own is mounted before it is decided
// whether the container is restored.
func TestSeenWhenMounted(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	for name, tc := range map[string]struct {
		rootfs []*types.Mount
		want   bool
	}{
		"none":    {nil, false},
		"overlay": {[]*types.Mount{{Type: "overlay"}}, false},
		"bind":    {[]*types.Mount{{Type: "bind"}}, false},
		"other":   {[]*types.Mount{{Type: "ext4", Source: image}}, true},
		"several": {[]*types.Mount{{Type: "erofs"}, {Type: "overlay"}}, true},
	} {
		f := newFixture(t)
		f.createRequest()
		c, err := f.s.newContainer(&taskapi.CreateTaskRequest{ID: "c", Bundle: f.bundle, Rootfs: tc.rootfs})
		must(t, err)
		if got := seenWhenMounted(c.rootfs); got != tc.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}

// twice are two mounts of one folder, so that nobody looks into it before it is mounted.
func (f *fixture) twice(root string) []*types.Mount {
	m := mount.Mount{Type: "bind", Source: root, Options: []string{"rbind", "rw"}}
	f.canMount(m)
	one := &types.Mount{Type: m.Type, Source: m.Source, Options: m.Options}
	return []*types.Mount{one, one}
}

// TestFoundWhenMounted: a checkpoint that shows only in the mounted root filesystem is
// restored, or if it is refused, unmounted.
func TestFoundWhenMounted(t *testing.T) {
	f := newFixture(t)
	root := t.TempDir()
	f.embed(root, "")
	r := f.createRequest()
	r.Rootfs = f.twice(root)
	before := listing(t, filepath.Join(f.bundle, "rootfs"), root)
	f.policy.check = func() error { return errTest }
	if _, err := f.s.Create(t.Context(), r); !errors.Is(err, errTest) || !strings.Contains(err.Error(), "from its image") {
		t.Fatalf("%v", err)
	}
	if after := listing(t, filepath.Join(f.bundle, "rootfs"), root); !slices.Equal(before, after) {
		t.Errorf("refused, it has left:\n%q\n%q", before, after)
	}
	f.policy.check = nil
	resp, err := f.s.Create(t.Context(), r)
	must(t, err)
	plan := f.s.containers["c"].plan
	if want := filepath.Join(f.bundle, "rootfs", layout.Embedded); resp.Pid != 0 || plan == nil || plan.embedded != want {
		t.Errorf("pid %d, plan %+v", resp.Pid, plan)
	}
}

// TestPlanInPod: in a pod, connections are closed, and the pod's folder has a record.
func TestPlanInPod(t *testing.T) {
	for _, src := range restoreSources {
		t.Run(src.name, func(t *testing.T) {
			f := newFixture(t)
			f.inPod("ns", "app")
			folder := filepath.Join(t.TempDir(), "pods", "uid", "containers", "app")
			must(t, os.MkdirAll(folder, 0o755))
			f.spec.Mounts = []specs.Mount{{Destination: "/dev/termination-log", Type: "bind", Source: filepath.Join(folder, "0123"), Options: []string{"rbind"}}}
			f.nodeConfig("")
			r := f.createRequest()
			src.arrange(f, r, "ns")
			f.createRequest()
			_, err := f.s.Create(t.Context(), r)
			must(t, err)
			plan := f.s.containers["c"].plan
			if got := plan.spec.Annotations[checkpoint.AnnotationTCP]; got != "close" {
				t.Errorf("TCP connections: %q", got)
			}
			if recorded := plan.record.pod == recordFolder(folder); recorded != src.recorded {
				t.Errorf("the pod's record is in %q", plan.record.pod)
			}
			files, err := os.ReadDir("/proc/self/fd")
			must(t, err)
			for _, fd := range files {
				if name, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasSuffix(name, "checkpoint.tar") {
					t.Errorf("%s is open", name)
				}
			}
		})
	}
}

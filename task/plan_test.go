package task

import (
	"errors"
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

	"github.com/stasis-run/stasis/checkpoint/capture"
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
		"in a pod, not signed": {func(f *fixture, dir string) { f.joinPod("ns"); f.unsign(dir) }, "would do without", errdefs.IsPermissionDenied},
		"in a pod, of another namespace": {func(f *fixture, dir string) { f.joinPod("other") }, `is of namespace "ns"`,
			errdefs.IsPermissionDenied},
		"in a pod, configuration": {func(f *fixture, dir string) { f.joinPod("ns"); f.nodeConfig("[restore]\nunsigned = 'allow'") },
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
				wanted, before := proto.Clone(r), listing(t, f.bundle)
				_, err := f.s.Create(t.Context(), r)
				if err == nil || !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), src.says) || tc.class != nil && !tc.class(err) {
					t.Fatalf("%v; want an error that says %q and %q", err, src.says, tc.says)
				}
				if after := listing(t, f.bundle); !slices.Equal(before, after) {
					t.Errorf("the bundle was changed:\n%q\n%q", before, after)
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

// listing is what is in a folder and below: names, sizes, and the file systems they are
// in.
func listing(t *testing.T, dir string) (lines []string) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		size := st.Size
		if d.IsDir() {
			size = 0
		}
		lines = append(lines, strings.Join([]string{path, d.Type().String(), string(rune('0' + size%10)), string(rune('0' + st.Dev%64))}, " "))
		return nil
	}))
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

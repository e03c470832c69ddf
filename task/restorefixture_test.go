package task

import (
	"archive/tar"
	"encoding/json"
	"os"
	"path/filepath"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/mount"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sign"
	"github.com/stasis-run/stasis/process/processtest"
)

// inPod makes the fixture's container one of a pod.
func (f *fixture) inPod(namespace, name string) {
	f.spec.Annotations = map[string]string{
		criSandboxNamespace: namespace, criSandboxName: "pod", criSandboxUID: "uid", criSandboxID: "sandbox", criContainerName: name,
	}
}

func (f *fixture) trust() *sign.Trust {
	f.Helper()
	trust, err := sign.Dir(f.keys).Trust()
	must(f.T, err)
	return trust
}

// nodeConfig writes the node's configuration.
func (f *fixture) nodeConfig(toml string) {
	f.Helper()
	must(f.T, os.WriteFile(filepath.Join(f.keys, "config.toml"), []byte(toml), 0o644))
}

// checkpoint makes one in the folder dir, signed by this node, of the container app of a
// pod in namespace, "" for none.
func (f *fixture) checkpoint(dir, namespace string) {
	f.Helper()
	folder, err := checkpoint.NewFolder(dir)
	must(f.T, err)
	must(f.T, os.WriteFile(filepath.Join(folder.Path(), layout.Inventory), processtest.Inventory, 0o600))
	m := checkpoint.Manifest{Container: checkpoint.Container{ID: "before", Name: "app"}}
	if namespace != "" {
		m.Container.Pod = &checkpoint.Pod{Name: "pod", Namespace: namespace, UID: "uid"}
	}
	must(f.T, folder.Commit(m, false))
	key, err := sign.Dir(f.keys).Key()
	must(f.T, err)
	must(f.T, checkpoint.Sign(f.Context(), dir, key, m))
}

// unsign takes the signature from a checkpoint.
func (f *fixture) unsign(dir string) {
	f.Helper()
	must(f.T, os.Remove(filepath.Join(dir, layout.Signature)))
}

// alter changes a checkpoint's file and leaves its size.
func (f *fixture) alter(dir string) {
	f.Helper()
	must(f.T, os.WriteFile(filepath.Join(dir, layout.Inventory), []byte("0123456789"), 0o600))
}

// A restoreSource is one of the ways to ask for a restore.
type restoreSource struct {
	name string
	// arrange asks for it, of a checkpoint from namespace, and returns the folder of
	// the checkpoint that is read, for a test to change.
	arrange func(f *fixture, r *taskapi.CreateTaskRequest, namespace string) (dir string)
	// recorded: it is recorded, and done once.
	recorded bool
	// copied: what is read is a copy for this restore, removed afterwards.
	copied func(f *fixture) string
	says   string // of errors
}

var restoreSources = []restoreSource{
	{name: "request", arrange: func(f *fixture, r *taskapi.CreateTaskRequest, namespace string) string {
		dir := filepath.Join(f.TempDir(), "checkpoint")
		f.checkpoint(dir, namespace)
		r.Checkpoint = dir
		return dir
	}, says: "restore container c:"},
	{name: "containerd's copy", arrange: func(f *fixture, r *taskapi.CreateTaskRequest, namespace string) string {
		dir := filepath.Join(f.keys, "tmp", "ctrd-checkpoint123")
		f.Setenv("XDG_RUNTIME_DIR", filepath.Dir(dir))
		f.checkpoint(dir, namespace)
		r.Checkpoint = dir
		return dir
	}, says: "restore container c:", copied: func(f *fixture) string { return filepath.Join(f.keys, "tmp", "ctrd-checkpoint123") }},
	{name: "options", arrange: func(f *fixture, r *taskapi.CreateTaskRequest, namespace string) string {
		dir := filepath.Join(f.TempDir(), "checkpoint")
		f.checkpoint(dir, namespace)
		r.Options = pack(f, &options.Options{CriuImagePath: dir})
		return dir
	}, says: "restore container c:"},
	{name: "name in an annotation", arrange: func(f *fixture, r *taskapi.CreateTaskRequest, namespace string) string {
		f.annotate(annotationRestoreFrom, "registry/checkpoint:1")
		return f.stage(namespace)
	}, recorded: true, says: "restore container c from registry/checkpoint:1:", copied: fetchedCopy},
	{name: "archive in an annotation", arrange: func(f *fixture, r *taskapi.CreateTaskRequest, namespace string) string {
		archives := f.TempDir()
		path := filepath.Join(archives, "checkpoint.tar")
		must(f.T, os.WriteFile(path, []byte("archive"), 0o600))
		f.nodeConfig("[restore]\narchives = ['" + archives + "']")
		f.annotate(annotationRestoreFrom, path)
		return f.stage(namespace)
	}, recorded: true, says: "checkpoint.tar:", copied: fetchedCopy},
	{name: "image's layer", arrange: func(f *fixture, r *taskapi.CreateTaskRequest, namespace string) string {
		dir := f.TempDir()
		for _, name := range []string{"base", "checkpoint", "upper", "work"} {
			must(f.T, os.Mkdir(filepath.Join(dir, name), 0o755))
		}
		layer := filepath.Join(dir, "checkpoint")
		m := mount.Mount{Type: "overlay", Source: "overlay", Options: []string{
			"workdir=" + filepath.Join(dir, "work"), "upperdir=" + filepath.Join(dir, "upper"),
			"lowerdir=" + layer + ":" + filepath.Join(dir, "base"),
		}}
		f.canMount(m)
		r.Rootfs = []*types.Mount{{Type: m.Type, Source: m.Source, Options: m.Options}}
		return f.embed(layer, namespace)
	}, recorded: true, says: "restore container c from its image:"},
	{name: "image's folder", arrange: func(f *fixture, r *taskapi.CreateTaskRequest, namespace string) string {
		root := f.TempDir()
		m := mount.Mount{Type: "bind", Source: root, Options: []string{"rbind", "rw"}}
		f.canMount(m)
		r.Rootfs = []*types.Mount{{Type: m.Type, Source: m.Source, Options: m.Options}}
		return f.embed(root, namespace)
	}, recorded: true, says: "restore container c from its image:",
		copied: func(f *fixture) string { return filepath.Join(f.bundle, "rootfs", layout.Embedded) }},
}

func fetchedCopy(f *fixture) string { return bundle(f.bundle).fetchedDir() }

func (f *fixture) annotate(key, value string) {
	if f.spec.Annotations == nil {
		f.spec.Annotations = map[string]string{}
	}
	f.spec.Annotations[key] = value
}

// canMount fails where this host cannot mount m, and unmounts at the test's end what is
// mounted in the bundle.
func (f *fixture) canMount(m mount.Mount) {
	f.Helper()
	rootOnly(f.T)
	at := f.TempDir()
	if err := mount.All([]mount.Mount{m}, at); err != nil {
		f.Fatalf("%v (an overlay needs a temporary folder on an ordinary file system, in $TMPDIR, and no comma in its name)", err)
	}
	must(f.T, mount.UnmountAll(at, 0))
	f.Cleanup(func() { _ = bundle(f.bundle).unmount() })
}

func infoOf(namespace string) capture.Info {
	info := capture.Info{ContainerName: "app"}
	if namespace != "" {
		info.Pod = &capture.Pod{Name: "pod", Namespace: namespace}
	}
	return info
}

// embed puts a checkpoint into a layer of an image, as a runnable one has it.
func (f *fixture) embed(layer, namespace string) (dir string) {
	f.Helper()
	dir = filepath.Join(layer, layout.EmbeddedImages)
	f.checkpoint(dir, namespace)
	data, err := capture.EncodeInfo(infoOf(namespace))
	must(f.T, err)
	must(f.T, os.WriteFile(filepath.Join(layer, layout.EmbeddedInfo), data, 0o600))
	return dir
}

// stageEnv is a folder with what the program stasis copies for a restore: checkpoint/,
// and layer.tar if there is one; what it prints: fetched.json; and if it fails, why:
// error.
const stageEnv = "STASIS_TEST_STAGE"

// stasisScript is that program. It is called as
//
//	stasis ... stage --container ID [--archive] -- DIR [NAME]
const stasisScript = `#!/bin/sh -e
archive=no
while [ "$1" != -- ]; do
	[ "$1" != --archive ] || archive=yes
	shift
done
if [ $archive = yes ] && [ "$(cat <&3)" != archive ]; then
	echo "stasis: was given no archive" >&2
	exit 1
fi
cp -r "$STASIS_TEST_STAGE" "$2"
if [ -e "$2/error" ]; then
	cat "$2/error" >&2
	exit 1
fi
cat "$2/fetched.json"
`

// stage lets the program stasis copy a checkpoint, and returns the folder from which it
// does.
func (f *fixture) stage(namespace string) (dir string) {
	f.Helper()
	bin, from := f.TempDir(), f.TempDir()
	must(f.T, os.WriteFile(filepath.Join(bin, "stasis"), []byte(stasisScript), 0o755))
	f.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	f.Setenv(stageEnv, from)
	dir = filepath.Join(from, layout.Images)
	f.checkpoint(dir, namespace)
	f.fetched(capture.Fetched{Info: infoOf(namespace)})
	return dir
}

// fetched is what the program stasis prints.
func (f *fixture) fetched(got capture.Fetched) {
	f.Helper()
	data, err := json.Marshal(got)
	must(f.T, err)
	must(f.T, os.WriteFile(filepath.Join(os.Getenv(stageEnv), "fetched.json"), data, 0o600))
}

// layer is a tar that the program stasis copies, with a file called name.
func (f *fixture) layer(name string) {
	f.Helper()
	file, err := os.Create(filepath.Join(os.Getenv(stageEnv), layout.Layer))
	must(f.T, err)
	defer file.Close()
	w := tar.NewWriter(file)
	must(f.T, w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Typeflag: tar.TypeReg}))
	must(f.T, w.Close())
}

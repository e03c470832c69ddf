package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/regfile"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/criu/img/imgtest"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

const (
	podmanConfig = `{"id":"0123","name":"db","rootfsImageID":"2222222222222222222222222222222222222222222222222222222222222222",
		"rootfsImageName":"docker.io/library/redis:7","runtime":"runc","createdTime":"2026-01-02T03:04:05Z","spec":{}}`
	podmanSpec = `{"annotations":{"io.container.manager":"libpod"}}`
	crioConfig = `{"id":"0123","name":"k8s_db_pod_ns_uid_0","rootfsImage":"redis:7","rootfsImageRef":"2222222222222222222222222222222222222222222222222222222222222222",
		"rootfsImageName":"docker.io/library/redis@` + digest1 + `","runtime":"crun","checkpointedTime":"2026-01-02T04:04:05Z"}`
	crioSpec = `{"annotations":{"io.container.manager":"cri-o","io.kubernetes.container.name":"db","io.kubernetes.pod.name":"pod",
		"io.kubernetes.pod.namespace":"ns","io.kubernetes.pod.uid":"uid","io.kubernetes.cri-o.SandboxID":"sandbox"}}`
	kubeletConfig = `{"id":"0123","name":"","rootfsImage":"docker.io/library/redis:7","rootfsImageName":"docker.io/library/redis:7",
		"rootfsImageRef":"` + digest2 + `","runtime":"io.containerd.runc.v2"}`
	kubeletSpec = `{"annotations":{"io.kubernetes.cri.container-name":"db","io.kubernetes.cri.sandbox-name":"pod",
		"io.kubernetes.cri.sandbox-namespace":"ns","io.kubernetes.cri.sandbox-uid":"uid","io.kubernetes.cri.sandbox-id":"sandbox"}}`
)

// filesImage is a files.img in which a process has a root folder of the mode.
func filesImage(t testing.TB, mode uint32) string {
	t.Helper()
	return string(imgtest.Encode(t, "FILES", &fdinfo.FileEntry{
		Type: fdinfo.FdTypes_REG.Enum(), Id: proto.Uint32(1),
		Reg: &regfile.RegFileEntry{Id: proto.Uint32(1), Name: proto.String("/"), Mode: proto.Uint32(0o40000 | mode)},
	}))
}

// The archives of other programs, as their sources and their real ones have them.
func podmanArchive(t testing.TB) []member {
	return []member{
		{name: "artifacts/", hdr: tar.Header{Typeflag: tar.TypeDir, Mode: 0o755}},
		file(layout.DevShm, string(tarOf(t))), file(configName, podmanConfig), file(specName, podmanSpec),
		file("network.status", "null"), file(layout.DumpStats, "stats"), file("ctr.log", "log"),
		{name: "checkpoint/", hdr: tar.Header{Typeflag: tar.TypeDir, Mode: 0o600}},
		file("checkpoint/"+layout.Inventory, "i"), file("checkpoint/files.img", filesImage(t, 0o555)),
		file(filesName, string(tarOf(t, file("new", "n")))), file(deletedName, `["/old"]`),
	}
}

func crioArchive(t testing.TB) []member {
	return []member{
		file("bind.mounts", "[]"),
		file("checkpoint/"+layout.Inventory, "i"), file("checkpoint/files.img", filesImage(t, 0o755)),
		file(configName, crioConfig), file(layout.DumpLog, "log"),
		file("io.kubernetes.cri-o.LogPath", "log"), file(filesName, string(tarOf(t, file("new", "n")))),
		file(specName, crioSpec), file(layout.DumpStats, "stats"),
	}
}

func kubeletArchive(t testing.TB) []member {
	return []member{
		file("checkpoint/"+layout.Inventory, "i"), file("checkpoint/"+layout.DumpLog, "log of the images"),
		file(configName, kubeletConfig), file("container.log", "log"), file(layout.DumpLog, "log"),
		file(filesName, string(compress(t, tarOf(t, file("new", "n"), file(".wh.old", "")), compression.Gzip))),
		file(specName, kubeletSpec), file(layout.DumpStats, "stats"), file("status", "{}"), file("status.dump", "{}"),
	}
}

func TestReadForeign(t *testing.T) {
	pod := capture.Pod{Name: "pod", Namespace: "ns", UID: "uid", ID: "sandbox"}
	for name, test := range map[string]struct {
		members []member
		check   func(i capture.Info) bool
		layer   map[string]string
		images  []string
	}{
		"Podman": {podmanArchive(t), func(i capture.Info) bool {
			return i.ContainerName == "db" && i.Engine.Name == "podman" && i.OCIRuntime.Name == "runc" && i.Pod == nil &&
				i.Base == capture.Base{Name: "docker.io/library/redis:7", Config: digest2}
		}, map[string]string{"./": "dr-xr-xr-x", ".wh.old": "", "new": "n"}, []string{"files.img", layout.Inventory, layout.DumpStats}},
		"CRI-O": {crioArchive(t), func(i capture.Info) bool {
			return i.ContainerName == "db" && i.Engine.Name == "cri-o" && i.OCIRuntime.Name == "crun" && *i.Pod == pod &&
				i.Base == capture.Base{Name: "docker.io/library/redis@" + digest1, Digest: digest1, Config: digest2}
		}, map[string]string{"./": "drwxr-xr-x", "new": "n"}, []string{layout.DumpLog, "files.img", layout.Inventory, layout.DumpStats}},
		"kubelet": {kubeletArchive(t), func(i capture.Info) bool {
			return i.ContainerName == "db" && i.Engine.Name == "containerd" && i.Runtime == "io.containerd.runc.v2" && *i.Pod == pod &&
				i.Base == capture.Base{Name: "docker.io/library/redis:7", Config: digest2}
		}, map[string]string{".wh.old": "", "new": "n"}, []string{layout.DumpLog, layout.Inventory, layout.DumpStats}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "out")
			c, err := Read(t.Context(), bytes.NewReader(tarOf(t, test.members...)), dir, Limits{})
			must(t, err)
			if c.Info.ContainerID != "0123" || !test.check(c.Info) {
				t.Errorf("info %+v, pod %+v", c.Info, c.Info.Pod)
			}
			if got := list(t, layerOf(t, c.Layer)); !reflect.DeepEqual(got, test.layer) {
				t.Errorf("layer %v, want %v", got, test.layer)
			}
			if got := names(t, c.Images); !slices.Equal(got, test.images) {
				t.Errorf("images %v, want %v", got, test.images)
			}
			want := []string{layout.Images, layout.Layer}
			if name == "Podman" {
				want = []string{layout.Images, layout.DevShm, layout.Layer}
			}
			if got := names(t, dir); !slices.Equal(got, want) {
				t.Errorf("files %v, want %v", got, want)
			}
		})
	}
}

func names(t testing.TB, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// with returns a good archive with the members instead of, or besides, its own.
func with(t testing.TB, members ...member) []byte {
	all := podmanArchive(t)
	for _, m := range members {
		if i := slices.IndexFunc(all, func(o member) bool { return o.name == m.name }); i >= 0 {
			all[i] = m
		} else {
			all = append(all, m)
		}
	}
	return tarOf(t, all...)
}

func without(t testing.TB, name string) []byte {
	return tarOf(t, slices.DeleteFunc(podmanArchive(t), func(m member) bool { return m.name == name })...)
}

func TestReadRefuses(t *testing.T) {
	small := Limits{Files: 20, Metadata: 1 << 10, Total: 1 << 16}
	good := with(t)
	gz := compress(t, good, compression.Gzip)
	zst := compress(t, good, compression.Zstd)
	zeros := make([]byte, 1<<20)
	for name, test := range map[string]struct {
		data []byte
		want string // in the error
	}{
		"nothing":                    {nil, "no end"},
		"no tar":                     {bytes.Repeat([]byte("nonsense"), 200), "no tar"},
		"no config.dump":             {without(t, configName), "no config.dump"},
		"no spec.dump":               {without(t, specName), "no spec.dump"},
		"no inventory.img":           {without(t, "checkpoint/"+layout.Inventory), "no checkpoint/inventory.img"},
		"a config that is none":      {with(t, file(configName, "{")), "config.dump"},
		"a config without ID":        {with(t, file(configName, "{}")), "no ID"},
		"a spec that is none":        {with(t, file(specName, "[]")), "spec.dump"},
		"deleted files that are not": {with(t, file(deletedName, "{}")), "deleted.files"},
		"a deleted file outside":     {with(t, file(deletedName, `["/../../etc/passwd"]`)), "passwd"},
		"a layer that is none":       {with(t, file(filesName, strings.Repeat("nonsense", 200))), "rootfs-diff.tar"},
		"a compressed layer cut":     {with(t, file(filesName, string(gz[:len(gz)/2]))), "rootfs-diff.tar"},
		"cut in a file":              {good[:len(good)/2], "truncated"},
		"cut before the end":         {good[:len(good)-1024], "truncated"},
		"cut gzip":                   {gz[:len(gz)/2], "archive ends"},
		"cut zstd":                   {zst[:len(zst)/2], "truncated"},
		"damaged gzip":               {damaged(gz), "damaged"},
		"damaged zstd":               {damaged(zst), ""},
		"a path up":                  {with(t, file("checkpoint/../../x.img", "")), "leads out"},
		"a path up that stays in":    {with(t, file("checkpoint/../checkpoint/x.img", "")), "leads out"},
		"an absolute path":           {with(t, file("/checkpoint/x.img", "")), "leads out"},
		"a folder of images":         {with(t, file("checkpoint/a/x.img", "")), "one folder"},
		"a hidden image":             {with(t, file("checkpoint/.partial", "")), "one folder"},
		"the folder as a file":       {tarOf(t, append([]member{file(layout.Images, "")}, podmanArchive(t)...)...), "one folder"},
		"control characters":         {with(t, file("checkpoint/a\nb.img", "")), "not a name"},
		"a file twice":               {tarOf(t, append(podmanArchive(t), file("checkpoint/"+layout.Inventory, ""))...), "twice"},
		"a file twice, spelt anew":   {tarOf(t, append(podmanArchive(t), file("./checkpoint//"+layout.Inventory, ""))...), "twice"},
		"config.dump twice":          {tarOf(t, append(podmanArchive(t), file("./config.dump", ""))...), "twice"},
		"a symbolic link":            {with(t, link("checkpoint/parent", tar.TypeSymlink, "../pre-checkpoint")), "symbolic link"},
		"a log that is a link":       {with(t, link("container.log", tar.TypeSymlink, "/etc/passwd")), "symbolic link"},
		"a folder that is a link":    {tarOf(t, append([]member{link("checkpoint", tar.TypeSymlink, "/tmp")}, podmanArchive(t)...)...), "symbolic link"},
		"a hard link":                {with(t, link("checkpoint/x.img", tar.TypeLink, "/etc/passwd")), "hard link"},
		"a device":                   {with(t, link("checkpoint/x.img", tar.TypeChar, "")), "device"},
		"a FIFO":                     {with(t, link("dump.log", tar.TypeFifo, "")), "FIFO"},
		"a sparse file":              {append(sparse(t), good...), "sparse file"},
		"large metadata":             {with(t, file(specName, strings.Repeat(" ", 1<<10+1))), "at most 1024"},
		"too many files":             {with(t, many(20)...), "too many files"},
		"too large":                  {with(t, file("checkpoint/pages-1.img", string(zeros))), "larger than is allowed"},
		"a bomb":                     {compress(t, with(t, file("checkpoint/pages-1.img", string(zeros))), compression.Zstd), "larger than is allowed"},
		"data after the end":         {append(bytes.Clone(good), good...), "after its end"},
		"two names":                  {append(twoNames(t), good...), "same entry"},
		"a layer with two names":     {with(t, file(filesName, string(twoNames(t)))), "same entry"},
		"a /dev/shm with two names":  {with(t, file(layout.DevShm, string(twoNames(t)))), "same entry"},
		"a bomb of a layer":          {with(t, file(filesName, string(compress(t, tarOf(t, file("x", string(zeros))), compression.Gzip)))), "larger than is allowed"},
	} {
		t.Run(name, func(t *testing.T) {
			parent := t.TempDir()
			c, err := Read(t.Context(), bytes.NewReader(test.data), filepath.Join(parent, "out"), small)
			if err == nil {
				t.Fatalf("read %+v", c)
			}
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v; want an invalid argument with %q", err, test.want)
			}
			if left := names(t, parent); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// sparse is an entry of a sparse file, which Go's library cannot write.
func sparse(t testing.TB) []byte {
	t.Helper()
	var buf bytes.Buffer
	must(t, tar.NewWriter(&buf).WriteHeader(&tar.Header{Format: tar.FormatGNU, Typeflag: tar.TypeReg, Name: "volumes/x", Mode: 0o600}))
	block := buf.Bytes()
	block[156] = tar.TypeGNUSparse
	copy(block[483:], "77777777777") // its size
	copy(block[148:], "        ")
	sum := 0
	for _, b := range block {
		sum += int(b)
	}
	copy(block[148:], fmt.Sprintf("%06o\x00 ", sum))
	return block
}

// twoNames is an entry with a long name of GNU's and another of PAX's.
func twoNames(t testing.TB) []byte {
	t.Helper()
	var gnu, pax bytes.Buffer
	must(t, tar.NewWriter(&gnu).WriteHeader(&tar.Header{Format: tar.FormatGNU, Typeflag: tar.TypeReg, Name: "volumes/" + strings.Repeat("x", 120)}))
	must(t, tar.NewWriter(&pax).WriteHeader(&tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: "volumes/é"}))
	return append(gnu.Bytes()[:2*blockSize], pax.Bytes()...)
}

func damaged(data []byte) []byte {
	data = bytes.Clone(data)
	for i := range 8 {
		data[len(data)/2+i] ^= 0xff
	}
	return data
}

func many(n int) (members []member) {
	for i := range n {
		members = append(members, file("volumes/"+strings.Repeat("v", i+1), ""))
	}
	return members
}

func TestReadIntoExisting(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "mine"), nil, 0o600))
	if _, err := Read(t.Context(), bytes.NewReader(with(t)), dir, Limits{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("error %v", err)
	}
	if got := names(t, dir); !slices.Equal(got, []string{"mine"}) {
		t.Errorf("the folder has %v", got)
	}
}

func TestReadCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Read(ctx, bytes.NewReader(with(t)), filepath.Join(t.TempDir(), "out"), Limits{}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// The configuration is read without what comes after it.
func TestReadConfigStops(t *testing.T) {
	c := sample(t)
	must(t, os.Truncate(filepath.Join(c.Images, "pages-1.img"), 4<<20))
	data := write(t, c, compression.Uncompressed)
	stop := errors.New("read too far")
	r := func() io.Reader { return io.MultiReader(bytes.NewReader(data[:128<<10]), errReader{stop}) }
	if _, err := ReadConfig(t.Context(), r(), Limits{}); err != nil {
		t.Error(err)
	}
	if _, err := ReadRuntime(t.Context(), r(), Limits{}); err != nil {
		t.Error(err)
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

// Whatever an archive holds, Read writes plain files into its folder, within the
// limits, and removes them if it fails.
func FuzzRead(f *testing.F) {
	for _, members := range [][]member{podmanArchive(f), crioArchive(f), kubeletArchive(f)} {
		data := tarOf(f, members...)
		f.Add(data)
		f.Add(compress(f, data, compression.Gzip))
		f.Add(compress(f, data, compression.Zstd))
	}
	c := sample(f)
	entries, err := os.ReadDir(c.Images)
	must(f, err)
	for _, e := range entries {
		if e.Name() != layout.Inventory && e.Name() != "files.img" {
			must(f, os.Remove(filepath.Join(c.Images, e.Name())))
		}
	}
	f.Add(write(f, c, compression.Uncompressed))
	limits := Limits{Files: 64, Metadata: 1 << 16, Total: 1 << 20}
	f.Fuzz(func(t *testing.T, data []byte) {
		parent := t.TempDir()
		c, err := Read(t.Context(), bytes.NewReader(data), filepath.Join(parent, "out"), limits)
		if err != nil {
			if left := names(t, parent); len(left) > 0 {
				t.Fatalf("left behind: %v", left)
			}
			return
		}
		total := int64(0)
		must(t, filepath.WalkDir(parent, func(path string, d os.DirEntry, err error) error {
			must(t, err)
			info, err := d.Info()
			must(t, err)
			if !d.IsDir() && !info.Mode().IsRegular() {
				t.Errorf("%s: %v", path, info.Mode())
			}
			if !d.IsDir() {
				total += info.Size()
			}
			return nil
		}))
		if got := names(t, parent); !slices.Equal(got, []string{"out"}) || total > limits.Total {
			t.Errorf("wrote %v, %d bytes", got, total)
		}
		if _, err := ReadConfig(t.Context(), bytes.NewReader(data), limits); err != nil {
			t.Errorf("Read succeeds, ReadConfig fails: %v", err)
		}
		// What was read can be written, unless its layer is at fault.
		c.Layer = nil
		if err := Write(t.Context(), io.Discard, c, compression.Uncompressed); err != nil {
			t.Errorf("Read succeeds, Write fails: %v", err)
		}
	})
}

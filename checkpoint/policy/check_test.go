package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/cespare/xxhash/v2"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v8/magic"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/criu/img"
)

// forgery is a copy of a checkpoint that containerd's CRI has made of a pod's
// container (testdata/pod), to be altered, and the container's config.json.
type forgery struct {
	t    testing.TB
	dir  string
	spec *specs.Spec
	root string // a root filesystem
}

func newForgery(t testing.TB) *forgery {
	t.Helper()
	hostHierarchies = func() (map[string]bool, error) {
		return map[string]bool{"": true, "blkio": true, "cpu": true, "cpuacct": true, "cpuset": true, "devices": true, "freezer": true,
			"memory": true, "name=systemd": true, "pids": true}, nil
	}
	if runtime.GOARCH != "amd64" {
		t.Skip("testdata was made on amd64")
	}
	f := &forgery{t: t, dir: filepath.Join(t.TempDir(), "checkpoint"), spec: &specs.Spec{}, root: t.TempDir()}
	must(t, os.CopyFS(f.dir, os.DirFS(filepath.Join("testdata", "pod"))))
	data, err := os.ReadFile(filepath.Join("testdata", "pod.config.json"))
	must(t, err)
	// Its sandbox's process, under a number that this host gives no process (it is above
	// Linux's PID_MAX_LIMIT): the namespaces of one that is there would be the host's.
	data = bytes.ReplaceAll(data, []byte("/proc/29952/"), []byte("/proc/4194305/"))
	must(t, json.Unmarshal(data, f.spec))
	// Of the memory there is only the length.
	pages := int64(0)
	alter(f, "pagemap-6.img", "PAGEMAP", func(all []*pagemap.PagemapEntry) []*pagemap.PagemapEntry {
		for _, e := range all[1:] {
			if e.GetFlags()&(1<<2) != 0 {
				pages += int64(e.GetNrPages())
			}
		}
		return nil
	})
	must(t, os.WriteFile(filepath.Join(f.dir, "pages-1.img"), nil, 0o600))
	must(t, os.Truncate(filepath.Join(f.dir, "pages-1.img"), pages*int64(os.Getpagesize())))
	// What this host masks depends on its kernel.
	f.spec.Linux.MaskedPaths = []string{"/proc/keys"}
	f.spec.Linux.ReadonlyPaths = []string{"/proc/sys"}
	return f
}

// alter lets fn change the messages of an image; nil leaves it as it is.
func alter[M any, P interface {
	*M
	proto.Message
}](f *forgery, name, kind string, fn func([]P) []P) {
	f.t.Helper()
	path := filepath.Join(f.dir, name)
	var all []P
	if in, err := os.Open(path); err == nil {
		defer in.Close()
		info, err := in.Stat()
		must(f.t, err)
		must(f.t, img.Each(in, info.Size(), kind, func(msg []byte) error {
			m := P(new(M))
			all = append(all, m)
			return img.Decode(msg, m)
		}))
	} else if !os.IsNotExist(err) {
		f.t.Fatal(err)
	}
	if all = fn(all); all == nil {
		return
	}
	msgs := make([]proto.Message, len(all))
	for i, m := range all {
		msgs[i] = m
	}
	f.write(name, kind, msgs...)
}

// one is alter for the first message of an image.
func one[M any, P interface {
	*M
	proto.Message
}](f *forgery, name, kind string, fn func(P)) {
	f.t.Helper()
	alter(f, name, kind, func(all []P) []P { fn(all[0]); return all })
}

// write makes an image of messages.
func (f *forgery) write(name, kind string, msgs ...proto.Message) {
	f.t.Helper()
	m := magic.LoadMagic()
	var out []byte
	if kind != "INVENTORY" {
		out = binary.LittleEndian.AppendUint32(out, uint32(m.ByName["IMG_COMMON"]))
	}
	out = binary.LittleEndian.AppendUint32(out, uint32(m.ByName[kind]))
	for _, msg := range msgs {
		data, err := proto.MarshalOptions{AllowPartial: true}.Marshal(msg)
		must(f.t, err)
		out = binary.LittleEndian.AppendUint32(out, uint32(len(data)))
		out = append(out, data...)
	}
	f.raw(name, out)
}

func (f *forgery) raw(name string, data []byte) {
	f.t.Helper()
	must(f.t, os.WriteFile(filepath.Join(f.dir, name), data, 0o600))
}

func (f *forgery) read(name string) []byte {
	f.t.Helper()
	data, err := os.ReadFile(filepath.Join(f.dir, name))
	must(f.t, err)
	return data
}

func (f *forgery) check() error {
	ckpt, err := checkpoint.Open(f.t.Context(), f.dir)
	if err != nil {
		return err
	}
	if err := Check(f.t.Context(), ckpt, f.spec); err != nil {
		return err
	}
	return CheckMounts(f.t.Context(), ckpt, f.spec, f.root)
}

// seal gives the forgery a manifest, as for a checkpoint made by Stasis.
func (f *forgery) seal(cgroupsMode string) {
	f.t.Helper()
	m := checkpoint.Manifest{Version: 1, Architecture: runtime.GOARCH, Options: checkpoint.Options{CgroupsMode: cgroupsMode}}
	entries, err := os.ReadDir(f.dir)
	must(f.t, err)
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(f.dir, e.Name()))
		must(f.t, err)
		sum := sha256.Sum256(data)
		file := checkpoint.File{Name: e.Name(), Size: int64(len(data)), Sum: "sha256:" + hex.EncodeToString(sum[:])}
		if strings.HasPrefix(e.Name(), "pages-") {
			file.Sum = fmt.Sprintf("xxh64:%016x", xxhash.Sum64(data))
		}
		m.Files = append(m.Files, file)
	}
	data, err := json.Marshal(m)
	must(f.t, err)
	f.raw("stasis.json", data)
}

// refused checks that a forgery is refused, in one line with all the parts.
func (f *forgery) refused(parts ...string) {
	f.t.Helper()
	err := f.check()
	if err == nil {
		f.t.Fatal("it was not refused")
	}
	if !errdefs.IsPermissionDenied(err) && !errdefs.IsInvalidArgument(err) {
		f.t.Errorf("%v: of no class", err)
	}
	if strings.Contains(err.Error(), "\n") {
		f.t.Errorf("%q: more than a line", err)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			f.t.Errorf("%v\nlacks %q", err, part)
		}
	}
}

func (f *forgery) accepted() {
	f.t.Helper()
	if err := f.check(); err != nil {
		f.t.Error(err)
	}
}

// judged is accepted where nothing is wanted, else refused with want and parts.
func (f *forgery) judged(want string, parts ...string) {
	f.t.Helper()
	if want == "" {
		f.accepted()
	} else {
		f.refused(append(parts, want)...)
	}
}

// The checkpoint of a container passes with the container's own spec.
func TestOwnSpec(t *testing.T) { newForgery(t).accepted() }

// grantCap gives the spec a capability.
func (f *forgery) grantCap(names ...string) {
	c := f.spec.Process.Capabilities
	for _, set := range []*[]string{&c.Bounding, &c.Effective, &c.Permitted} {
		*set = append(*set, names...)
	}
}

// confine makes the spec that of a container without privileges.
func (f *forgery) confine() {
	f.spec.Process.NoNewPrivileges = true
	f.spec.Process.Capabilities = &specs.LinuxCapabilities{}
	f.spec.Process.User = specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{2000}}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

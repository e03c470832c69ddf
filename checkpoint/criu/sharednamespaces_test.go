package criu

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ipcvar "github.com/checkpoint-restore/go-criu/v8/crit/images/ipc-var"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/utsns"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/criu/img"
)

// TestImagesDir gives CRIU the names and limits of namespaces that a container
// joins: here this process's own.
func TestImagesDir(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root")
	}
	// A long path, as containerd's are.
	images := filepath.Join(t.TempDir(), strings.Repeat("long", 40), "with:colon")
	if err := os.MkdirAll(images, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(images, os.DirFS("../testdata/runc-sleep")); err != nil {
		t.Fatal(err)
	}
	ckpt, err := checkpoint.Open(t.Context(), images)
	if err != nil {
		t.Fatal(err)
	}
	join := func(kinds ...specs.LinuxNamespaceType) *RestoreRequest {
		spec := &specs.Spec{Linux: &specs.Linux{}}
		for _, kind := range kinds {
			spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: kind, Path: "/proc/self/ns/" + string(kind)})
		}
		return &RestoreRequest{Bundle: t.TempDir(), Checkpoint: ckpt, Spec: spec}
	}
	r := join()
	r.Spec.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.UTSNamespace}, {Type: specs.IPCNamespace}}
	if dir, remove, err := r.imagesDir(); err != nil || dir != images {
		t.Errorf("namespaces of its own: %s, %v", dir, err)
	} else {
		remove()
	}

	r = join(specs.UTSNamespace, specs.IPCNamespace)
	dir, remove, err := r.imagesDir()
	if err != nil {
		t.Fatal(err)
	}
	hostname, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	var uts utsns.UtsnsEntry
	var ipc ipcvar.IpcVarEntry
	for name, into := range map[string]func([]byte) error{
		"utsns-12.img":     func(msg []byte) error { return img.Decode(msg, &uts) },
		"ipcns-var-11.img": func(msg []byte) error { return img.Decode(msg, &ipc) },
	} {
		kind := map[string]string{"utsns-12.img": "UTSNS", "ipcns-var-11.img": "IPC_VAR"}[name]
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := img.Each(strings.NewReader(string(data)), int64(len(data)), kind, into); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if uts.GetNodename() != hostname {
		t.Errorf("host name %q, want %q", uts.GetNodename(), hostname)
	}
	var shmmni uint32
	data, err := os.ReadFile("/proc/sys/kernel/shmmni")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Sscan(string(data), &shmmni)
	if len(ipc.SemCtls) != 4 || ipc.GetShmCtlmni() != shmmni || ipc.MqMsgMax == nil {
		t.Errorf("limits %v, want shmmni %d", &ipc, shmmni)
	}
	for _, name := range []string{"core-1.img", "descriptors.json"} {
		want, err := os.ReadFile(filepath.Join(images, name))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != string(want) {
			t.Errorf("%s is not the checkpoint's: %v", name, err)
		}
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), r.Bundle) {
		t.Errorf("it is mounted somewhere: %v", err)
	}
	remove()
	if left, err := os.ReadDir(r.Bundle); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}

	r = join(specs.UTSNamespace)
	r.Spec.Linux.Namespaces[0].Path = "/proc/self/ns/nothing"
	if _, _, err := r.imagesDir(); err == nil || !strings.Contains(err.Error(), "uts") {
		t.Errorf("a namespace that is not there: %v", err)
	}
}

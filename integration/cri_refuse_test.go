package integration

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-run/stasis/integration/stack"
)

// podSecret is in the memory of what the tests of this file checkpoint.
const podSecret = "stasis-test-secret-4f1e"

// TestCRIRestoreRefused asks for restores that a pod cannot have. Each is refused
// in one line that names the cause, the pod can be removed at once, and nothing
// is left.
func TestCRIRestoreRefused(t *testing.T) {
	t.Parallel()
	c := newCluster(t, stack.Options{})
	source := c.RunPod(c.ctx, "source", stack.HandlerDropIn)
	id := source.RunContainer(c.ctx, "app", stack.Busybox, countingPod, c.kubelet(source, 0), func(config *runtimeapi.ContainerConfig) {
		config.Envs = append(config.Envs, &runtimeapi.KeyValue{Key: "SECRET", Value: []byte(podSecret)})
	})
	c.goesOn(source, "app")
	ref := c.checkpoint(id, "stasis.test/refused:cp")
	file := c.archive(id, "good.tar")
	source.Remove(c.ctx)
	// One of no pod.
	out := c.NewContainer(c.ctx, "out", stack.Busybox, stack.Args(countingPod...))
	out.Start(c.ctx)
	c.Poll(c.ctx, "the container to count", func() bool { return strings.Contains(out.Stdout.String(), "line 3\n") })
	c.Stasis("checkpoint", "out", "stasis.test/out:cp", "--exit")
	out.Wait(c.ctx)
	out.Delete(c.ctx)
	layout := filepath.Join(c.Dir, "layout.tar")
	c.Stasis("export", "stasis.test/out:cp", layout, "--format", "oci")
	c.Stasis("--namespace", stack.CRINamespace, "import", layout)

	inside := func(name string) string { return filepath.Join(c.archives(), name) }
	outside := filepath.Join(c.Dir, "outside.tar")
	must(t, os.Link(file, outside))
	must(t, os.Symlink(outside, inside("link.tar")))
	must(t, os.Symlink(c.Dir, inside("folder")))
	must(t, os.Mkdir(inside("a-folder.tar"), 0o700))
	must(t, os.WriteFile(inside("rubbish.tar"), []byte("rubbish"), 0o600))
	rewriteTar(t, file, inside("log-link.tar"), nil, &tar.Header{Name: "container.log", Typeflag: tar.TypeSymlink, Linkname: "/etc/shadow"})
	rewriteTar(t, file, inside("image-link.tar"), nil, &tar.Header{Name: "checkpoint/more.img", Typeflag: tar.TypeSymlink, Linkname: "/etc/shadow"})

	n := 0
	try := func(name, image, container string, change ...func(*runtimeapi.PodSandboxConfig)) (*stack.Pod, error) {
		t.Helper()
		n++
		p := c.RunPod(c.ctx, "pod-"+itoa(int64(n)), stack.HandlerStasis, change...)
		id, err := p.RunContainerErr(c.ctx, container, image, countingPod, c.kubelet(p, 0))
		if err == nil {
			c.restored(p, container, id)
		} else if status := p.Status(c.ctx, id); status.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			t.Errorf("%s: the container is %v", name, status.State)
		} else {
			c.nothingFetched()
			p.RemoveContainer(c.ctx, id)
		}
		return p, err
	}
	refused := func(name, says, image, container string, change ...func(*runtimeapi.PodSandboxConfig)) {
		t.Helper()
		p, err := try(name, image, container, change...)
		p.Remove(c.ctx)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v; want an error that says %q", name, err, says)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: the error is not one line: %v", name, err)
		}
	}
	allowed := func(name, image string, change ...func(*runtimeapi.PodSandboxConfig)) {
		t.Helper()
		p, err := try(name, image, "app", change...)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		p.Remove(c.ctx)
	}
	from := func(ref string) func(*runtimeapi.PodSandboxConfig) { return annotated("restore-from", ref) }
	staging := inNamespace("staging")

	// Whose it is.
	refused("other namespace, name", `namespace "default"`, stack.Busybox, "app", staging, from(ref))
	refused("other namespace, archive", `namespace "default"`, stack.Busybox, "app", staging, from(file))
	refused("other namespace, image", `namespace "default"`, ref, "app", staging)
	refused("of no pod, name", "not known to be of any pod", stack.Busybox, "app", from("stasis.test/out:cp"), annotated("restore-from.app", "stasis.test/out:cp"))
	refused("of no pod, image", "not known to be of any pod", "stasis.test/out:cp", "app")
	c.configure("[restore.namespaces]", `staging = ["production", "default"]`, `other = [""]`)
	allowed("allowed namespace", stack.Busybox, staging, from(ref))
	allowed("allowed namespace, image", ref, staging)
	refused("allowed to another", "not known to be of any pod", "stasis.test/out:cp", "app", staging)
	refused("allowed to others", `namespace "default"`, ref, "app", inNamespace("other"))
	c.configure("[restore.namespaces]", `"*" = ["*"]`)
	allowed("all are allowed", ref, inNamespace("other"))
	// Then it is a matter of what it asks for.
	refused("all are allowed, of no pod", "the network namespace", "stasis.test/out:cp", "app", staging)
	c.configure()

	// Where an archive is.
	allowed("archive", stack.Busybox, from(file))
	for name, tc := range map[string]struct{ path, says string }{
		"outside":            {outside, "in none of the folders"},
		"a link":             {inside("link.tar"), "link in its path"},
		"a link on the way":  {inside("folder/outside.tar"), "link in its path"},
		"up":                 {c.archives() + "/../outside.tar", "is to be written as"},
		"a folder":           {inside("a-folder.tar"), "not a regular file"},
		"nothing":            {inside("nothing.tar"), "not on this node"},
		"rubbish":            {inside("rubbish.tar"), "archive"},
		"a linked log":       {inside("log-link.tar"), "container.log"},
		"a linked image":     {inside("image-link.tar"), "checkpoint/more.img"},
		"the folder itself":  {c.archives(), "in none of the folders"},
		"the host's secrets": {"/etc/shadow", "in none of the folders"},
	} {
		refused("archive: "+name, tc.says, stack.Busybox, "app", from(tc.path))
	}

	// What is asked for.
	for _, tc := range []struct{ key, value, says string }{
		{"restor-from", ref, "stasis.run/restor-from"},
		{"restore-from", "", "stasis.run/restore-from is empty"},
		{"restore-from.", ref, "container's name"},
		{"restore-from", "two words", "two words"},
		{"restart", "sometimes", "stasis.run/restart"},
		{"tcp", "perhaps", "stasis.run/tcp"},
		{"restore-from", "stasis.test/nothing:1", "no image of that name"},
		{"restore-from", stack.Busybox, "no checkpoint"},
		{"restore-from", "--help", "--help"},
	} {
		refused(tc.key+"="+tc.value, tc.says, stack.Busybox, "app", annotated(tc.key, tc.value))
	}
	refused("another container", "stasis.run/restore-from.CONTAINER", stack.Busybox, "other", from(ref))
	if p, err := try("another container, named", stack.Busybox, "other", annotated("restore-from.other", ref)); err != nil {
		t.Errorf("another container, named: %v", err)
	} else {
		p.Remove(c.ctx)
	}
	refused("another image", "builds on image "+stack.Busybox, stack.Python, "app", from(ref))
	refused("another image, archive", "builds on image", stack.Python, "app", from(file))

	// The node's configuration.
	c.configure("archive = []")
	refused("unknown key", "restore.archive", stack.Busybox, "app", from(ref))
	c.configure(`namespaces = "all"`)
	refused("wrong type", "node's configuration", stack.Busybox, "app", from(ref))
	c.configure()
	must(t, os.Chmod(c.NodeConfig(), 0o666))
	refused("writable by all", "mode 666", stack.Busybox, "app", from(ref))
	must(t, os.Remove(c.NodeConfig()))
	refused("no file", c.NodeConfig(), stack.Busybox, "app", from(ref))
	c.configure()

	// A pod that asks for nothing never hears of any of this.
	must(t, os.WriteFile(c.NodeConfig(), []byte("?"), 0o600))
	p := c.RunPod(c.ctx, "plain", stack.HandlerStasis)
	p.RunContainer(c.ctx, "app", stack.Busybox, countingPod)
	c.goesOn(p, "app")
	p.Remove(c.ctx)
	if strings.Contains(c.Logs(), podSecret) {
		t.Error("the container's secret is in the logs")
	}
	checkTidy(t, c.Stack)
}

// TestCRISpecDecides restores an archive whose spec asks for the host's files and
// for devices: nothing of it reaches the new container.
func TestCRISpecDecides(t *testing.T) {
	t.Parallel()
	c := newCluster(t, stack.Options{})
	source := c.RunPod(c.ctx, "source", stack.HandlerDropIn)
	id := source.RunContainer(c.ctx, "app", stack.Busybox, countingPod, c.kubelet(source, 0))
	c.goesOn(source, "app")
	file := c.archive(id, "good.tar")
	source.Remove(c.ctx)
	evil := filepath.Join(c.archives(), "evil.tar")
	rewriteTar(t, file, evil, map[string]func([]byte) []byte{"spec.dump": func(data []byte) []byte {
		spec := &specs.Spec{}
		must(t, json.Unmarshal(data, spec))
		spec.Annotations["cdi.k8s.io/evil"] = "vendor.com/device=evil"
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/evil", Type: "bind", Source: "/", Options: []string{"rbind", "rw"}})
		spec.Process.Capabilities.Bounding = append(spec.Process.Capabilities.Bounding, "CAP_SYS_ADMIN_EVIL")
		spec.Linux.Devices = append(spec.Linux.Devices, specs.LinuxDevice{Path: "/dev/evil", Type: "b", Major: 8})
		spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/evil"}}}
		data, err := json.Marshal(spec)
		must(t, err)
		return data
	}})
	p := c.RunPod(c.ctx, "new", stack.HandlerStasis, annotated("restore-from", evil))
	id = p.RunContainer(c.ctx, "app", stack.Busybox, countingPod, c.kubelet(p, 0))
	c.restored(p, "app", id)
	config, err := os.ReadFile(filepath.Join(p.Bundle(id), "config.json"))
	must(t, err)
	if text := strings.ReplaceAll(string(config), evil, ""); strings.Contains(strings.ToLower(text), "evil") {
		t.Errorf("of the checkpoint's spec there is something in the container's: %s", text)
	}
	if out := p.Exec(c.ctx, id, "sh", "-c", "ls -d /evil /dev/evil 2>/dev/null; true"); out != "" {
		t.Errorf("the container has %q", out)
	}
	p.Remove(c.ctx)
}

// rewriteTar copies a tar with other contents of some files, without those of which
// nothing is left, and more entries.
func rewriteTar(t *testing.T, from, to string, change map[string]func([]byte) []byte, more ...*tar.Header) {
	t.Helper()
	in, err := os.Open(from)
	must(t, err)
	defer in.Close()
	var out bytes.Buffer
	r, w := tar.NewReader(in), tar.NewWriter(&out)
	for {
		hdr, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		data, err := io.ReadAll(r)
		must(t, err)
		if do := change[hdr.Name]; do != nil {
			if data = do(data); data == nil {
				continue
			}
			hdr.Size = int64(len(data))
		}
		must(t, w.WriteHeader(hdr))
		_, err = w.Write(data)
		must(t, err)
	}
	for _, hdr := range more {
		must(t, w.WriteHeader(hdr))
	}
	must(t, w.Close())
	must(t, os.WriteFile(to, out.Bytes(), 0o600))
}

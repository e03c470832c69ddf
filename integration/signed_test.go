package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sign"
	"github.com/stasis-run/stasis/checkpoint/sum"
	"github.com/stasis-run/stasis/integration/stack"
)

// verified is what the tests look at of `stasis verify -o json`.
type verified struct {
	Trusted   bool
	Signers   []sign.Signer
	Unknown   []string `json:"unknown_keys"`
	Container *checkpoint.Container
	Host      string
	Spec      bool `json:"spec_signed"`
}

// verifies has a checkpoint verified, which has to be good.
func verifies(t *testing.T, s *stack.Stack, args ...string) (v verified) {
	t.Helper()
	must(t, json.Unmarshal([]byte(s.Stasis(append([]string{"verify", "-o", "json"}, args...)...)), &v))
	if !v.Trusted || v.Container == nil || v.Host == "" || len(v.Signers) == 0 {
		t.Errorf("verify %q: %+v", args, v)
	}
	return v
}

// refuses has a command fail, with an error that tells all of want.
func refuses(t *testing.T, err error, want ...string) {
	t.Helper()
	if err == nil {
		t.Error("it is not refused")
		return
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v; want %q in it", err, w)
		}
	}
}

// TestSignedFormats: whoever makes a checkpoint, and in whatever format it is and was
// before, it is signed, and what is signed can be told.
func TestSignedFormats(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "echo changed >/file; echo ready; exec sleep 1000"))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "ready")
	dir := t.TempDir()

	formats := map[string]string{
		"runnable": "stasis.test/cp:runnable", "index": "stasis.test/cp:index", "podman": "stasis.test/cp:podman", "archive": filepath.Join(dir, "cp.tar"),
	}
	for format, name := range formats {
		if format == "archive" {
			s.Stasis("checkpoint", "c", "--output", name, "--compress", "none")
		} else {
			s.Stasis("checkpoint", "c", name, "--format", format)
		}
		v := verifies(t, s, name)
		if !v.Signers[0].Own || !v.Spec || v.Container.BaseConfig == "" || v.Container.Namespace != s.Namespace || v.Container.ID != "c" {
			t.Errorf("%s: %+v, %+v", format, v, v.Container)
		}
		for other := range formats {
			to := "stasis.test/" + format + ":" + other
			if other == "archive" {
				to = filepath.Join(dir, format+"-"+other+".tar")
			}
			s.Stasis("convert", name, to, "--format", other, "--compress", "none")
			if got := verifies(t, s, to); !got.Spec || *got.Container != *v.Container {
				t.Errorf("%s made of %s: %+v, %+v", other, format, got, got.Container)
			}
		}
	}
	key := strings.TrimSpace(s.Stasis("key", "init"))
	ociLayout := filepath.Join(dir, "layout.tar")
	s.Stasis("export", formats["runnable"], ociLayout, "--format", "oci")
	s.Stasis("import", ociLayout, "stasis.test/imported:1")
	verifies(t, s, "stasis.test/imported:1")
	var list []struct {
		Ref      string
		SignedBy []string `json:"signed_by"`
		Trusted  bool     `json:"key_trusted"`
	}
	must(t, json.Unmarshal([]byte(s.Stasis("ls", "-o", "json")), &list))
	for _, l := range list {
		if len(l.SignedBy) != 1 || l.SignedBy[0] != key || !l.Trusted {
			t.Errorf("ls: %+v", l)
		}
	}
	if out := s.Stasis("inspect", formats["index"]); !strings.Contains(out, key[:16]+" (this node's)") {
		t.Errorf("inspect:\n%s", out)
	}
	// By ctr and by the Task service.
	s.Ctr("containers", "checkpoint", "--image", "--rw", "--task", "c", "stasis.test/ctr:1")
	if v := verifies(t, s, "stasis.test/ctr:1"); !v.Spec || v.Container.BaseConfig != "" {
		t.Errorf("of ctr: %+v, %+v", v, v.Container)
	}
	folder := filepath.Join(s.Dir, "folder")
	c.Checkpoint(ctx, folder, &options.CheckpointOptions{Exit: true})
	verifies(t, s, folder)

	// One that was altered is restored by nobody, even outside of pods.
	must(t, os.CopyFS(filepath.Join(s.Dir, "altered"), os.DirFS(folder)))
	must(t, alter("pages-1.img")(filepath.Join(s.Dir, "altered")))
	_, err := s.StasisErr("verify", filepath.Join(s.Dir, "altered"))
	refuses(t, err, "pages-1.img: altered")
	refuses(t, c.RestoreErr(ctx, filepath.Join(s.Dir, "altered")), "pages-1.img: altered")
	evil := filepath.Join(dir, "evil.tar")
	for name, what := range map[string]string{
		"checkpoint/core-1.img": "core-1.img", "checkpoint/stasis.json": "stasis.json", "checkpoint/stasis.sig.json": "stasis.sig.json",
	} {
		rewriteTar(t, formats["archive"], evil, map[string]func([]byte) []byte{name: flipped})
		_, err := s.StasisErr("verify", evil)
		refuses(t, err, what)
		s.Stasis("import", evil, "stasis.test/evil:"+what)
		_, err = s.StasisErr("restore", "stasis.test/evil:"+what, "evil")
		refuses(t, err, what)
	}
	// Without a signature it is checked as any, where root names it.
	must(t, remove(layout.Signature)(folder))
	_, err = s.StasisErr("verify", folder)
	refuses(t, err, "it is not signed", "stasis sign")
	c.Restore(ctx, folder)
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
}

// flipped changes a bit in the middle of something.
func flipped(data []byte) []byte {
	data[len(data)/2] ^= 1
	return data
}

// TestSignedInPod restores in pods what is signed by whom they trust, and nothing else.
func TestSignedInPod(t *testing.T) {
	t.Parallel()
	c := newCluster(t, stack.Options{})
	cri := func(args ...string) []string { return append([]string{"--namespace", stack.CRINamespace}, args...) }
	source := c.RunPod(c.ctx, "source", stack.HandlerDropIn)
	id := source.RunContainer(c.ctx, "app", stack.Busybox, countingPod, c.kubelet(source, 0))
	c.goesOn(source, "app")
	ref := c.checkpoint(id, "stasis.test/signed:cp")
	kubelet := c.archive(id, "kubelet.tar")
	c.Ctr("--namespace", stack.CRINamespace, "containers", "checkpoint", "--image", "--rw", "--task", id, "stasis.test/signed:ctr")
	source.Remove(c.ctx)
	ours := filepath.Join(c.archives(), "ours.tar")
	c.Stasis(cri("export", ref, ours, "--compress", "none")...)
	if v := verifies(t, c.Stack, ref, "--namespace", stack.CRINamespace); v.Container.Pod == nil || v.Container.Pod.Namespace != "default" ||
		v.Container.Pod.Name != "source" || v.Container.Name != "app" || !v.Spec {
		t.Errorf("verify: %+v, %+v", v, v.Container)
	}

	n := 0
	restores := func(what, image, from string, change ...func(*runtimeapi.PodSandboxConfig)) error {
		t.Helper()
		n++
		if from != "" {
			change = append(change, annotated("restore-from", from))
		}
		p := c.RunPod(c.ctx, "pod-"+itoa(int64(n)), stack.HandlerStasis, change...)
		defer p.Remove(c.ctx)
		id, err := p.RunContainerErr(c.ctx, "app", image, countingPod, c.kubelet(p, 0))
		if err == nil {
			c.restored(p, "app", id)
		} else {
			c.nothingFetched()
		}
		return err
	}
	all := func(check func(what string, err error)) {
		t.Helper()
		check("image", restores("image", ref, ""))
		for _, from := range []string{ref, "stasis.test/signed:ctr", ours, kubelet} {
			check(from, restores(from, stack.Busybox, from))
		}
	}
	good := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	all(good)

	// What was altered.
	evil := filepath.Join(c.archives(), "evil.tar")
	for _, config := range []string{"", `unsigned = "check"`} {
		c.configure(config)
		for name, says := range map[string]string{
			"checkpoint/core-1.img": "core-1.img: altered", "checkpoint/pages-1.img": "pages-1.img: altered",
			"checkpoint/stasis.json": "stasis.json", "checkpoint/stasis.sig.json": "stasis.sig.json",
		} {
			rewriteTar(t, ours, evil, map[string]func([]byte) []byte{name: flipped})
			refuses(t, restores(name, stack.Busybox, evil), says)
		}
	}
	// Whose it is, is what was signed: what comes with it may say anything.
	c.configure()
	staging := func(data []byte) []byte {
		return []byte(strings.ReplaceAll(string(data), `"namespace": "default"`, `"namespace": "staging"`))
	}
	rewriteTar(t, ours, evil, map[string]func([]byte) []byte{"config.dump": staging})
	refuses(t, restores("namespace", stack.Busybox, evil, inNamespace("staging")), `is of namespace "default"`)
	good("namespace", restores("namespace", stack.Busybox, evil))
	c.Stasis(cri("import", evil, "stasis.test/signed:evil")...)
	refuses(t, restores("namespace, image", "stasis.test/signed:evil", "", inNamespace("staging")), `is of namespace "default"`)

	// Without a signature, and by a key that is not trusted.
	unsigned := filepath.Join(c.archives(), "unsigned.tar")
	rewriteTar(t, ours, unsigned, map[string]func([]byte) []byte{"checkpoint/" + layout.Signature: func([]byte) []byte { return nil }})
	refuses(t, restores("unsigned", stack.Busybox, unsigned), "it is not signed", "stasis sign", "restore.unsigned")
	c.configure(`unsigned = "check"`)
	good("unsigned, checked", restores("unsigned", stack.Busybox, unsigned))
	c.configure()
	c.Stasis(cri("import", unsigned, "stasis.test/signed:unsigned")...)
	refuses(t, restores("unsigned, image", "stasis.test/signed:unsigned", ""), "it is not signed")
	c.Stasis(cri("sign", "stasis.test/signed:unsigned")...)
	good("signed later", restores("signed later", "stasis.test/signed:unsigned", ""))

	public := filepath.Join(c.Dir, "first.pub")
	first := strings.TrimSpace(c.Stasis("key", "init"))
	must(t, os.WriteFile(public, []byte(c.Stasis("key", "show")), 0o600))
	must(t, os.Rename(filepath.Join(c.ConfigDir(), "keys"), filepath.Join(c.ConfigDir(), "old")))
	all(func(what string, err error) {
		t.Helper()
		refuses(t, err, "signed by key "+first, "stasis key trust FILE")
	})
	second := strings.TrimSpace(c.Stasis("key", "init"))
	if first == second {
		t.Fatal("it is the same key")
	}
	refuses(t, restores("another key", ref, ""), "signed by key "+first)
	c.Stasis("key", "trust", public)
	all(good)
	if out := c.Stasis("key", "list"); !strings.Contains(out, first) || !strings.Contains(out, second) {
		t.Errorf("key list:\n%s", out)
	}
	// Both have signed, and one is enough.
	c.Stasis(cri("sign", ref)...)
	c.Stasis("key", "remove", first[:16])
	good("signed by both", restores("signed by both", ref, ""))
	refuses(t, restores("signed by the first", stack.Busybox, ours), "signed by key "+first)
	checkTidy(t, c.Stack)
}

// TestNotSigned: where no key can be made, a checkpoint is made all the same, and says
// that it is not signed; so is one with which the container ends.
func TestNotSigned(t *testing.T) {
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	must(t, os.WriteFile(s.ConfigDir(), nil, 0o600)) // where the folder should be
	for _, exit := range []string{"--exit", "--exit=false"} {
		c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sleep", "1000"))
		c.Start(ctx)
		cmd := s.StasisCommand("checkpoint", "c", "stasis.test/cp:1", exit)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		must(t, cmd.Run())
		if !strings.Contains(stderr.String(), "the checkpoint is not signed") {
			t.Errorf("%s: it says %q", exit, stderr.String())
		}
		if exit != "--exit" {
			must(t, c.Task.Kill(ctx, syscall.SIGKILL))
		}
		c.Wait(ctx)
		c.Delete(ctx)
	}
	must(t, os.Remove(s.ConfigDir()))
	_, err := s.StasisErr("verify", "stasis.test/cp:1")
	refuses(t, err, "it is not signed")
	s.Stasis("sign", "stasis.test/cp:1")
	verifies(t, s, "stasis.test/cp:1")
}

// TestEmbeddedIsRead: of a checkpoint in an image every file is read, also one of which
// the manifest says that it lies where it was made. A file system that comes as an image
// has the inodes and times that its maker gave it.
func TestEmbeddedIsRead(t *testing.T) {
	sh := startShim(t, stack.Options{})
	root := filepath.Join(sh.s.Dir, "tree")
	dir := filepath.Join(root, layout.EmbeddedImages)
	f, err := checkpoint.NewFolder(dir)
	must(t, err)
	must(t, os.CopyFS(f.Path(), os.DirFS("../checkpoint/testdata/runc-sleep")))
	must(t, os.WriteFile(filepath.Join(f.Path(), "pages-9.img"), make([]byte, 5<<20), 0o600))
	must(t, f.Commit(checkpoint.Manifest{}, false))
	must(t, os.WriteFile(filepath.Join(root, layout.EmbeddedInfo), []byte(`{"version":1}`), 0o600))
	// As if the file were another with the same inode and times.
	made, err := checkpoint.Open(sh.ctx, dir)
	must(t, err)
	m := *made.Manifest()
	for i := range m.Files {
		if m.Files[i].Name == "pages-9.img" {
			w := sum.NewWriter()
			_, _ = w.Write(append(make([]byte, 5<<20-1), 1))
			m.Files[i].Sum, m.Files[i].Chunks = w.Sum().Text, w.Sum().Chunks
		}
	}
	data, err := json.Marshal(m)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, layout.Manifest), data, 0o600))
	_, err = checkpoint.Open(sh.ctx, dir)
	must(t, err)
	r := sh.createRequest("c")
	r.Rootfs = []*types.Mount{{Type: "bind", Source: root, Options: []string{"rbind", "rw"}}}
	_, err = sh.Create(sh.ctx, r)
	refuses(t, err, "restore container c from its image", "pages-9.img: altered")
}

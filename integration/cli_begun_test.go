package integration

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/integration/stack"
)

// stasisLayer returns the last layer of a runnable image.
func stasisLayer(t *testing.T, s *stack.Stack, ref string) ocispec.Descriptor {
	t.Helper()
	record, err := s.Client().ImageService().Get(s.Ctx(), ref)
	must(t, err)
	data, err := content.ReadBlob(s.Ctx(), s.Client().ContentStore(), record.Target)
	must(t, err)
	var m ocispec.Manifest
	must(t, json.Unmarshal(data, &m))
	return m.Layers[len(m.Layers)-1]
}

// upload returns what the content store has of unfinished uploads: the largest file
// and the sum of their sizes in bytes.
func upload(t *testing.T, s *stack.Stack) (largest os.FileInfo, sum int64) {
	t.Helper()
	files, err := filepath.Glob(contentStore(s, "ingest", "*", "data"))
	must(t, err)
	for _, file := range files {
		info, err := os.Stat(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		must(t, err)
		sum += info.Size()
		if largest == nil || info.Size() > largest.Size() {
			largest = info
		}
	}
	return largest, sum
}

func contentStore(s *stack.Stack, path ...string) string {
	return filepath.Join(append([]string{s.Dir, "root", "io.containerd.content.v1.content"}, path...)...)
}

// TestCLIBegun has `stasis checkpoint` write the memory to containerd's store while
// the runtime has not ended yet, and looks at what comes of that: the image is the
// same as one that was written after, and when the command fails, nothing.
func TestCLIBegun(t *testing.T) {
	t.Parallel()
	const mib = 96
	s := stack.Start(t, stack.Options{})
	ctx := s.Ctx()
	f := s.Faults()
	// Go's runtime has a page of which CRIU does not write what is in it.
	c := s.NewContainer(ctx, "c", stack.Probe, stack.Args("/probe", "gap", "-mib", strconv.Itoa(mib)))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "ready")
	held := func(when stack.When, args ...string) (*exec.Cmd, *strings.Builder) {
		t.Helper()
		// It does not begin early where CRIU would wait for the disk, which others, or
		// this test, may have left much to do.
		unix.Sync()
		return heldCheckpoint(t, s, when, args...)
	}
	// Whole chunks are there already.
	begun := func() (largest os.FileInfo) {
		s.Poll(ctx, "the upload", func() bool {
			var sum int64
			largest, sum = upload(t, s)
			return sum > mib<<20/2
		})
		return largest
	}
	// taken checks that what was uploaded then has become the image's layer.
	taken := func(ref string, upload os.FileInfo) {
		t.Helper()
		blob, err := os.Stat(contentStore(s, "blobs", "sha256", stasisLayer(t, s, ref).Digest.Encoded()))
		must(t, err)
		if !os.SameFile(blob, upload) {
			t.Errorf("%s: the layer was written a second time", ref)
		}
	}
	same := func(ref string) {
		t.Helper()
		// Any other command writes it anew.
		again := ref + "-again"
		s.Stasis("convert", ref, again, "--compress", "none")
		s.Stasis("convert", again, again+"-zstd", "--compress", "zstd")
		got := stasisLayer(t, s, ref)
		if want := stasisLayer(t, s, again); got.MediaType == want.MediaType && got.Digest != want.Digest {
			t.Errorf("%s: %v, want %v", ref, got, want)
		}
		if want := stasisLayer(t, s, again+"-zstd"); got.MediaType == want.MediaType && got.Digest != want.Digest {
			t.Errorf("%s: %v, want %v", ref, got, want)
		}
		for _, name := range []string{ref, again, again + "-zstd"} {
			s.Stasis("rm", name)
		}
	}

	// back restores it under another name, and so compares all of it with its sums.
	back := func(ref string) {
		t.Helper()
		s.Stasis("restore", ref, "back")
		c := load(t, s, "back")
		runsOn(t, ctx, c)
		c.Kill(ctx, syscall.SIGKILL)
		c.Delete(ctx)
	}

	for _, compress := range []string{"none", "zstd"} {
		ref := "stasis.test/begun:" + compress
		cmd, out := held(stack.After, "c", ref, "--compress", compress)
		file := begun()
		f.Clear("checkpoint")
		if err := cmd.Wait(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		taken(ref, file)
		back(ref)
		same(ref)
		checkTidy(t, s)
	}

	// CRIU fails.
	f.KillCRIU("checkpoint", "Dumping mm (pid")
	if out, err := s.StasisErr("checkpoint", "c", "stasis.test/begun:none"); err == nil {
		t.Errorf("CRIU is killed, and stasis says %q", out)
	}
	f.Clear("checkpoint")
	runsOn(t, ctx, c)
	checkTidy(t, s)
	if _, n := upload(t, s); n != 0 {
		t.Errorf("%d bytes of an upload are left of a dump that failed", n)
	}

	// The command is killed: prune ends what it has left.
	cmd, _ := held(stack.After, "c", "stasis.test/begun:none")
	begun()
	must(t, cmd.Process.Signal(syscall.SIGKILL))
	_ = cmd.Wait()
	f.Clear("checkpoint")
	s.Stasis("prune")
	s.Poll(ctx, "containerd to remove the upload", func() bool { _, n := upload(t, s); return n == 0 })
	checkTidy(t, s)

	// containerd dies before anything is stored: the command ends without it.
	cmd, out := held(stack.Before, "c", "stasis.test/begun:none")
	s.Kill9()
	f.Clear("checkpoint")
	if err := cmd.Wait(); err == nil {
		t.Errorf("containerd has died, and stasis says %s", out)
	}
	s.Restart()
	c = load(t, s, "c")
	runsOn(t, ctx, c)
	s.Stasis("prune")
	checkTidy(t, s)

	// With --exit, and restored.
	cmd, out = held(stack.After, "c", "stasis.test/begun:exit", "--exit", "--compress", "none")
	file := begun()
	f.Clear("checkpoint")
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	taken("stasis.test/begun:exit", file)
	c.Wait(ctx)
	c.Delete(ctx)
	s.Stasis("restore", "stasis.test/begun:exit")
	c = load(t, s, "c")
	runsOn(t, ctx, c)
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
	same("stasis.test/begun:exit")

	// What is largest is not what could be foreseen: memory that is shared, and as
	// much in two processes.
	for id, program := range map[string]string{
		"shared": "import mmap, os, time; a = os.urandom(80 << 20); b = mmap.mmap(-1, 100 << 20); b.write(os.urandom(100 << 20)); print('ready', flush=True); time.sleep(1000)",
		"two":    "import os, time; a = os.urandom(80 << 20); b = os.fork() or bytearray(os.urandom(80 << 20)); print('ready', flush=True); time.sleep(1000)",
	} {
		c := s.NewContainer(ctx, id, stack.Python, stack.Args("python3", "-c", program))
		c.Start(ctx)
		c.Stdout.WaitFor(ctx, "ready")
		ref := "stasis.test/begun:" + id
		s.Stasis("checkpoint", id, ref)
		runsOn(t, ctx, c)
		back(ref)
		same(ref)
		checkTidy(t, s)
		c.Kill(ctx, syscall.SIGKILL)
		c.Delete(ctx)
	}
}

package checkpoint

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

const crashDir = "STASIS_TEST_COMMIT_IN"

// TestCommitForever is the writer that TestKilledWriter kills.
func TestCommitForever(t *testing.T) {
	dir := os.Getenv(crashDir)
	if dir == "" {
		t.Skip("only in a process of its own")
	}
	commitForever(dir)
}

// commitForever writes one checkpoint after the other to dir. Each of their
// files holds its number. It prints something after each.
func commitForever(dir string) {
	for n := 1; ; n++ {
		f, err := NewFolder(dir)
		if err == nil {
			// Sometimes there are more files, sometimes fewer.
			for i := range 5 + n%3 {
				name := filepath.Join(f.Path(), fmt.Sprintf("core-%d.img", i))
				err = errors.Join(err, os.WriteFile(name, []byte(strconv.Itoa(n)), 0o600))
			}
			err = errors.Join(err, os.WriteFile(filepath.Join(f.Path(), layout.Inventory), []byte(strconv.Itoa(n)), 0o600))
			if n%8 == 0 {
				err = errors.Join(err, os.WriteFile(filepath.Join(f.Path(), "pages-1.img"), make([]byte, recheckSize), 0o600))
			}
			err = errors.Join(err, f.Commit(Manifest{Container: Container{ID: strconv.Itoa(n)}}, n%8 == 1))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Print(".")
	}
}

// A writer that is killed at any moment leaves a whole checkpoint, or one that
// is known to be unfinished, and never hinders the next one.
func TestKilledWriter(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "c")
	whole, unfinished := 0, 0
	rounds := 40
	if testing.Short() {
		rounds = 10
	}
	for range rounds {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestCommitForever$")
		cmd.Env = append(os.Environ(), crashDir+"="+dir)
		cmd.Stderr = os.Stderr
		stdout, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		if _, err := stdout.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(rand.N(30 * time.Millisecond))
		must(t, cmd.Process.Kill())
		_ = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != -1 {
			t.Fatalf("the writer failed, exit code %d", code)
		}
		ckpt, err := Open(t.Context(), dir)
		switch {
		case err == nil:
			whole++
			data, err := os.ReadFile(filepath.Join(dir, "core-0.img"))
			if err != nil || string(data) != ckpt.Manifest().Container.ID {
				t.Fatalf("checkpoint %s holds %q, %v", ckpt.Manifest().Container.ID, data, err)
			}
		case errors.Is(err, errdefs.ErrFailedPrecondition):
			unfinished++
		default:
			t.Fatal(err)
		}
	}
	t.Logf("%d whole, %d unfinished", whole, unfinished)
	if whole == 0 {
		t.Error("no writer came to its end")
	}
}

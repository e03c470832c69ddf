package task

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// A restore that an annotation asks for begins with a copy of the checkpoint. The
// shim has no client of containerd, which would cost each pod some megabytes, so
// it runs the program `stasis` for that (capture.Fetched). Of the spec in the
// checkpoint nothing is used, nor even copied.

// fetchedDir is on the disk, in containerd's folder for what outlives the
// bundle, which itself is in memory mostly. containerd removes it with the bundle.
func (b bundle) fetchedDir() string { return filepath.Join(b.workDir(), "fetched") }

// maxFetched bounds what the command prints, in bytes.
const maxFetched = capture.MaxInfo + 1<<20

// fetch copies the checkpoint into the folder dir, which is made: from archive, or if that
// is nil, from the image called name.
func (c *container) fetch(ctx context.Context, dir, name string, archive *os.File) (*capture.Fetched, error) {
	program, err := stasisProgram()
	if err != nil {
		return nil, err
	}
	args := []string{"--address", c.service.cfg.Address, "--namespace", c.namespace, "stage", "--container", c.id}
	cmd := exec.CommandContext(ctx, program)
	if archive != nil {
		args = append(args, "--archive", "--", dir)
		cmd.ExtraFiles = []*os.File{capture.FetchedArchive - 3: archive}
	} else {
		args = append(args, "--", dir, name)
	}
	cmd.Args = append(cmd.Args, args...)
	stdout, stderr := &head{max: maxFetched}, &head{max: 64 << 10}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.WaitDelay = time.Second
	// It must not outlive the shim, after which the folder is removed.
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	exits, err := c.service.reaper.StartLocked(cmd)
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", program, err)
	}
	status, err := c.service.reaper.Wait(cmd, exits)
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("copying the checkpoint took longer than who asked for it waits: %w", context.Cause(ctx))
	case err != nil:
		return nil, fmt.Errorf("run %s: %w", program, err)
	case status != 0:
		said := strings.TrimPrefix(strings.TrimSpace(stderr.buf.String()), "stasis: ")
		if said == "" {
			said = fmt.Sprintf("%s ended with exit code %d", program, status)
		}
		return nil, fault.Unusable("%s", said)
	}
	got := &capture.Fetched{}
	if err := json.Unmarshal(stdout.buf.Bytes(), got); err != nil {
		return nil, fmt.Errorf("%s is not of this shim's version: %w", program, err)
	}
	return got, nil
}

// stasisProgram finds the command line: beside the shim, else in PATH.
func stasisProgram() (string, error) {
	const name = "stasis"
	if self, err := os.Executable(); err == nil {
		if path, err := exec.LookPath(filepath.Join(filepath.Dir(self), name)); err == nil {
			return path, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fault.Unusable("the program stasis, which reads checkpoints, is neither beside the shim nor in containerd's PATH: install it")
	}
	return path, nil
}

// head keeps the beginning of what is written to it.
type head struct {
	buf bytes.Buffer
	max int
}

func (h *head) Write(p []byte) (int, error) {
	h.buf.Write(p[:min(len(p), h.max-h.buf.Len())])
	return len(p), nil
}

package task

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
)

// A restore that an annotation asks for begins with a copy of the checkpoint. The
// shim has no client of containerd, which would cost each pod some megabytes, so
// it runs the program `stasis` for that (capture.Fetched). Of the spec in the
// checkpoint nothing is used, nor even copied.

// fetchedDir is on the disk, in containerd's folder for what outlives the
// bundle, which itself is in memory mostly. containerd removes it with the bundle.
func (b bundle) fetchedDir() string { return filepath.Join(b.workDir(), "fetched") }

// newFetched is a restore that an annotation asks for, or a cold start if that was
// done already. found is a checkpoint in the image, which is not to be seen.
func newFetched(ctx context.Context, c *container, found *embedded) (launcher, error) {
	marks := marks{own: c.ownMark(), pod: c.config.podMark()}
	again, err := marks.again(c.wish.restart)
	if err != nil {
		return nil, fmt.Errorf("restore container %s: %w", c.id, err)
	}
	if !again {
		log.G(ctx).WithField("container", c.id).Info("it was restored before, and now starts afresh")
		return coldStart{c}, nil
	}
	dir := c.bundle.fetchedDir()
	l, err := c.restoreFetched(ctx, dir)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("restore container %s from %s: %w", c.id, c.wish.from, err), os.RemoveAll(dir))
	}
	l.marks, l.temp = marks, dir
	if found != nil {
		l.folder = found.folder
	}
	if layer := filepath.Join(dir, capture.FetchedLayer); exists(layer) {
		l.layer = layer
	}
	return l, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// ownMark is the mark for a container whose image has no checkpoint.
func (c *container) ownMark() mark {
	if len(c.rootfs) == 1 {
		switch m := &c.rootfs[0]; m.Type {
		case "overlay":
			return mark(rootfs.MountOption(*m, "workdir"))
		case "bind":
			return mark(m.Source)
		}
	}
	return mark(c.bundle.rootfs())
}

func (c *container) restoreFetched(ctx context.Context, dir string) (*restore, error) {
	node, err := readNodeConfig(c.nodeConfig)
	if err != nil {
		return nil, err
	}
	var archive *os.File
	if filepath.IsAbs(c.wish.from) {
		if archive, err = node.openArchive(c.wish.from); err != nil {
			return nil, err
		}
		defer archive.Close()
	}
	got, err := c.fetch(ctx, dir, archive)
	if err != nil {
		return nil, err
	}
	l, err := newRestore(ctx, c, filepath.Join(dir, capture.FetchedImages), source{info: got.Info, copied: true})
	if err != nil {
		return nil, err
	}
	name, was := c.config.Annotations[criContainerName], got.Info.ContainerName
	if _, signed := l.image.Signer(); signed {
		was = cmp.Or(l.image.Manifest().Container.Name, was)
	}
	if !c.wish.named && name != "" && was != "" && was != name {
		return nil, invalid("the checkpoint is of a container %q, and this one is %q: say which container of the pod is to be restored: annotation %s.CONTAINER",
			was, name, annotationRestoreFrom)
	}
	if got.OtherBase != "" {
		return nil, fault.Unusable("%s", got.OtherBase)
	}
	return l, l.checkUserNamespace()
}

// maxFetched bounds what the command prints, in bytes.
const maxFetched = capture.MaxInfo + 1<<20

// fetch copies the checkpoint into the folder dir, which is made.
func (c *container) fetch(ctx context.Context, dir string, archive *os.File) (*capture.Fetched, error) {
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
		args = append(args, "--", dir, c.wish.from)
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

// oneLine makes one line of an error of a pod's container: it becomes one of the
// pod's events.
func (c *container) oneLine(err error) error {
	if _, inPod := c.config.podNamespace(); err == nil || !inPod || !strings.Contains(err.Error(), "\n") {
		return err
	}
	var lines []string
	for line := range strings.Lines(err.Error()) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return &reworded{err, strings.Join(lines, "; ")}
}

// reworded is an error with other words.
type reworded struct {
	error
	text string
}

func (r *reworded) Error() string { return r.text }
func (r *reworded) Unwrap() error { return r.error }

package task

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sync"

	runc "github.com/containerd/go-runc"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/trust"
	"github.com/stasis-run/stasis/process"
)

// launcher is how a container's init comes to be. Nothing else knows which way
// a container took: both end in proc.adopt.
type launcher interface {
	// create is a task's Create; the rootfs is mounted.
	create(ctx context.Context, init *proc) error
	// start is a task's Start. If it fails, it can be tried again.
	start(ctx context.Context, init *proc) error
	// discard releases what a start that will never come would have used.
	discard()
}

// coldStart creates init in Create, waiting, and lets it run in Start.
type coldStart struct{ c *container }

func (l coldStart) create(ctx context.Context, init *proc) error {
	pio, err := init.openIO(ctx, [3]bool{})
	if err != nil {
		return err
	}
	child, err := l.c.service.reaper.Launch(func() (int, error) {
		return l.c.runtime.Create(ctx, &runc.CreateOpts{
			IO:            pio.Pipes(),
			ConsoleSocket: pio.ConsoleSocket(),
			NoPivot:       l.c.options.NoPivotRoot,
			NoNewKeyring:  l.c.options.NoNewKeyring,
		})
	})
	if err != nil {
		pio.Close()
		return err
	}
	if err := pio.Attach(ctx); err != nil {
		pio.Close()
		l.c.removeFromRuntime(ctx)
		return err
	}
	init.adopt(child, pio)
	return nil
}

func (l coldStart) start(ctx context.Context, init *proc) error {
	return l.c.runtime.Start(ctx)
}

func (l coldStart) discard() {}

// restore brings init back from a checkpoint in Start. Create does no more than
// its part of the rootfs: containerd applies the checkpoint's changes to it
// between the two.
type restore struct {
	c     *container
	image *checkpoint.Image
	spec  *specs.Spec
	temp  string // containerd's copy of the checkpoint, ours to remove; or ""

	embedded *embedded // where image is, if it is in the container's image
}

func (l *restore) create(ctx context.Context, init *proc) error { return nil }

func (l *restore) start(ctx context.Context, init *proc) error {
	c := l.c
	// Only now is the root filesystem what it is going to be.
	if err := trust.CheckMounts(ctx, l.image, l.spec, c.bundle.rootOf(l.spec)); err != nil {
		return fmt.Errorf("restore container %s: %w", c.id, err)
	}
	pio, err := init.openIO(ctx, l.image.Pipes())
	if err != nil {
		return err
	}
	workDir := c.options.CriuWorkPath
	if workDir == "" {
		workDir = c.bundle.workDir()
	}
	if l.embedded != nil {
		l.embedded.begin(c)
	}
	child, err := c.service.reaper.Launch(func() (int, error) {
		return checkpoint.Restore(ctx, checkpoint.RestoreRequest{
			Runtime: c.runtime,
			ID:      c.id,
			Image:   l.image,
			Bundle:  string(c.bundle),
			Spec:    l.spec,
			WorkDir: workDir,
			NoPivot: c.options.NoPivotRoot,
			// The link is right even if the file was replaced.
			Self:          fmt.Sprintf("/proc/%d/exe", os.Getpid()),
			IO:            pio.Pipes(),
			ConsoleSocket: pio.ConsoleSocket(),
		})
	})
	if err != nil {
		if l.embedded != nil {
			l.embedded.failed()
		}
		pio.Close()
		return err
	}
	if err := pio.Attach(ctx); err != nil {
		_ = child.Signal(unix.SIGKILL)
		pio.Close()
		c.removeFromRuntime(ctx)
		return err
	}
	init.adopt(child, pio)
	l.setOOMScore(child.Pid)
	if l.embedded != nil {
		l.embedded.restored(c)
	}
	l.discard()
	return nil
}

// setOOMScore gives the processes the spec's score. Not to be able to lower it is
// no reason to end them: then they are the first to go when memory is short.
func (l *restore) setOOMScore(init int) {
	if l.spec.Process == nil || l.spec.Process.OOMScoreAdj == nil {
		return
	}
	cg, err := process.LoadCgroup(init)
	if err == nil {
		err = cg.SetOOMScore(init, *l.spec.Process.OOMScoreAdj)
	}
	if err != nil {
		log.L.WithError(err).WithField("container", l.c.id).Warn("give the restored processes the OOM score of the spec")
	}
}

func (l *restore) discard() {
	temp := l.temp
	if temp == "" {
		return
	}
	l.temp = ""
	// A gigabyte takes a while to unlink, and nobody waits for it.
	l.c.service.background.Go(func() {
		if err := os.RemoveAll(temp); err != nil {
			log.L.WithError(err).Warn("remove containerd's temporary copy of a checkpoint")
		}
		_ = os.Remove(l.c.bundle.path(restoreFrom))
	})
}

// removeFromRuntime undoes a create or restore whose process is of no use.
func (c *container) removeFromRuntime(ctx context.Context) {
	if err := c.runtime.Delete(context.WithoutCancel(ctx)); err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Warn("delete a container that was not started")
	}
}

// restoreFrom is the bundle's note of a temporary checkpoint folder.
const restoreFrom = "restore-from"

var tempCheckpoint = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^ctrd-checkpoint[0-9]+$`) })

// isTemporary tells whether containerd has made the folder for this one restore:
// a copy of a checkpoint out of its content store, which it never removes
// (containerd issue 10166). Its name is os.MkdirTemp's, in the folder that
// containerd uses; the shim has containerd's environment.
func isTemporary(path string) bool {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		dir = os.TempDir()
	}
	return filepath.Dir(path) == filepath.Clean(dir) && tempCheckpoint().MatchString(filepath.Base(path))
}

// newLauncher decides how a container starts, and for a restore opens the
// checkpoint, before anything is done. A restore that was asked for never
// becomes a cold start.
func newLauncher(ctx context.Context, c *container, path string) (launcher, error) {
	found, err := c.findEmbedded()
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", c.id, err)
	}
	if path == "" {
		path = c.options.CriuImagePath
	}
	if path == "" {
		return embeddedOrCold(ctx, c, found)
	}
	if !filepath.IsAbs(path) {
		return nil, invalid("checkpoint path %q is not absolute", path)
	}
	temp := ""
	if path != c.options.CriuImagePath && isTemporary(path) {
		temp = path
	}
	return newRestore(ctx, c, path, temp, nil)
}

// embeddedOrCold is a restore of the checkpoint in the container's image, if there
// is one that was not used yet.
func embeddedOrCold(ctx context.Context, c *container, found *embedded) (launcher, error) {
	if found == nil {
		return coldStart{c}, nil
	}
	used, err := found.used()
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", c.id, err)
	}
	if used {
		return coldStart{c}, nil
	}
	return newRestore(ctx, c, found.dir, "", found)
}

// newRestore opens the checkpoint in the folder path, and refuses one that asks for
// more than the container may have.
func newRestore(ctx context.Context, c *container, path, temp string, from *embedded) (launcher, error) {
	img, err := checkpoint.Open(ctx, path)
	var spec *specs.Spec
	if err == nil {
		spec, err = c.bundle.spec()
	}
	if err == nil {
		err = trust.Check(ctx, img, spec)
	}
	if err != nil {
		if temp != "" {
			_ = os.RemoveAll(temp)
		}
		return nil, fmt.Errorf("restore container %s: %w", c.id, err)
	}
	if temp != "" {
		if err := os.WriteFile(c.bundle.path(restoreFrom), []byte(temp), 0o600); err != nil {
			return nil, err
		}
	}
	return &restore{c: c, image: img, spec: spec, temp: temp, embedded: from}, nil
}

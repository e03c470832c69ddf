package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/api/events"
	runc "github.com/containerd/go-runc"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
	"github.com/stasis-run/stasis/checkpoint/sign"
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
	init.before = process.ProgramOf(child.Pid)
	init.adopt(child, pio)
	return nil
}

func (l coldStart) start(ctx context.Context, init *proc) error {
	return l.c.runtime.Start(ctx)
}

func (l coldStart) discard() {}

// restore brings init back from a checkpoint in Start. Create does no more than
// its part of the rootfs: containerd, or restore itself, applies the checkpoint's
// changes to it before.
type restore struct {
	c     *container
	image *checkpoint.Image
	spec  *specs.Spec
	temp  string // a copy of the checkpoint, ours to remove; or ""

	marks  marks
	layer  string // a tar to apply to the rootfs, or ""
	folder string // what is to be removed when the processes are back, or ""
}

func (l *restore) create(ctx context.Context, init *proc) error {
	if l.layer == "" {
		return nil
	}
	// Of a rootfs that is only mounted now, nobody could know before.
	if again, err := l.marks.again(l.c.wish.restart); err != nil {
		return err
	} else if !again {
		return fault.Unusable("it was restored before, and its files have changed since; make a new container")
	}
	if err := l.marks.own.set(fateBegun); err != nil {
		return err
	}
	f, err := os.Open(l.layer)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := rootfs.Apply(ctx, l.c.bundle.rootfs(), f); err != nil {
		return fmt.Errorf("bring back the files that the container had changed: %w", err)
	}
	return nil
}

func (l *restore) start(ctx context.Context, init *proc) error {
	c := l.c
	// Only now is the root filesystem what it is going to be.
	if err := trust.CheckMounts(ctx, l.image, l.spec, c.bundle.rootOf(l.spec)); err != nil {
		return fmt.Errorf("restore container %s: %w", c.id, err)
	}
	if _, inPod := c.config.podNamespace(); inPod && l.spec.Annotations[checkpoint.AnnotationTCP] == "" {
		// Another pod has another address, and the peers have given up.
		l.spec.Annotations[checkpoint.AnnotationTCP] = "close"
	}
	pio, err := init.openIO(ctx, l.image.Pipes())
	if err != nil {
		return err
	}
	workDir := c.options.CriuWorkPath
	if workDir == "" {
		workDir = c.bundle.workDir()
	}
	if err := l.marks.begin(); err != nil {
		pio.Close()
		return err
	}
	outOfMemory := c.watchRestore()
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
			Check:         func(ctx context.Context, pids []int) error { return trust.CheckProcesses(ctx, l.spec, pids) },
			IO:            pio.Pipes(),
			ConsoleSocket: pio.ConsoleSocket(),
		})
	})
	if killed := outOfMemory(); killed && err != nil {
		err = fmt.Errorf("out of memory: what is restored does not fit into %s; raise it: %w", memoryLimit(l.spec), err)
	}
	if err != nil {
		l.marks.failed(c.id)
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
	l.marks.restored(c.id)
	if l.folder != "" {
		if err := os.RemoveAll(l.folder); err != nil {
			log.L.WithError(err).WithField("container", c.id).Warn("remove the checkpoint from the container's files")
		}
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
	cg := l.c.loadedCgroup()
	if cg == nil {
		return // as was said when it could not be loaded
	}
	if err := cg.SetOOMScore(init, *l.spec.Process.OOMScoreAdj); err != nil {
		log.L.WithError(err).WithField("container", l.c.id).Warn("give the restored processes the OOM score of the spec")
	}
}

// watchRestore publishes when the kernel kills a process of a restore for lack of
// memory. The function that it returns ends that, and tells whether there was one.
func (c *container) watchRestore() (stop func() bool) {
	if c.config.Linux == nil {
		return func() bool { return false }
	}
	var killed atomic.Bool
	end := process.WatchOOMOf(c.config.Linux.CgroupsPath, func() {
		killed.Store(true)
		c.service.publish(&events.TaskOOM{ContainerID: c.id})
	})
	return func() bool {
		end()
		return killed.Load()
	}
}

// memoryLimit says what a container's limit is.
func memoryLimit(spec *specs.Spec) string {
	if spec.Linux != nil && spec.Linux.Resources != nil && spec.Linux.Resources.Memory != nil {
		if limit := spec.Linux.Resources.Memory.Limit; limit != nil && *limit > 0 {
			return fmt.Sprintf("the container's memory limit of %d bytes", *limit)
		}
	}
	return "the memory limit above the container's own"
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
			log.L.WithError(err).Warn("remove a temporary copy of a checkpoint")
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
	if path == "" && c.wish.from != "" {
		return newFetched(ctx, c, found)
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
	l, err := restoreFolder(ctx, c, path, temp)
	if err != nil {
		if temp != "" {
			_ = os.RemoveAll(temp)
		}
		return nil, fmt.Errorf("restore container %s: %w", c.id, err)
	}
	return l, nil
}

// restoreFolder is a restore from a folder that the request or the options name.
// temp is that folder if containerd has made it for this restore, else empty.
func restoreFolder(ctx context.Context, c *container, path, temp string) (*restore, error) {
	// Unless it is signed, it does not tell whose its checkpoint is.
	l, err := newRestore(ctx, c, path, source{})
	if err != nil || temp == "" {
		return l, err
	}
	l.temp = temp
	return l, os.WriteFile(c.bundle.path(restoreFrom), []byte(temp), 0o600)
}

// embeddedOrCold is a restore of the checkpoint in the container's image, if there
// is one that was not used yet.
func embeddedOrCold(ctx context.Context, c *container, found *embedded) (launcher, error) {
	if found == nil {
		return coldStart{c}, nil
	}
	marks := marks{own: found.own, pod: c.config.podMark()}
	again, err := marks.again(c.wish.restart)
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", c.id, err)
	}
	if !again {
		return coldStart{c}, nil
	}
	l, err := restoreEmbedded(ctx, c, found)
	if err != nil {
		return nil, fmt.Errorf("restore container %s from its image: %w", c.id, err)
	}
	l.marks, l.folder = marks, found.folder
	return l, nil
}

func restoreEmbedded(ctx context.Context, c *container, found *embedded) (*restore, error) {
	info, err := found.readInfo()
	if err != nil {
		return nil, err
	}
	l, err := newRestore(ctx, c, found.dir, source{info: info, copied: true})
	if err != nil {
		return nil, err
	}
	return l, l.checkUserNamespace()
}

// checkUserNamespace refuses what CRIU and the files cannot follow: each pod with a
// user namespace is given other IDs of the host than the last.
func (l *restore) checkUserNamespace() error {
	if _, inPod := l.c.config.podNamespace(); inPod && l.spec.Linux != nil && len(l.spec.Linux.UIDMappings) > 0 {
		return fault.Unusable("its pod has a user namespace (hostUsers: false), where nothing can be restored yet; leave that out")
	}
	return nil
}

// source is where a checkpoint is from.
type source struct {
	// info is what came with it, which anybody may have written.
	info capture.Info
	// copied: its files are none that lie where they were written.
	copied bool
}

// newRestore opens the checkpoint in the folder path, and refuses one that the node's
// configuration does not let this container have, and one that asks for more than the
// container may have.
func newRestore(ctx context.Context, c *container, path string, from source) (*restore, error) {
	img, err := c.openCheckpoint(ctx, path, from)
	if err != nil {
		return nil, err
	}
	spec, err := c.bundle.spec()
	if err != nil {
		return nil, err
	}
	if err := trust.Check(ctx, img, spec); err != nil {
		return nil, err
	}
	return &restore{c: c, image: img, spec: spec}, nil
}

// openCheckpoint finds out who has made a checkpoint. For a pod that has to be known,
// and whose it is: it holds another one's memory. Outside of pods, root has named it.
func (c *container) openCheckpoint(ctx context.Context, path string, from source) (*checkpoint.Image, error) {
	keys, err := sign.DefaultDir().Trust()
	if err != nil {
		return nil, err
	}
	o := checkpoint.OpenOptions{Trust: keys, Reread: from.copied}
	namespace, inPod := c.config.podNamespace()
	if !inPod {
		return checkpoint.OpenWith(ctx, path, o)
	}
	node, err := readNodeConfig(c.nodeConfig)
	if err != nil {
		return nil, err
	}
	o.Require = node.Restore.Unsigned == unsignedRefuse
	o.Allow = func(img *checkpoint.Image) error { return node.allowNamespace(namespaceOf(img, from.info), namespace) }
	img, err := checkpoint.OpenWith(ctx, path, o)
	if errors.Is(err, checkpoint.ErrNotSigned) {
		err = fmt.Errorf("%w (restore.unsigned = %q in the node's configuration, %s, would do without)", err, unsignedCheck, node.path)
	}
	return img, err
}

// namespaceOf is the namespace of the pod that a checkpoint is of, "" if it is of none:
// what was signed says so; else, what came with it.
func namespaceOf(img *checkpoint.Image, info capture.Info) string {
	if _, signed := img.Signer(); signed {
		if pod := img.Manifest().Container.Pod; pod != nil {
			return pod.Namespace
		}
		return ""
	}
	if info.Pod != nil {
		return info.Pod.Namespace
	}
	return ""
}

package task

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/log"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/criu"
	"github.com/stasis-run/stasis/checkpoint/sign"
	"github.com/stasis-run/stasis/process"
)

// dump is what either service asks of a checkpoint.
type dump struct {
	dir         string
	workDir     string // empty: the bundle's
	options     checkpoint.Options
	dumpOptions criu.DumpOptions
	preDumps    int
	exit        bool   // the container ends with it
	durable     bool   // the checkpoint has to survive a power cut
	leaveSum    bool   // as in criu.DumpRequest
	parent      string // the checkpoint to build on, or ""
	track       bool   // another may build on this one
	baseConfig  string
	while       func(context.Context) error
	memoryFile  func(criu.MemoryFile) // as in criu.DumpRequest
}

// dumpOf is what containerd's options ask for.
func dumpOf(dir string, opts *options.CheckpointOptions) (dump, error) {
	o, err := checkpointOptions(opts)
	parent := opts.ParentPath
	if parent != "" && !filepath.IsAbs(parent) {
		parent = filepath.Join(dir, parent) // as runc does; it refuses absolute ones
	}
	return dump{
		dir:     dir,
		workDir: opts.WorkPath,
		options: o,
		exit:    opts.Exit,
		// The only copy of a container that is gone, in a folder that is
		// not containerd's temporary one.
		durable: opts.Exit && opts.ImagePath != "",
		parent:  parent,
		// To track costs the container a page fault at the next write to each page. A
		// temporary folder cannot be named later.
		track: !opts.Exit && (opts.ImagePath != "" || parent != ""),
	}, err
}

// checkpoint dumps the container into a folder. It runs on, or stays paused,
// unless it is to end; then it has ended when this returns. The caller excludes
// other calls.
func (c *container) checkpoint(ctx context.Context, d dump) (*criu.DumpResult, error) {
	p := c.init
	c.mu.Lock()
	err := p.check(opCheckpoint)
	paused, pid, child, cg := p.state == Paused, p.pid(), p.child, c.cgroup
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if !paused {
		c.waitExec(ctx)
	}
	if d.workDir == "" {
		// Not below dir: containerd removes that after a failure, and the
		// log is what explains it.
		d.workDir = c.bundle.dumpDir()
	}
	if _, inPod := c.config.podNamespace(); inPod && !d.options.OpenTCP {
		// It comes back at another address, where no connection can go on; and a
		// probe's may come at any moment, which is no reason to fail.
		d.dumpOptions.TCPClose = true
	}
	// Before it is frozen. A checkpoint that is not signed can be signed later, by who
	// trusts this node; one that was not made, of a container that is about to end
	// maybe, is lost. So that is no reason to fail.
	key, unsigned := sign.DefaultDir().Key()
	if unsigned != nil {
		log.G(ctx).WithError(unsigned).WithField("container", c.id).Warn("a checkpoint is not signed: no pod restores it before `stasis sign`")
	}
	parent, err := c.openParent(ctx, d, child)
	if err != nil {
		return nil, err
	}
	if parent != nil {
		defer parent.Close()
	}
	track := d.track && c.service.softDirty()
	// Also with a dump that fails or does not track: it may have reset the kernel's
	// notes of some processes, or CRIU's configuration on this host may say that it does.
	c.tracked = tracked{}
	result, err := criu.Dump(ctx, criu.DumpRequest{
		Key:         key,
		Runtime:     c.runtime,
		Cgroup:      cg,
		InitPid:     pid,
		Bundle:      string(c.bundle),
		Self:        self(),
		Dir:         d.dir,
		WorkDir:     d.workDir,
		Options:     d.options,
		DumpOptions: d.dumpOptions,
		PreDumps:    d.preDumps,
		Exit:        d.exit,
		Paused:      paused,
		Durable:     d.durable,
		LeaveSum:    d.leaveSum,
		Parent:      parent,
		Track:       track,
		While:       d.while,
		MemoryFile:  d.memoryFile,
		Container: checkpoint.Container{
			ID:         c.id,
			Namespace:  c.namespace,
			SpecDigest: c.specDigest,
			Name:       c.config.Annotations[criContainerName],
			Pod:        c.config.pod(),
			BaseConfig: d.baseConfig,
		},
		TerminalIO: c.config.hasTerminal(),
	})
	if err != nil {
		return nil, err
	}
	if track {
		c.tracked = tracked{child, result.ManifestDigest}
	}
	if unsigned != nil && !d.leaveSum {
		result.Unsigned = unsigned.Error()
	}
	c.service.publish(&events.TaskCheckpointed{ContainerID: c.id, Checkpoint: d.dir})
	if d.exit {
		select {
		case <-p.exited:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return result, nil
}

// execTimeout bounds waitExec: an init may execute the runtime's own program.
const execTimeout = 10 * time.Second

// waitExec waits until init executes the container's program. The OCI runtime's start
// returns before: CRIU cannot dump the runtime's own process, which has files of the
// host's, and frozen it would not get any further.
func (c *container) waitExec(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, execTimeout)
	defer cancel()
	c.mu.Lock()
	pid := c.init.pid()
	c.mu.Unlock()
	process.WaitExec(ctx, pid, c.init.before)
}

// criFolder is where containerd's CRI is collecting an archive of the container for
// the kubelet (2.4, container_checkpoint_linux.go), or "". It asks for CRIU's log and
// figures to be put there only where the runtime is called io.containerd.runc.v2;
// another's archive would be without. The pod's resolv.conf tells where CRI keeps
// its files.
func (c *container) criFolder() string {
	if _, inPod := c.config.podNamespace(); !inPod {
		return ""
	}
	for _, m := range c.config.Mounts {
		root, name := filepath.Split(filepath.Dir(filepath.Dir(m.Source)))
		if name != "sandboxes" || filepath.Base(root) != "io.containerd.grpc.v1.cri" ||
			filepath.Base(m.Source) != "resolv.conf" || filepath.Base(filepath.Dir(m.Source)) != c.config.Annotations[criSandboxID] {
			continue
		}
		dir := filepath.Join(root, "containers", c.id, "ctrd-checkpoint")
		if info, err := os.Lstat(dir); err == nil && info.IsDir() {
			return dir
		}
	}
	return ""
}

package task

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/rootfs"
)

// RestorePlan is how a container's init comes back from a checkpoint: all that was
// decided and found out about it. It is made once, in Create. Service.create resolves
// where the checkpoint is, if there is one (container.resolve); then newRestorePlan does
// the rest:
//
//	authorize  whose checkpoints this container may have, by the node's keys and
//	           configuration, which are read once (container.authorize)
//	open       the checkpoint, copied here first if an annotation names it
//	verify     that it is as it was made, and asks for nothing that the spec does
//	           not grant
//
// container.restore executes it in Start. A plan that cannot be made leaves nothing
// behind. What it cannot know is looked at when it is there: the record of a root
// filesystem that is mounted after it, the mounts when containerd has applied the
// checkpoint's changes, and the restored processes.
//
// A plan does not change once it is made, so a start that failed before a process ran can
// be tried again.
//
// The container owns its plan. It closes it when there will be no other start: after a
// restore that succeeded, after a Create that failed, and in Delete.
type RestorePlan struct {
	id         string // the container's
	bundle     bundle
	checkpoint *checkpoint.Checkpoint
	pipes      [3]bool // which of init's streams were pipes; see checkpoint.Checkpoint
	// spec is what the container is given. It is config.json's, but for what a pod's
	// container has in its place.
	spec    *specs.Spec
	workDir string // where CRIU leaves its log
	noPivot bool

	record restoreRecord
	policy restartPolicy // by which the record was judged
	// layer is a tar with the files that the container had changed, which Create
	// applies to the mounted root filesystem, or "" if containerd does.
	layer string
	// embedded is a folder in the container's root filesystem that holds the
	// checkpoint, which the container must not see, or "". It is removed when the
	// processes are back.
	embedded string

	// copy is a copy of the checkpoint for this restore only, or "". Close removes
	// it, once, in the background.
	copy       string
	background *sync.WaitGroup
	closed     sync.Once
}

// newRestorePlan makes the plan for a restore from src. It returns nil for a container
// that was restored before and now starts afresh.
func newRestorePlan(ctx context.Context, c *container, src *source) (_ *RestorePlan, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("restore container %s%s: %w", c.id, src, err)
		}
	}()
	if again, err := src.record.again(c.request.restart); err != nil || !again {
		if err == nil {
			log.G(ctx).WithField("container", c.id).Info("it was restored before, and now starts afresh")
		}
		return nil, err
	}
	if src.copy != "" {
		note := c.bundle.path(restoreFrom)
		defer func() {
			if err != nil {
				err = errors.Join(err, os.RemoveAll(src.copy))
				_ = os.Remove(note)
			}
		}()
		if src.kind == fromFolder {
			// For Cleanup, should this shim not live to close the plan.
			if err := os.WriteFile(note, []byte(src.copy), 0o600); err != nil {
				return nil, err
			}
		}
	}
	auth, err := c.authorize(src)
	if err != nil {
		return nil, err
	}
	defer auth.close()
	found, err := src.locate(ctx, c, auth.archive)
	if err != nil {
		return nil, err
	}
	ckpt, err := checkpoint.OpenWith(ctx, found.dir, auth.openOptions(src, found))
	if err != nil {
		return nil, auth.explain(err)
	}
	spec, err := c.bundle.spec()
	if err != nil {
		return nil, err
	}
	if err := c.service.policy.Check(ctx, ckpt, spec); err != nil {
		return nil, err
	}
	if err := src.check(c, ckpt, spec, found); err != nil {
		return nil, err
	}
	if _, inPod := c.config.podNamespace(); inPod && spec.Annotations[checkpoint.AnnotationTCP] == "" {
		// Another pod has another address, and the peers have given up.
		spec.Annotations[checkpoint.AnnotationTCP] = "close"
	}
	return &RestorePlan{
		id:         c.id,
		bundle:     c.bundle,
		checkpoint: ckpt,
		pipes:      ckpt.Pipes(),
		spec:       spec,
		workDir:    c.bundle.restoreDir(c.options),
		noPivot:    c.options.NoPivotRoot,
		record:     src.record,
		policy:     c.request.restart,
		layer:      found.layer,
		embedded:   src.folder,
		copy:       src.copy,
		background: &c.service.background,
	}, nil
}

// check refuses, of a checkpoint that is open by now, what depends on its source: another
// container's, one on another base image, or one for a pod with a user namespace.
func (src *source) check(c *container, ckpt *checkpoint.Checkpoint, spec *specs.Spec, found located) error {
	if src.kind == fromAnnotation {
		name, was := c.config.Annotations[criContainerName], found.info.ContainerName
		if _, signed := ckpt.Signer(); signed {
			was = cmp.Or(ckpt.Manifest().Container.Name, was)
		}
		if !c.request.named && name != "" && was != "" && was != name {
			return invalid("the checkpoint is of a container %q, and this one is %q: say which container of the pod is to be restored: annotation %s.CONTAINER",
				was, name, annotationRestoreFrom)
		}
		if found.otherBase != "" {
			return fault.Unusable("%s", found.otherBase)
		}
	}
	if src.kind == fromFolder {
		return nil // root has named it
	}
	return checkUserNamespace(c.config, spec)
}

// checkUserNamespace refuses what CRIU and the files cannot follow: each pod with a
// user namespace is given other IDs of the host than the last.
func checkUserNamespace(config *config, spec *specs.Spec) error {
	if _, inPod := config.podNamespace(); inPod && spec.Linux != nil && len(spec.Linux.UIDMappings) > 0 {
		return fault.Unusable("its pod has a user namespace (hostUsers: false), where nothing can be restored yet; leave that out")
	}
	return nil
}

// applyLayer brings back the files that the container had changed, into its root
// filesystem, which is mounted.
func (p *RestorePlan) applyLayer(ctx context.Context) error {
	if p.layer == "" {
		return nil
	}
	// Of a rootfs that is only mounted now, nobody could know before.
	if again, err := p.record.again(p.policy); err != nil {
		return err
	} else if !again {
		return fault.Unusable("it was restored before, and its files have changed since; make a new container")
	}
	if err := p.record.own.set(restoreBegun); err != nil {
		return err
	}
	f, err := os.Open(p.layer)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := rootfs.Apply(ctx, p.bundle.rootfs(), f); err != nil {
		return fmt.Errorf("bring back the files that the container had changed: %w", err)
	}
	return nil
}

// Close removes the plan's copy of the checkpoint, in the background: a gigabyte takes
// a while to unlink. It may be called more than once.
func (p *RestorePlan) Close() {
	if p.copy == "" {
		return
	}
	p.closed.Do(func() {
		p.background.Go(func() {
			if err := os.RemoveAll(p.copy); err != nil {
				log.L.WithError(err).WithField("container", p.id).Warn("remove a temporary copy of a checkpoint")
			}
			_ = os.Remove(p.bundle.path(restoreFrom))
		})
	})
}

// located is a checkpoint that is in a folder of this host, not opened yet.
type located struct {
	dir string // with CRIU's images
	// info is what came with it, which anybody may have written.
	info      capture.Info
	layer     string // as in RestorePlan
	otherBase string // as in capture.Fetched
}

// locate finds the checkpoint's folder. One that an annotation names is copied from
// containerd, or from the archive, which is open.
func (src *source) locate(ctx context.Context, c *container, archive *os.File) (located, error) {
	switch src.kind {
	case fromImage:
		info, err := readEmbeddedInfo(src.info)
		return located{dir: src.path, info: info}, err
	case fromAnnotation:
		got, err := c.fetch(ctx, src.copy, src.path, archive)
		if err != nil {
			return located{}, err
		}
		l := located{dir: filepath.Join(src.copy, layout.Images), info: got.Info, otherBase: got.OtherBase}
		if layer := filepath.Join(src.copy, layout.Layer); exists(layer) {
			l.layer = layer
		}
		return l, nil
	}
	return located{dir: src.path}, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

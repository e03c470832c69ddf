package task

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"golang.org/x/sync/semaphore"

	"github.com/stasis-run/stasis/process"
)

// Create makes a container, cold or from a checkpoint; it does not run yet.
func (s *Service) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	ctx, cancel := detach(ctx)
	defer cancel()
	c, err := s.create(ctx, r)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return &taskapi.CreateTaskResponse{Pid: uint32(c.init.pid())}, nil
}

func (s *Service) create(ctx context.Context, r *taskapi.CreateTaskRequest) (_ *container, err error) {
	c, err := s.newContainer(r)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	_, exists := s.containers[r.ID]
	if !exists {
		s.containers[r.ID] = nil
		s.ending = false
	}
	s.mu.Unlock()
	if exists {
		return nil, fmt.Errorf("container %s: %w", r.ID, errdefs.ErrAlreadyExists)
	}
	defer func() { err = c.oneLine(err) }()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if err != nil {
			delete(s.containers, r.ID)
			// containerd does not ask again for a creation that it gave up.
			if s.ending && len(s.containers) == 0 {
				s.cfg.Shutdown()
			}
		} else {
			s.containers[r.ID] = c
			s.ending = false
		}
	}()
	found, mounts, err := findEmbedded(c.rootfs)
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", c.id, err)
	}
	c.rootfs = mounts
	src, err := c.resolve(r.Checkpoint, found)
	if err != nil {
		return nil, err
	}
	// A restore that is refused leaves the root filesystem as it was: it is mounted after
	// the plan is made, or only to look for a checkpoint, and unmounted again.
	mounted := false
	mountRootfs := func() error {
		mounted = true
		if err := c.bundle.writeOptions(c.options); err != nil {
			return err
		}
		return c.mountRootfs()
	}
	defer func() {
		if err != nil && c.plan != nil {
			c.plan.Close()
		}
		if err != nil && mounted {
			_ = c.bundle.unmount()
		}
	}()
	if src == nil && seenWhenMounted(c.rootfs) {
		if err := mountRootfs(); err != nil {
			return nil, err
		}
		if isEmbedded(c.bundle.rootfs()) {
			if src, err = c.resolve("", inFolder(c.bundle.rootfs())); err != nil {
				return nil, err
			}
		}
	}
	if src != nil {
		if c.plan, err = newRestorePlan(ctx, c, src); err != nil {
			return nil, err
		}
	}
	if !mounted {
		if err := mountRootfs(); err != nil {
			return nil, err
		}
	}
	// Held until the creation is published: an init that dies at once must
	// not be heard of before.
	c.init.starting.Lock()
	defer c.init.starting.Unlock()
	if c.plan == nil {
		err = c.createCold(ctx)
	} else {
		err = c.plan.applyLayer(ctx)
	}
	if err != nil {
		// The caller's fault has a class of its own. What bundle.config did
		// not look at is only looked at now.
		if _, serr := c.bundle.spec(); serr != nil {
			err = serr
		}
		return nil, fmt.Errorf("create container %s: %w", c.id, err)
	}
	c.mu.Lock()
	pid := c.init.pid()
	c.mu.Unlock()
	s.publish(&events.TaskCreate{
		ContainerID: r.ID,
		Bundle:      r.Bundle,
		Rootfs:      r.Rootfs,
		IO:          &events.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
		Checkpoint:  r.Checkpoint,
		Pid:         uint32(pid),
	})
	return c, nil
}

// newContainer checks a Create request and makes a container of it, without any
// effect yet.
func (s *Service) newContainer(r *taskapi.CreateTaskRequest) (*container, error) {
	if err := identifiers.Validate(r.ID); err != nil {
		return nil, invalid("container id: %v", err)
	}
	opts, nodeConfig, err := decodeOptions(r.Options)
	if err != nil {
		return nil, err
	}
	if !filepath.IsAbs(r.Bundle) {
		return nil, invalid("bundle %q is not an absolute path", r.Bundle)
	}
	if st, err := os.Stat(r.Bundle); err != nil || !st.IsDir() {
		return nil, invalid("bundle %q is not a folder", r.Bundle)
	}
	c := &container{
		service:    s,
		id:         r.ID,
		namespace:  s.cfg.Namespace,
		bundle:     bundle(r.Bundle),
		options:    opts,
		nodeConfig: nodeConfig,
		ops:        semaphore.NewWeighted(allOps),
		execs:      map[string]*proc{},
	}
	if c.config, c.specDigest, err = c.bundle.config(); err != nil {
		return nil, err
	}
	if c.request, err = c.config.restoreRequest(); err != nil {
		return nil, fmt.Errorf("container %s: %w", c.id, err)
	}
	c.runtime = s.newRuntime(runtimeConfig(opts), c.namespace, string(c.bundle), c.id)
	c.init = newProc(c, "", process.Stdio{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal})
	for _, m := range r.Rootfs {
		c.rootfs = append(c.rootfs, mount.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
	}
	c.alive, c.died = context.WithCancel(context.Background())
	return c, nil
}

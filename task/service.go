package task

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	runc "github.com/containerd/go-runc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/api"
	"github.com/stasis-run/stasis/checkpoint/criu"
	"github.com/stasis-run/stasis/process"
)

// Config is what a Service needs of the shim around it.
type Config struct {
	Namespace string
	// Address is containerd's gRPC socket.
	Address string
	// Publish queues an event for containerd. It does not block, and keeps
	// the order.
	Publish func(topic string, event any)
	// Shutdown ends the shim. It does not block.
	Shutdown func()
}

// Service is containerd's Task service for the containers of one shim.
type Service struct {
	cfg    Config
	reaper *process.Reaper
	// newRuntime is process.NewRuntime and policy trustPolicy, but in tests.
	newRuntime func(cfg process.RuntimeConfig, namespace, bundle, id string) process.Runtime
	policy     checks
	// softDirty tells whether the kernel tracks which pages are written to.
	softDirty func() bool
	// background is what goes on after an answer, and ends before the shim.
	background sync.WaitGroup

	mu         sync.Mutex
	containers map[string]*container // nil for one that is being created
	ending     bool                  // to shut down with the last container
}

var _ taskapi.TTRPCTaskService = (*Service)(nil)

// NewService returns a service without containers. It collects all children of
// this process from now on, those of go-runc included.
func NewService(cfg Config) *Service {
	s := newService(cfg, process.NewReaper())
	runc.Monitor = s.reaper
	return s
}

func newService(cfg Config, reaper *process.Reaper) *Service {
	return &Service{
		cfg:        cfg,
		reaper:     reaper,
		newRuntime: process.NewRuntime,
		policy:     policyChecks{},
		softDirty: sync.OnceValue(func() bool {
			works, err := criu.SoftDirty()
			return works && err == nil
		}),
		containers: map[string]*container{},
	}
}

// Register adds the service to server, under the names of both versions of it:
// containerd.task.v3.Task has the methods and messages of containerd.task.v2.Task
// to the last field. (Package api/runtime/task/v3 would bring in gRPC.)
func (s *Service) Register(server *ttrpc.Server) {
	desc := &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"State":      method(s.State),
		"Create":     method(s.Create),
		"Start":      method(s.Start),
		"Delete":     method(s.Delete),
		"Pids":       method(s.Pids),
		"Pause":      method(s.Pause),
		"Resume":     method(s.Resume),
		"Checkpoint": method(s.Checkpoint),
		"Kill":       method(s.Kill),
		"Exec":       method(s.Exec),
		"ResizePty":  method(s.ResizePty),
		"CloseIO":    method(s.CloseIO),
		"Update":     method(s.Update),
		"Wait":       method(s.Wait),
		"Stats":      method(s.Stats),
		"Connect":    method(s.Connect),
		"Shutdown":   method(s.Shutdown),
	}}
	server.RegisterService("containerd.task.v2.Task", desc)
	server.RegisterService("containerd.task.v3.Task", desc)
	api.RegisterCheckpointsService(server, checkpoints{s})
}

// method is a call as ttrpc wants it. What it returns becomes a status of the
// matching code.
func method[Req, Resp any](call func(context.Context, *Req) (*Resp, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		req := new(Req)
		if err := unmarshal(req); err != nil {
			return nil, err
		}
		resp, err := call(ctx, req)
		if err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		return resp, nil
	}
}

// Close waits for what goes on in the background.
func (s *Service) Close() { s.background.Wait() }

func (s *Service) publish(event any) { s.cfg.Publish(topic(event), event) }

// find returns a container by its ID.
func (s *Service) find(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.containers[id]
	if c == nil {
		return nil, fmt.Errorf("container %s not created: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// isCreating tells whether a container is being created.
func (s *Service) isCreating(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.containers[id]
	return ok && c == nil
}

// findProc returns a container, and its init or the named exec.
func (s *Service) findProc(id, execID string) (*container, *proc, error) {
	c, err := s.find(id)
	if err != nil {
		return nil, nil, err
	}
	p, err := c.find(execID)
	return c, p, err
}

// done is the answer of a call that returns nothing.
func done(err error) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, err
}

// Start lets a created process run, or restores it.
func (s *Service) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	c, p, err := s.findProc(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	var pid int
	if p == c.init {
		pid, err = c.start(ctx)
	} else {
		pid, err = c.startExec(ctx, p)
	}
	if err != nil {
		return nil, err
	}
	return &taskapi.StartResponse{Pid: uint32(pid)}, nil
}

// Delete forgets a process that does not run.
func (s *Service) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	c, p, err := s.findProc(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	var exit process.Exit
	if p == c.init {
		exit, err = s.delete(ctx, c)
	} else {
		exit, err = c.deleteExec(ctx, p)
	}
	if err != nil {
		return nil, err
	}
	return &taskapi.DeleteResponse{
		Pid:        uint32(exit.Pid),
		ExitStatus: uint32(exit.Status),
		ExitedAt:   timestamppb.New(exit.At),
	}, nil
}

func (s *Service) delete(ctx context.Context, c *container) (process.Exit, error) {
	exit, err := c.delete(ctx)
	if err != nil {
		return exit, err
	}
	s.publish(&events.TaskDelete{
		ContainerID: c.id,
		Pid:         uint32(exit.Pid),
		ExitStatus:  uint32(exit.Status),
		ExitedAt:    timestamppb.New(exit.At),
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, c.id)
	if s.ending && len(s.containers) == 0 {
		s.cfg.Shutdown()
	}
	return exit, nil
}

// Exec notes another process for the container; Start starts it.
func (s *Service) Exec(ctx context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	c, err := s.find(r.ID)
	if err != nil {
		return done(err)
	}
	if err := identifiers.Validate(r.ExecID); err != nil {
		return done(invalid("exec id: %v", err))
	}
	if err := c.addExec(r); err != nil {
		return done(err)
	}
	s.publish(&events.TaskExecAdded{ContainerID: c.id, ExecID: r.ExecID})
	return done(nil)
}

// ResizePty sets the size of a process's terminal.
func (s *Service) ResizePty(ctx context.Context, r *taskapi.ResizePtyRequest) (*emptypb.Empty, error) {
	c, p, err := s.findProc(r.ID, r.ExecID)
	if err != nil {
		return done(err)
	}
	c.mu.Lock()
	pio := p.io
	if p != c.init {
		err = p.check(opResize)
	}
	c.mu.Unlock()
	if err != nil || pio == nil {
		return done(err)
	}
	return done(pio.Resize(uint16(r.Width), uint16(r.Height)))
}

// CloseIO ends a process's input.
func (s *Service) CloseIO(ctx context.Context, r *taskapi.CloseIORequest) (*emptypb.Empty, error) {
	c, p, err := s.findProc(r.ID, r.ExecID)
	if err != nil {
		return done(err)
	}
	c.mu.Lock()
	pio := p.io
	c.mu.Unlock()
	if pio == nil {
		return done(nil)
	}
	return done(pio.CloseStdin())
}

// State tells how a process is.
func (s *Service) State(ctx context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	c, p, err := s.findProc(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	return c.stateOf(p), nil
}

// Pause freezes a container.
func (s *Service) Pause(ctx context.Context, r *taskapi.PauseRequest) (*emptypb.Empty, error) {
	c, err := s.find(r.ID)
	if err != nil {
		return done(err)
	}
	return done(c.pause(ctx))
}

// Resume thaws a container.
func (s *Service) Resume(ctx context.Context, r *taskapi.ResumeRequest) (*emptypb.Empty, error) {
	c, err := s.find(r.ID)
	if err != nil {
		return done(err)
	}
	return done(c.resume(ctx))
}

// Kill signals a process, or all of a container's.
func (s *Service) Kill(ctx context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	_, p, err := s.findProc(r.ID, r.ExecID)
	if err != nil {
		return done(err)
	}
	return done(p.kill(ctx, unix.Signal(r.Signal), r.All))
}

// Pids lists the processes of a container, those that exec started with their
// exec IDs. It asks the kernel, not the runtime, so it answers at any time.
//
// That there is none is an error. A containerd that starts takes a container
// that is not found, or has no processes, for the remains of a failed Create,
// and deletes it (core/runtime/v2/shim_load.go): one that exited meanwhile, is
// yet to be restored or is just being created. One that is being deleted it may
// as well.
func (s *Service) Pids(ctx context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	none := fmt.Errorf("container %s has no process: %w", r.ID, errdefs.ErrFailedPrecondition)
	c, err := s.find(r.ID)
	if err != nil {
		if s.isCreating(r.ID) {
			err = none
		}
		return nil, err
	}
	c.mu.Lock()
	if c.deleting {
		c.mu.Unlock()
		return &taskapi.PidsResponse{}, nil
	}
	cg := c.cgroup
	execs := map[uint32]string{}
	for id, p := range c.execs {
		if p.state != Stopped {
			execs[uint32(p.pid())] = id
		}
	}
	c.mu.Unlock()
	resp := &taskapi.PidsResponse{}
	if cg == nil {
		return nil, none
	}
	pids, err := cg.Pids()
	if err != nil {
		return nil, fmt.Errorf("list the processes of container %s: %w", c.id, err)
	}
	if len(pids) == 0 {
		return nil, none
	}
	for _, pid := range pids {
		info := &tasktypes.ProcessInfo{Pid: pid}
		if execID, ok := execs[pid]; ok {
			details, err := typeurl.MarshalAnyToProto(&options.ProcessDetails{ExecID: execID})
			if err != nil {
				return nil, err
			}
			info.Info = details
		}
		resp.Processes = append(resp.Processes, info)
	}
	return resp, nil
}

// Checkpoint dumps a container into a folder.
func (s *Service) Checkpoint(ctx context.Context, r *taskapi.CheckpointTaskRequest) (*emptypb.Empty, error) {
	c, err := s.find(r.ID)
	if err != nil {
		return done(err)
	}
	opts, err := decodeCheckpointOptions(r.Options)
	if err != nil {
		return done(err)
	}
	// containerd 1.7 knows the option of runc's shim only, and gives a temporary
	// folder.
	dir := opts.ImagePath
	if dir == "" {
		dir = r.Path
	}
	if !filepath.IsAbs(dir) {
		return done(invalid("checkpoint path %q is not absolute", dir))
	}
	if opts.WorkPath != "" && !filepath.IsAbs(opts.WorkPath) {
		return done(invalid("options: work_path %q is not absolute", opts.WorkPath))
	}
	d, err := dumpOf(dir, opts)
	if err != nil {
		return done(err)
	}
	ctx, release, err := c.exclusive(ctx)
	if err != nil {
		return done(err)
	}
	defer release()
	if _, err := c.checkpoint(ctx, d); err != nil {
		return done(err)
	}
	if cri := c.criFolder(); cri != "" && opts.WorkPath == "" {
		if err := copyLogs(cri, c.bundle.dumpDir()); err != nil {
			log.G(ctx).WithError(err).WithField("container", c.id).Warn("the kubelet's archive is without CRIU's log and figures")
		}
	}
	if r.Path != "" && r.Path != dir {
		// containerd makes content of its folder, and of an empty one only
		// once.
		return done(checkpoint.CopyManifest(r.Path, dir))
	}
	return done(nil)
}

// Update changes a container's resource limits.
func (s *Service) Update(ctx context.Context, r *taskapi.UpdateTaskRequest) (*emptypb.Empty, error) {
	c, err := s.find(r.ID)
	if err != nil {
		return done(err)
	}
	resources := &specs.LinuxResources{}
	if err := json.Unmarshal(r.Resources.GetValue(), resources); err != nil {
		return done(invalid("resources: %v", err))
	}
	return done(c.update(ctx, resources))
}

// Wait returns when a process has ended.
func (s *Service) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	c, p, err := s.findProc(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.exited:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return &taskapi.WaitResponse{
		ExitStatus: uint32(p.exit.Status),
		ExitedAt:   timestamppb.New(p.exit.At),
	}, nil
}

// Stats are the figures of a container's cgroup.
func (s *Service) Stats(ctx context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	c, err := s.find(r.ID)
	if err != nil {
		return nil, err
	}
	cg := c.loadedCgroup()
	if cg == nil {
		return nil, fmt.Errorf("container %s: cgroup does not exist: %w", c.id, errdefs.ErrNotFound)
	}
	stats, err := cg.Stats()
	if err != nil {
		return nil, fmt.Errorf("stats of container %s: %w", c.id, err)
	}
	data, err := typeurl.MarshalAnyToProto(stats)
	if err != nil {
		return nil, err
	}
	return &taskapi.StatsResponse{Stats: data}, nil
}

// Connect tells the pids of the shim and of a container's init.
func (s *Service) Connect(ctx context.Context, r *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	resp := &taskapi.ConnectResponse{ShimPid: uint32(os.Getpid())}
	if c, err := s.find(r.ID); err == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		resp.TaskPid = uint32(c.init.pid())
	}
	return resp, nil
}

// Shutdown ends the shim, unless it has containers. If all of them are being
// deleted it ends with the last: a containerd that has lost patience with a
// Delete does not ask again.
func (s *Service) Shutdown(ctx context.Context, r *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ending = true
	for _, c := range s.containers {
		// One that is being made (nil) may fail, and then was the last one.
		s.ending = s.ending && (c == nil || c.isDeleting())
	}
	if len(s.containers) == 0 {
		s.cfg.Shutdown()
	}
	return done(nil)
}

package shim

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// helperEnv makes the test binary be the shim: start spawns os.Executable, so
// the daemon is the test binary too.
const helperEnv = "STASIS_SHIM_TEST_HELPER"

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) != "" {
		os.Exit(Main(Build{Version: "v1.2.3", Commit: "abc", Date: "today"}, fakeRuntime()))
	}
	os.Exit(m.Run())
}

// fakeService knows only what the shim itself is for.
type fakeService struct{ cfg Config }

func (s fakeService) Register(srv *ttrpc.Server) {
	srv.RegisterService("containerd.task.v2.Task", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"Connect": func(ctx context.Context, unmarshal func(any) error) (any, error) {
			var r taskapi.ConnectRequest
			if err := unmarshal(&r); err != nil {
				return nil, err
			}
			return &taskapi.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: s.cfg.Namespace}, nil
		},
		"Shutdown": func(ctx context.Context, unmarshal func(any) error) (any, error) {
			s.cfg.Shutdown()
			s.cfg.Shutdown()
			return &emptypb.Empty{}, nil
		},
		// Not of the task API's meaning: blocks until its context ends.
		"Wait": func(ctx context.Context, unmarshal func(any) error) (any, error) {
			s.cfg.Publish("/test/wait-begun", timestamppb.New(time.Unix(0, 0)))
			<-ctx.Done()
			s.cfg.Publish("/test/wait-ended", timestamppb.New(time.Unix(0, 0)))
			return nil, ctx.Err()
		},
	}})
}

func (s fakeService) Close() { s.cfg.Publish("/test/close", timestamppb.New(time.Unix(1, 0))) }

func fakeRuntime() Runtime {
	return Runtime{
		NewService: func(cfg Config) (Service, error) { return fakeService{cfg}, nil },
		Cleanup: func(_ context.Context, namespace, bundle, id string) (*taskapi.DeleteResponse, error) {
			if filepath.Base(bundle) != id {
				return nil, errors.New("bundle " + bundle + " is not of " + id)
			}
			return &taskapi.DeleteResponse{Pid: 7, ExitStatus: 137}, nil
		},
		DecodeOptions: func(a *anypb.Any) (*options.Options, error) {
			opts := &options.Options{}
			return opts, proto.Unmarshal(a.GetValue(), opts)
		},
	}
}

// node is what containerd has on disk, with its own socket folder.
type node struct {
	t         *testing.T
	dir       string
	socketDir string
	address   string // containerd's
}

func newNode(t *testing.T) *node {
	t.Helper()
	// Short: unix socket paths are limited.
	dir, err := os.MkdirTemp("/tmp", "shim")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, dir: dir, socketDir: filepath.Join(dir, "s"), address: filepath.Join(dir, "c.sock")}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return n
}

// bundle makes the bundle of a container, with a log that this test reads.
func (n *node) bundle(id, config string) string {
	n.t.Helper()
	dir := filepath.Join(n.dir, "ns", id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
		n.t.Fatal(err)
	}
	makeLog(n.t, filepath.Join(dir, "log"))
	return dir
}

// command is the shim's binary as containerd calls it.
func (n *node) command(bundle, id, action string, stdin []byte, env ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], "-namespace", "ns", "-address", n.address, "-publish-binary", "containerd", "-id", id)
	if action == "delete" {
		cmd.Args = append(cmd.Args, "-bundle", bundle)
	}
	cmd.Args = append(cmd.Args, action)
	cmd.Dir = bundle
	cmd.Stdin = strings.NewReader(string(stdin))
	cmd.Env = append(os.Environ(), helperEnv+"=1", "TTRPC_ADDRESS="+n.address+".ttrpc")
	cmd.Env = append(cmd.Env, env...)
	return cmd
}

// shimPid returns the pid of the shim at the address, and kills it at the end
// of the test.
func shimPid(t *testing.T, address string) int {
	t.Helper()
	c := dial(t, address)
	defer c.Close()
	r, err := taskapi.NewTTRPCTaskClient(c).Connect(t.Context(), &taskapi.ConnectRequest{})
	if err != nil {
		t.Fatalf("connect to shim: %v", err)
	}
	if r.Version != "ns" {
		t.Errorf("shim has namespace %q", r.Version)
	}
	pid := int(r.ShimPid)
	t.Cleanup(func() { killWait(t, pid) })
	return pid
}

func killWait(t *testing.T, pid int) {
	if p, err := os.FindProcess(pid); err == nil {
		p.Kill()
	}
	waitGone(t, pid)
}

// waitGone waits until the process ended. Its parent need not have reaped it.
func waitGone(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil {
			return
		}
		if i := strings.LastIndexByte(string(data), ')'); strings.HasPrefix(string(data[i+1:]), " Z") {
			return
		}
	}
	t.Errorf("process %d is still there", pid)
}

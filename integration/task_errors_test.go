package integration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/stasis-run/stasis/integration/stack"
)

// deviations are all the calls in the wrong state or with wrong arguments, of
// those below, that Stasis answers with another code than upstream's shim.
var deviations = map[string]struct{ upstream, stasis, reason string }{
	"created/create":         {"Unknown", "AlreadyExists", "upstream's mounts a second rootfs, then lets runc refuse the name"},
	"running/exec bad spec":  {"Unknown", "InvalidArgument", "the caller's fault has a class"},
	"running/update bad":     {"Unknown", "InvalidArgument", "the caller's fault has a class"},
	"running/exec path":      {"OK", "InvalidArgument", "an exec's id becomes part of a file's name"},
	"running/exec empty":     {"OK", "InvalidArgument", "an exec that no call can name would never be deleted"},
	"failed exec/state":      {"OK CREATED 0", "OK STOPPED 255", "upstream's waits return, but for a process that is only created"},
	"unknown exec/close io":  {"Unknown", "NotFound", "of all calls, upstream's CloseIO forgets the code"},
	"deleted exec/close io":  {"Unknown", "NotFound", "of all calls, upstream's CloseIO forgets the code"},
	"running exec/start":     {"its shim dies", "Unknown", "upstream's counts the exit of a process twice that was started twice"},
	"paused exec/start":      {"its shim dies", "Unknown", "upstream's counts the exit of a process twice that was started twice"},
	"running/checkpoint bad": {"Unknown", "InvalidArgument", "the caller's fault has a class"},
	"stopped/pids":           {"OK", "FailedPrecondition", "a containerd that starts deletes a task that has no pids, and its exit code is lost"},
}

// fatal are calls whose consequence is that upstream's shim panics (makechan:
// size out of range): it then counts the exec's exit twice.
var fatal = []string{"running exec/start", "paused exec/start"}

// call is a call of the Task service that changes nothing, at least in the
// states that it is not left out in.
type call struct {
	name string
	do   func(ctx context.Context, sh *taskShim, id string) error
	// legal are the states in which it would do something, or wait.
	legal []string
}

// calls are made in all states.
var calls = []call{
	{"state", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.State(ctx, &taskapi.StateRequest{ID: id})
		return err
	}, nil},
	{"create", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.Create(ctx, sh.createRequest(id))
		return err
	}, []string{"not created", "running", "paused", "stopped", "deleted"}},
	{"start", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.Start(ctx, &taskapi.StartRequest{ID: id})
		return err
	}, []string{"created"}},
	{"delete", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.Delete(ctx, &taskapi.DeleteRequest{ID: id})
		return err
	}, []string{"created", "stopped"}},
	{"pids", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.Pids(ctx, &taskapi.PidsRequest{ID: id})
		return err
	}, nil},
	{"pause", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.Pause(ctx, &taskapi.PauseRequest{ID: id})
		return err
	}, []string{"running"}},
	{"resume", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.Resume(ctx, &taskapi.ResumeRequest{ID: id})
		return err
	}, []string{"paused"}},
	{"checkpoint", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.Checkpoint(ctx, &taskapi.CheckpointTaskRequest{ID: id, Path: filepath.Join(sh.s.Dir, "checkpoint")})
		return err
	}, []string{"running", "paused"}},
	{"kill", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.Kill(ctx, &taskapi.KillRequest{ID: id, Signal: uint32(unix.SIGKILL)})
		return err
	}, []string{"created", "running", "paused"}},
	{"kill all", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.Kill(ctx, &taskapi.KillRequest{ID: id, Signal: uint32(unix.SIGKILL), All: true})
		return err
	}, []string{"created", "running", "paused"}},
	{"exec", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.Exec(ctx, &taskapi.ExecProcessRequest{ID: id, ExecID: "e", Spec: sh.process("true")})
		return err
	}, []string{"created", "running"}},
	{"resize", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: id, Width: 80, Height: 25})
		return err
	}, nil},
	{"close io", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.CloseIO(ctx, &taskapi.CloseIORequest{ID: id, Stdin: true})
		return err
	}, nil},
	{"update", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.Update(ctx, &taskapi.UpdateTaskRequest{ID: id, Resources: &anypb.Any{Value: []byte(`{"pids":{"limit":100}}`)}})
		return err
	}, nil},
	{"wait", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.Wait(ctx, &taskapi.WaitRequest{ID: id})
		return err
	}, []string{"created", "running", "paused"}},
	{"stats", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.Stats(ctx, &taskapi.StatsRequest{ID: id})
		return err
	}, []string{"stopped"}}, // upstream's reads files that are just being removed
	{"connect", func(ctx context.Context, sh *taskShim, id string) error {
		_, err := sh.Connect(ctx, &taskapi.ConnectRequest{ID: id})
		return err
	}, nil},
}

// execCalls are those that can name an exec.
func execCalls(execID string) []call {
	return []call{
		{"state", func(ctx context.Context, sh *taskShim, id string) error {
			_, err := sh.State(ctx, &taskapi.StateRequest{ID: id, ExecID: execID})
			return err
		}, nil},
		{"start", func(ctx context.Context, sh *taskShim, id string) error {
			_, err := sh.Start(ctx, &taskapi.StartRequest{ID: id, ExecID: execID})
			return err
		}, []string{"created exec"}},
		{"delete", func(ctx context.Context, sh *taskShim, id string) error {
			_, err := sh.Delete(ctx, &taskapi.DeleteRequest{ID: id, ExecID: execID})
			return err
		}, []string{"created exec", "stopped exec", "failed exec"}},
		{"kill", func(ctx context.Context, sh *taskShim, id string) error {
			_, err := sh.Kill(ctx, &taskapi.KillRequest{ID: id, ExecID: execID, Signal: uint32(unix.SIGKILL)})
			return err
		}, []string{"running exec", "paused exec", "failed exec"}},
		{"resize", func(ctx context.Context, sh *taskShim, id string) error {
			_, err := sh.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: id, ExecID: execID, Width: 80, Height: 25})
			return err
		}, []string{"failed exec"}},
		{"close io", func(ctx context.Context, sh *taskShim, id string) error {
			_, err := sh.CloseIO(ctx, &taskapi.CloseIORequest{ID: id, ExecID: execID, Stdin: true})
			return err
		}, nil},
		{"wait", func(ctx context.Context, sh *taskShim, id string) error {
			_, err := sh.Wait(ctx, &taskapi.WaitRequest{ID: id, ExecID: execID})
			return err
		}, []string{"created exec", "running exec", "paused exec"}},
	}
}

// TestTaskErrors makes calls in the wrong state, and calls that are wrong in any,
// and compares the classes of the errors with those of upstream's shim.
func TestTaskErrors(t *testing.T) {
	upstream := errorCodes(t, startShim(t, stack.Options{Upstream: true}), true)
	stasis := errorCodes(t, startShim(t, stack.Options{}), false)
	for name, want := range upstream {
		got := stasis[name]
		if d, ok := deviations[name]; !ok {
			if got != want {
				t.Errorf("%s: %s, upstream's: %s", name, got, want)
			}
		} else if want != d.upstream || got != d.stasis {
			t.Errorf("%s: %s, upstream's: %s; by the table %s and %s (%s)", name, got, want, d.stasis, d.upstream, d.reason)
		}
	}
	for name := range deviations {
		if _, ok := upstream[name]; !ok {
			t.Errorf("%s: in the table, but not tried", name)
		}
	}
}

// errorCodes takes containers and execs through their states, makes all calls
// in each, and returns the codes by state and call.
func errorCodes(t *testing.T, sh *taskShim, upstream bool) map[string]string {
	t.Helper()
	ctx, found := sh.ctx, map[string]string{}
	probe := func(state string, calls []call, id string) {
		for _, c := range calls {
			key := state + "/" + c.name
			switch {
			case slices.Contains(c.legal, state):
			case upstream && slices.Contains(fatal, key):
				found[key] = "its shim dies"
			default:
				found[key] = code(c.do(ctx, sh, id))
			}
		}
	}
	status := func(execID string) string {
		resp, err := sh.State(ctx, &taskapi.StateRequest{ID: "c", ExecID: execID})
		sh.must("state", err)
		return fmt.Sprintf("OK %v %d", resp.Status, resp.ExitStatus)
	}
	addExec := func(id string, args ...string) {
		t.Helper()
		_, err := sh.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c", ExecID: id, Spec: sh.process(args...)})
		sh.must("exec "+id, err)
	}
	start := func(execID string) {
		t.Helper()
		_, err := sh.Start(ctx, &taskapi.StartRequest{ID: "c", ExecID: execID})
		sh.must("start "+execID, err)
	}
	kill := func(execID string) {
		t.Helper()
		_, err := sh.Kill(ctx, &taskapi.KillRequest{ID: "c", ExecID: execID, Signal: uint32(unix.SIGKILL)})
		sh.must("kill "+execID, err)
		_, err = sh.Wait(ctx, &taskapi.WaitRequest{ID: "c", ExecID: execID})
		sh.must("wait "+execID, err)
	}

	probe("not created", calls, "c")
	sh.create("c")
	probe("created", calls, "c")
	probe("unknown exec", execCalls("nobody"), "c")
	start("")
	probe("running", calls, "c")
	for name, r := range map[string]*taskapi.ExecProcessRequest{
		"exec bad spec": {ExecID: "x", Spec: &anypb.Any{Value: []byte("{")}},
		"exec path":     {ExecID: "../x", Spec: sh.process("true")},
		"exec empty":    {Spec: sh.process("true")},
	} {
		r.ID = "c"
		_, err := sh.Exec(ctx, r)
		found["running/"+name] = code(err)
	}
	_, err := sh.Update(ctx, &taskapi.UpdateTaskRequest{ID: "c", Resources: &anypb.Any{Value: []byte("{")}})
	found["running/update bad"] = code(err)
	_, err = sh.Checkpoint(ctx, &taskapi.CheckpointTaskRequest{ID: "c", Path: filepath.Join(sh.s.Dir, "checkpoint"), Options: sh.any(&options.Options{})})
	found["running/checkpoint bad"] = code(err)

	addExec("e", "sleep", "1000")
	probe("created exec", execCalls("e"), "c")
	_, err = sh.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c", ExecID: "e", Spec: sh.process("true")})
	found["created exec/exec"] = code(err)
	start("e")
	probe("running exec", execCalls("e"), "c")
	_, err = sh.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c", ExecID: "e", Spec: sh.process("true")})
	found["running exec/exec"] = code(err)
	addExec("late", "true")
	addExec("failed", "/does/not/exist")
	_, err = sh.Start(ctx, &taskapi.StartRequest{ID: "c", ExecID: "failed"})
	found["failed exec/start"] = code(err)
	found["failed exec/state"] = status("failed")
	_, err = sh.Delete(ctx, &taskapi.DeleteRequest{ID: "c", ExecID: "failed"})
	found["failed exec/delete"] = code(err)

	_, err = sh.Pause(ctx, &taskapi.PauseRequest{ID: "c"})
	sh.must("pause", err)
	probe("paused", calls, "c")
	probe("paused exec", execCalls("e"), "c")
	found["paused exec/state"] = status("e")
	_, err = sh.Start(ctx, &taskapi.StartRequest{ID: "c", ExecID: "late"})
	found["paused/start exec"] = code(err)
	_, err = sh.Resume(ctx, &taskapi.ResumeRequest{ID: "c"})
	sh.must("resume", err)

	kill("e")
	probe("stopped exec", execCalls("e"), "c")
	_, err = sh.Delete(ctx, &taskapi.DeleteRequest{ID: "c", ExecID: "e"})
	sh.must("delete e", err)
	probe("deleted exec", execCalls("e"), "c")
	addExec("never", "true")
	_, err = sh.Delete(ctx, &taskapi.DeleteRequest{ID: "c", ExecID: "never"})
	found["created exec/delete"] = code(err)

	addExec("after", "true")
	kill("")
	probe("stopped", calls, "c")
	_, err = sh.Start(ctx, &taskapi.StartRequest{ID: "c", ExecID: "after"})
	found["stopped/start exec"] = code(err)
	_, err = sh.Delete(ctx, &taskapi.DeleteRequest{ID: "c"})
	sh.must("delete", err)
	probe("deleted", calls, "c")

	_, err = sh.Shutdown(ctx, &taskapi.ShutdownRequest{ID: "anchor"})
	found["shutdown with containers"] = code(err)
	_, err = sh.State(ctx, &taskapi.StateRequest{ID: "anchor"})
	found["state after shutdown with containers"] = code(err)
	return found
}

// TestBadCreate gives Create what is no container, and checks that the answer
// names what is wrong, and that nothing has been done.
func TestBadCreate(t *testing.T) {
	sh := startShim(t, stack.Options{})
	badConfig := func(config string) func(*taskapi.CreateTaskRequest) {
		return func(r *taskapi.CreateTaskRequest) {
			sh.must("config.json", os.WriteFile(filepath.Join(r.Bundle, "config.json"), []byte(config), 0o600))
		}
	}
	toml := func(body string) func(*taskapi.CreateTaskRequest) {
		return func(r *taskapi.CreateTaskRequest) {
			r.Options = sh.any(&runtimeoptions.Options{ConfigBody: []byte(body)})
		}
	}
	for name, tc := range map[string]struct {
		spoil func(*taskapi.CreateTaskRequest)
		code  codes.Code
		want  string // part of the message
	}{
		"id empty":             {func(r *taskapi.CreateTaskRequest) { r.ID = "" }, codes.InvalidArgument, "container id"},
		"id path":              {func(r *taskapi.CreateTaskRequest) { r.ID = "../c" }, codes.InvalidArgument, "container id"},
		"id long":              {func(r *taskapi.CreateTaskRequest) { r.ID = strings.Repeat("c", 1000) }, codes.InvalidArgument, "container id"},
		"id taken":             {func(r *taskapi.CreateTaskRequest) { r.ID = "anchor" }, codes.AlreadyExists, "anchor"},
		"bundle none":          {func(r *taskapi.CreateTaskRequest) { r.Bundle = "" }, codes.InvalidArgument, "bundle"},
		"bundle relative":      {func(r *taskapi.CreateTaskRequest) { r.Bundle = "bundle" }, codes.InvalidArgument, "bundle"},
		"bundle missing":       {func(r *taskapi.CreateTaskRequest) { r.Bundle += "/missing" }, codes.InvalidArgument, "bundle"},
		"spec missing":         {func(r *taskapi.CreateTaskRequest) { os.Remove(filepath.Join(r.Bundle, "config.json")) }, codes.InvalidArgument, "config.json"},
		"spec no JSON":         {badConfig(`{"process":`), codes.InvalidArgument, "config.json"},
		"spec wrong type":      {badConfig(`{"process":{"args":"sleep"}}`), codes.InvalidArgument, "args"},
		"spec refused by runc": {badConfig(`{"ociVersion":"1.0.0"}`), codes.Unknown, "OCI runtime create failed"},
		"options unknown type": {func(r *taskapi.CreateTaskRequest) {
			r.Options = &anypb.Any{TypeUrl: "example.com/Options", Value: []byte("x")}
		}, codes.InvalidArgument, `options of type "example.com/Options"`},
		"options wrong type":     {func(r *taskapi.CreateTaskRequest) { r.Options = sh.any(&options.CheckpointOptions{}) }, codes.InvalidArgument, "CheckpointOptions"},
		"options malformed":      {func(r *taskapi.CreateTaskRequest) { r.Options.Value = []byte{0xff} }, codes.InvalidArgument, "options of type"},
		"options without a type": {func(r *taskapi.CreateTaskRequest) { r.Options.TypeUrl = "" }, codes.InvalidArgument, "options of type"},
		"TOML malformed":         {toml("BinaryName ="), codes.InvalidArgument, "config_body"},
		"TOML unknown key":       {toml(`BinryName = "runc"`), codes.InvalidArgument, "BinryName"},
		"TOML wrong type":        {toml(`BinaryName = 1`), codes.InvalidArgument, "config_body"},
		"config_path missing": {func(r *taskapi.CreateTaskRequest) {
			r.Options = sh.any(&runtimeoptions.Options{ConfigPath: "/missing.toml"})
		}, codes.InvalidArgument, "config_path"},
		"binary missing": {func(r *taskapi.CreateTaskRequest) { r.Options = sh.any(&options.Options{BinaryName: "/missing/runc"}) }, codes.Unknown, "/missing/runc"},
		"rootfs missing": {func(r *taskapi.CreateTaskRequest) { r.Rootfs[0].Source = "/missing/rootfs" }, codes.Unknown, "rootfs"},
		"second rootfs missing": {func(r *taskapi.CreateTaskRequest) {
			r.Rootfs = append(r.Rootfs, &types.Mount{Type: "bind", Source: "/missing/rootfs"})
		}, codes.Unknown, "rootfs"},
		"stdout scheme":          {func(r *taskapi.CreateTaskRequest) { r.Stdout = "gopher://host/" }, codes.Unknown, "gopher"},
		"stdout missing":         {func(r *taskapi.CreateTaskRequest) { r.Stdout = "/missing/fifo" }, codes.Unknown, "/missing/fifo"},
		"logging binary missing": {func(r *taskapi.CreateTaskRequest) { r.Stdout = "binary:///missing/logger" }, codes.Unknown, "/missing/logger"},
		"checkpoint missing":     {func(r *taskapi.CreateTaskRequest) { r.Checkpoint = "/missing/checkpoint" }, codes.NotFound, "/missing/checkpoint"},
		"CRIU image path missing": {func(r *taskapi.CreateTaskRequest) {
			r.Options = sh.any(&options.Options{CriuImagePath: "/missing/checkpoint"})
		}, codes.NotFound, "/missing/checkpoint"},
		"CRIU image path relative": {func(r *taskapi.CreateTaskRequest) { r.Options = sh.any(&options.Options{CriuImagePath: "checkpoint"}) }, codes.InvalidArgument, `"checkpoint" is not absolute`},
	} {
		t.Run(name, func(t *testing.T) {
			id := "c-" + strings.ReplaceAll(name, " ", "-")
			r := sh.createRequest(id)
			bundle := r.Bundle
			tc.spoil(r)
			before := files(t, bundle)
			_, err := sh.Create(sh.ctx, r)
			if got := code(err); got != tc.code.String() || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("create: %v; want code %v and %q", err, tc.code, tc.want)
			}
			// What Delete needs may be noted in it.
			after := slices.DeleteFunc(files(t, bundle), func(f string) bool {
				return slices.Contains([]string{"options.json", "runtime", "init.pid", "rootfs"}, f)
			})
			if !slices.Equal(before, after) {
				t.Errorf("the bundle holds %q, before %q", after, before)
			}
			if m := mountsAt(t, bundle); len(m) > 0 {
				t.Errorf("left mounted: %q", m)
			}
			if p := sh.cgroupProcs(t, id); p != "" {
				t.Errorf("left running: %q", p)
			}
			if id := r.ID; id != "anchor" {
				_, err := sh.State(sh.ctx, &taskapi.StateRequest{ID: id})
				if got := code(err); got != codes.NotFound.String() {
					t.Errorf("state: %v, want NotFound", err)
				}
			}
		})
	}
	// It still works, and so does the container that was there before.
	sh.create("good")
	sh.must("start", sh.anchor.Task.Start(sh.ctx))
	if out := sh.anchor.Exec(sh.ctx, "echo", "alive"); out != "alive\n" {
		t.Errorf("exec printed %q", out)
	}
}

// TestEmptyMessages gives every call a request with nothing in it, also for a
// container that exists: upstream's shim dies of some.
func TestEmptyMessages(t *testing.T) {
	sh := startShim(t, stack.Options{})
	sh.must("start", sh.anchor.Task.Start(sh.ctx))
	ctx, id := sh.ctx, "anchor"
	check := func(name string, err error, want codes.Code) {
		t.Helper()
		if got := code(err); got != want.String() {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	for _, c := range calls {
		if c.name != "create" && c.name != "connect" {
			check(c.name+" without an id", c.do(ctx, sh, ""), codes.NotFound)
		}
	}
	_, err := sh.Create(ctx, &taskapi.CreateTaskRequest{})
	check("create", err, codes.InvalidArgument)
	_, err = sh.Connect(ctx, &taskapi.ConnectRequest{})
	check("connect", err, codes.OK)
	_, err = sh.Exec(ctx, &taskapi.ExecProcessRequest{ID: id})
	check("exec", err, codes.InvalidArgument)
	_, err = sh.Exec(ctx, &taskapi.ExecProcessRequest{ID: id, ExecID: "e"})
	check("exec without a spec", err, codes.InvalidArgument)
	_, err = sh.Update(ctx, &taskapi.UpdateTaskRequest{ID: id})
	check("update", err, codes.InvalidArgument)
	_, err = sh.Checkpoint(ctx, &taskapi.CheckpointTaskRequest{ID: id})
	check("checkpoint", err, codes.InvalidArgument)
	_, err = sh.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: id})
	check("resize", err, codes.OK)
	_, err = sh.Kill(ctx, &taskapi.KillRequest{ID: id})
	check("kill", err, codes.OK) // signal 0 asks whether it lives
	_, err = sh.Kill(ctx, &taskapi.KillRequest{ID: id, Signal: 4096})
	check("kill by signal 4096", err, codes.Unknown)
	if status := sh.anchor.Status(ctx); status != "running" {
		t.Errorf("the container is %s", status)
	}
}

// files returns the paths of all that is in a folder, apart from what is in a
// mounted rootfs.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		found = append(found, rel)
		if rel == "rootfs" {
			return fs.SkipDir
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return found
}

// mountsAt returns the mount points in a folder.
func mountsAt(t *testing.T, dir string) []string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], dir+"/") {
			found = append(found, f[4])
		}
	}
	return found
}

// cgroupProcs returns the processes in a container's cgroup, "" also if there
// is none.
func (sh *taskShim) cgroupProcs(t *testing.T, name string) string {
	t.Helper()
	procs, err := readCgroup(sh.s, "pids", name, "cgroup.procs")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return procs
}

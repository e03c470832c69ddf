package rest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/node"
)

// The interface that containerd had in 2015, before gRPC (its api/v1/server.go): it starts
// containers from OCI bundles and has no namespaces. Errors are plain text.

// bundleRoutes adds it to mux.
func (s *server) bundleRoutes(mux *http.ServeMux) {
	namespace := func(*http.Request) string { return s.o.Namespace }
	handle := func(pattern string, scope Scope, mutates bool, serve func(http.ResponseWriter, *http.Request) error) {
		mux.Handle(pattern, s.route(route{scope: scope, namespace: namespace, mutates: mutates, status: bundleStatus}, serve))
	}
	handle("POST /containers/{name}", ScopeExec, true, s.startBundle)
	handle("PATCH /containers/{name}", ScopeExec, true, s.patchBundle)
	handle("PUT /containers/{name}/process", ScopeExec, true, s.addProcess)
	handle("PUT /containers/{name}/processes", ScopeExec, true, s.addProcess) // as its README has it
	handle("POST /containers/{name}/process/{pid}", ScopeExec, true, s.signalProcess)
	handle("GET /state", ScopeRead, false, s.state)
	handle("POST /containers/{name}/checkpoint/{checkpoint}", ScopeCheckpoint, true, s.saveBundle)
	handle("GET /containers/{name}/checkpoint", ScopeRead, false, s.savedOfBundle)
	handle("DELETE /containers/{name}/checkpoint/{checkpoint}", ScopeCheckpoint, true, s.removeSaved)
	mux.Handle("GET /events", s.route(route{scope: ScopeRead, namespace: namespace, stream: true}, s.bundleEvents))
}

// bundleStatus is statusOf for this interface, which has no 409 and 501.
func bundleStatus(err error) int {
	switch status := statusOf(err); status {
	case http.StatusConflict, http.StatusNotImplemented:
		return http.StatusInternalServerError
	default:
		return status
	}
}

func (s *server) startBundle(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		BundlePath string `json:"bundlePath"`
		Checkpoint string `json:"checkpoint"`
		Stdout     string `json:"stdout"`
		Stderr     string `json:"stderr"`
	}
	if err := decode(r, &body, false); err != nil {
		return err
	}
	if body.BundlePath == "" {
		return badRequest{fmt.Errorf("empty bundle path")}
	}
	if body.Checkpoint != "" {
		if who := callerIn(r.Context()); !who.may(ScopeRestore, s.o.Namespace) {
			return fault.New(errdefs.ErrPermissionDenied, "%s may not: a checkpoint needs scope %s in namespace %s", who.name, ScopeRestore, s.o.Namespace)
		}
	}
	start := node.StartRequest{Container: r.PathValue("name"), Checkpoint: body.Checkpoint}
	var err error
	if start.Bundle, err = s.paths.bundle("bundlePath", body.BundlePath); err != nil {
		return err
	}
	if body.Stdout != "" {
		if start.Stdout, err = s.paths.output("stdout", body.Stdout); err != nil {
			return err
		}
	}
	if body.Stderr != "" {
		if start.Stderr, err = s.paths.output("stderr", body.Stderr); err != nil {
			return err
		}
	}
	started := time.Now()
	_, err = s.o.Node.Start(r.Context(), start)
	if body.Checkpoint != "" {
		s.metrics.observe("restore", started, err)
	}
	if err != nil {
		return err
	}
	w.WriteHeader(http.StatusCreated)
	return nil
}

func (s *server) patchBundle(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Status string `json:"status"`
		Signal int    `json:"signal"`
	}
	if err := decode(r, &body, false); err != nil {
		return err
	}
	if body.Status == "" && body.Signal == 0 {
		return badRequest{fmt.Errorf("neither status nor signal")}
	}
	if err := checkSignal(body.Signal, true); err != nil {
		return err
	}
	name := r.PathValue("name")
	switch body.Status {
	case "":
	case "paused", "running":
		do := s.o.Node.Resume
		if body.Status == "paused" {
			do = s.o.Node.Pause
		}
		if err := do(r.Context(), name); err != nil {
			return err
		}
	default:
		return badRequest{fmt.Errorf("status %q: it is paused or running", body.Status)}
	}
	if body.Signal != 0 {
		return s.o.Node.Signal(r.Context(), name, 0, syscall.Signal(body.Signal))
	}
	return nil
}

func checkSignal(signal int, optional bool) error {
	if signal == 0 && optional {
		return nil
	}
	if signal < 1 || signal > 64 {
		return badRequest{fmt.Errorf("signal %d: it is a number from 1 to 64", signal)}
	}
	return nil
}

// bundleProcess is a process in this interface.
type bundleProcess struct {
	Args     []string   `json:"args"`
	User     bundleUser `json:"user"`
	Terminal bool       `json:"terminal"`
	Pid      int        `json:"pid"`
	Env      []string   `json:"env"`
	Cwd      string     `json:"cwd"`
}

type bundleUser struct {
	UID            uint32   `json:"uid"`
	GID            uint32   `json:"gid"`
	AdditionalGids []uint32 `json:"additionalGids,omitempty"`
}

func (s *server) addProcess(w http.ResponseWriter, r *http.Request) error {
	var p bundleProcess
	if err := decode(r, &p, false); err != nil {
		return err
	}
	if len(p.Args) == 0 {
		return badRequest{fmt.Errorf("args is empty")}
	}
	pid, err := s.o.Node.Exec(r.Context(), node.ExecRequest{
		Container: r.PathValue("name"), Args: p.Args, Env: p.Env, Cwd: p.Cwd, Terminal: p.Terminal,
		User: specs.User{UID: p.User.UID, GID: p.User.GID, AdditionalGids: p.User.AdditionalGids},
	})
	if err != nil {
		return err
	}
	p.Pid = int(pid)
	return answerJSON(w, p)
}

func (s *server) signalProcess(w http.ResponseWriter, r *http.Request) error {
	pid, err := strconv.Atoi(r.PathValue("pid"))
	if err != nil || pid <= 0 {
		return badRequest{fmt.Errorf("pid %q is no number of a process", r.PathValue("pid"))}
	}
	var body struct {
		Signal int `json:"signal"`
	}
	if err := decode(r, &body, false); err != nil {
		return err
	}
	if err := checkSignal(body.Signal, false); err != nil {
		return err
	}
	return s.o.Node.Signal(r.Context(), r.PathValue("name"), pid, syscall.Signal(body.Signal))
}

// bundleState is the answer to GET /state.
type bundleState struct {
	Containers []bundleContainer `json:"containers"`
	Machine    bundleMachine     `json:"machine"`
}

type bundleContainer struct {
	ID         string          `json:"id"`
	BundlePath string          `json:"bundlePath"`
	State      bundleStatusOf  `json:"state"`
	Processes  []bundleProcess `json:"processes"`
}

type bundleStatusOf struct {
	Status string `json:"status"`
}

type bundleMachine struct {
	CPUs   int    `json:"cpus"`
	Memory uint64 `json:"memory"` // in bytes
}

func (s *server) state(w http.ResponseWriter, r *http.Request) error {
	bundles, err := s.o.Node.Bundles(r.Context())
	if err != nil {
		return err
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return err
	}
	state := bundleState{Containers: []bundleContainer{}, Machine: bundleMachine{runtime.NumCPU(), uint64(info.Totalram) * uint64(info.Unit)}}
	for _, b := range bundles {
		c := bundleContainer{ID: b.Container, BundlePath: b.Bundle, State: bundleStatusOf{"running"}, Processes: []bundleProcess{}}
		if b.Paused {
			c.State.Status = "paused"
		}
		for _, p := range b.Processes {
			c.Processes = append(c.Processes, bundleProcess{Args: p.Args, Terminal: p.Terminal, Pid: p.Pid, Env: p.Env, Cwd: p.Cwd,
				User: bundleUser{p.User.UID, p.User.GID, p.User.AdditionalGids}})
		}
		state.Containers = append(state.Containers, c)
	}
	return answerJSON(w, state)
}

// bundleCheckpoint is a checkpoint in this interface.
type bundleCheckpoint struct {
	Name        string    `json:"name"`
	Timestamp   time.Time `json:"timestamp"`
	TCP         bool      `json:"tcp"`
	UnixSockets bool      `json:"unixSockets"`
	Shell       bool      `json:"shell"`
}

func (s *server) saveBundle(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Exit        bool `json:"exit"`
		TCP         bool `json:"tcp"`
		UnixSockets bool `json:"unixSockets"`
		Shell       bool `json:"shell"`
	}
	if err := decode(r, &body, true); err != nil {
		return err
	}
	started := time.Now()
	saved, err := s.o.Node.Save(r.Context(), node.SaveRequest{
		Container: r.PathValue("name"), Name: r.PathValue("checkpoint"), Exit: body.Exit,
		Options: node.DumpOptions{OpenTCP: body.TCP, ExternalUnixSockets: body.UnixSockets, Terminal: body.Shell},
	})
	s.metrics.observe("checkpoint", started, err)
	if err != nil {
		return err
	}
	s.metrics.checkpointed([]node.CheckpointResult{{Frozen: saved.Frozen, ImageBytes: saved.ImageBytes}})
	w.WriteHeader(http.StatusCreated)
	return nil
}

func (s *server) savedOfBundle(w http.ResponseWriter, r *http.Request) error {
	all, err := s.o.Node.SavedCheckpoints(r.Context(), r.PathValue("name"))
	if err != nil {
		return err
	}
	list := []bundleCheckpoint{}
	for _, c := range all {
		list = append(list, bundleCheckpoint{c.Name, c.Time, c.Options.OpenTCP, c.Options.ExternalUnixSockets, c.Options.Terminal})
	}
	return answerJSON(w, list)
}

func (s *server) removeSaved(_ http.ResponseWriter, r *http.Request) error {
	return s.o.Node.RemoveSaved(r.Context(), r.PathValue("name"), r.PathValue("checkpoint"))
}

// bundleEvent is what happened to a container, in this interface.
type bundleEvent struct {
	Type   string `json:"type"`
	ID     string `json:"id"`
	Status uint32 `json:"status"`
}

func (s *server) bundleEvents(w http.ResponseWriter, r *http.Request) error {
	happened, stop := s.events.listen()
	defer stop()
	rc := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	if err := rc.Flush(); err != nil {
		return nil // it has gone away
	}
	out := json.NewEncoder(w)
	for {
		select {
		case <-r.Context().Done():
			return nil
		case e, ok := <-happened:
			if !ok {
				return nil
			}
			if out.Encode(bundleEvent{e.Type, e.Container, e.Status}) != nil || rc.Flush() != nil {
				return nil
			}
		}
	}
}

package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	bootstrapapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
)

// params is what containerd 2.4 writes.
func (n *node) params(id string, opts ...proto.Message) []byte {
	p := &bootstrapapi.BootstrapParams{
		InstanceID:             id,
		Namespace:              "ns",
		ContainerdGrpcAddress:  n.address,
		ContainerdTtrpcAddress: n.address + ".ttrpc",
		SocketDir:              &n.socketDir,
	}
	for _, o := range opts {
		p.AddExtension(runtimeAny(n.t, o))
	}
	return marshal(n.t, p)
}

// start starts a shim as containerd 2.4 does and returns its address.
func (n *node) start(bundle, id string) (string, error) {
	// Both outputs are the answer, as for containerd.
	out, err := n.command(bundle, id, "start", n.params(id)).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	r := &bootstrapapi.BootstrapResult{}
	if err := proto.Unmarshal(out, r); err != nil {
		return "", fmt.Errorf("%w: %q", err, out)
	}
	return r.Address, nil
}

func (n *node) mustStart(bundle, id string) string {
	n.t.Helper()
	address, err := n.start(bundle, id)
	if err != nil {
		n.t.Fatal(err)
	}
	return address
}

// sockets lists the socket folder.
func (n *node) sockets() []string {
	entries, err := os.ReadDir(n.socketDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		n.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func shutdownShim(t *testing.T, address string) {
	t.Helper()
	c := dial(t, address)
	defer c.Close()
	if _, err := taskapi.NewTTRPCTaskClient(c).Shutdown(t.Context(), &taskapi.ShutdownRequest{}); err != nil {
		t.Errorf("shutdown: %v", err)
	}
}

func TestStartServeShutdown(t *testing.T) {
	n := newNode(t)
	e := &eventLog{t: t, path: n.address + ".ttrpc"}
	e.start()
	defer e.stop()
	bundle := n.bundle("c1", `{}`)
	address := n.mustStart(bundle, "c1")
	pid := shimPid(t, address)

	if data, err := os.ReadFile(filepath.Join(bundle, "address")); err != nil || string(data) != address {
		t.Errorf("address file %q, %v", data, err)
	}
	if dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err != nil || dir != bundle {
		t.Errorf("shim runs in %s, %v", dir, err)
	}
	score := func(pid int) int {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
		if err != nil {
			t.Fatal(err)
		}
		i, _ := strconv.Atoi(strings.TrimSpace(string(data)))
		return i
	}
	if got, want := score(pid), min(score(os.Getpid())+1, 1000); got != want {
		t.Errorf("OOM score %d, want %d", got, want)
	}
	// Descriptors 3 and 4 must not stay open without close-on-exec: the
	// containers would have them.
	for _, fd := range []int{listenerFD, gateFD} {
		info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, fd))
		if err == nil && !strings.Contains(string(info), "flags:\t02") && !strings.Contains(string(info), "flags:\t012") {
			t.Errorf("descriptor %d is inherited by containers: %s", fd, info)
		}
	}

	// A connection's loss ends its requests, and nothing else.
	c := dial(t, address)
	waited := make(chan struct{})
	go func() {
		defer close(waited)
		taskapi.NewTTRPCTaskClient(c).Wait(context.Background(), &taskapi.WaitRequest{})
	}()
	eventually(t, "the request arrives", func() bool { return slices.Contains(e.topics(), "/test/wait-begun") })
	c.Close()
	<-waited
	eventually(t, "the request's context ends", func() bool { return slices.Contains(e.topics(), "/test/wait-ended") })
	if got := shimPid(t, address); got != pid {
		t.Errorf("another shim: %d", got)
	}

	shutdownShim(t, address)
	waitGone(t, pid)
	if got := n.sockets(); len(got) > 0 {
		t.Errorf("left behind: %v", got)
	}
	if got := e.topics(); !slices.Contains(got, "/test/close") {
		t.Errorf("what Close published is lost: %v", got)
	}
}

func TestStartLegacy(t *testing.T) {
	// Nothing but BootstrapParams tells another socket folder than this.
	if err := os.MkdirAll(defaultSocketDir, 0o700); err != nil {
		t.Skip(err)
	}
	n := newNode(t)
	e := &eventLog{t: t, path: n.address + ".ttrpc"}
	e.start()
	defer e.stop()
	bundle := n.bundle("c1", `{}`)
	cmd := n.command(bundle, "c1", "start", marshal(t, runtimeAny(t, &options.Options{BinaryName: "runc"})), "MAX_SHIM_VERSION=2")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	path, ok := strings.CutPrefix(string(out), "unix://"+defaultSocketDir+"/")
	if !ok || strings.ContainsAny(path, "/\n") {
		t.Errorf("answer %q", out)
	}
	pid := shimPid(t, string(out))
	p, _ := os.FindProcess(pid)
	p.Signal(os.Interrupt)
	waitGone(t, pid)
	if _, err := os.Lstat(strings.TrimPrefix(string(out), "unix://")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket is left: %v", err)
	}
}

func TestStartGroup(t *testing.T) {
	n := newNode(t)
	pod := `{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}`
	a := n.mustStart(n.bundle("pod", pod), "pod")
	b := n.mustStart(n.bundle("c1", pod), "c1")
	other := n.mustStart(n.bundle("c2", `{"annotations":{"io.containerd.runc.v2.group":"g","io.kubernetes.cri.sandbox-id":"pod"}}`), "c2")
	if a != b || a == other {
		t.Errorf("addresses %s, %s, %s", a, b, other)
	}
	pid := shimPid(t, a)
	shimPid(t, other)

	// A killed shim leaves its socket; the next container of the group has a
	// new shim.
	killWait(t, pid)
	c := n.mustStart(n.bundle("c3", pod), "c3")
	if c != a {
		t.Errorf("address %s, was %s", c, a)
	}
	if got := shimPid(t, c); got == pid {
		t.Errorf("shim %d is back", pid)
	}
}

// However many containers of a group start at once, they share one shim, also
// if a dead one left its socket.
func TestStartRace(t *testing.T) {
	n := newNode(t)
	const containers = 12
	config := `{"annotations":{"io.containerd.runc.v2.group":"g"}}`
	var bundles []string
	for i := range containers {
		bundles = append(bundles, n.bundle(fmt.Sprint("c", i), config))
	}
	for range 3 {
		addresses := make([]string, containers)
		var wg sync.WaitGroup
		for i, b := range bundles {
			wg.Go(func() {
				var err error
				if addresses[i], err = n.start(b, fmt.Sprint("c", i)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if got := slices.Compact(addresses); len(got) != 1 {
			t.Fatalf("addresses %v", got)
		}
		pid := shimPid(t, addresses[0])
		if pids := shimsOf(t, n); !slices.Equal(pids, []int{pid}) {
			t.Fatalf("shims %v, and %d serves", pids, pid)
		}
		killWait(t, pid) // its socket stays
	}
}

// shimsOf returns the pids of all daemons of the node.
func shimsOf(t *testing.T, n *node) (pids []int) {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range paths {
		data, _ := os.ReadFile(p)
		if bytes.Contains(data, []byte(n.address)) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(p)))
			pids = append(pids, pid)
		}
	}
	return pids
}

func TestStartFails(t *testing.T) {
	for _, tt := range []struct {
		name   string
		config string
		opts   *options.Options
		err    string
	}{
		{"no such cgroup", `{}`, &options.Options{ShimCgroup: "/stasis-no-such-cgroup"}, "shim_cgroup"},
		{"no spec", "", nil, "spec"},
		{"broken spec", `{`, nil, "spec"},
		{"group leads elsewhere", `{"annotations":{"io.containerd.runc.v2.group":"../other/c1"}}`, nil, "not a valid group"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := newNode(t)
			bundle := n.bundle("c1", tt.config)
			if tt.config == "" {
				os.Remove(filepath.Join(bundle, "config.json"))
			}
			params := n.params("c1")
			if tt.opts != nil {
				params = n.params("c1", tt.opts)
			}
			out, err := n.command(bundle, "c1", "start", params).CombinedOutput()
			if err == nil || !strings.Contains(string(out), tt.err) || !strings.Contains(string(out), `container "c1"`) {
				t.Errorf("%v: %s", err, out)
			}
			if pids := shimsOf(t, n); len(pids) > 0 {
				t.Errorf("left processes %v", pids)
			}
			if got := n.sockets(); len(got) > 0 {
				t.Errorf("left sockets %v", got)
			}
		})
	}
}

// The shim is in its cgroup before anybody knows its address.
func TestStartShimCgroup(t *testing.T) {
	group := fmt.Sprintf("/stasis-shim-test-%d", os.Getpid())
	var remove func() error
	if cgroups.Mode() == cgroups.Unified {
		m, err := cgroup2.NewManager("/sys/fs/cgroup", group, &cgroup2.Resources{})
		if err != nil {
			t.Skip(err)
		}
		remove = m.Delete
	} else {
		c, err := cgroup1.New(cgroup1.StaticPath(group), &specs.LinuxResources{})
		if err != nil {
			t.Skip(err)
		}
		remove = c.Delete
	}
	t.Cleanup(func() {
		// It holds the shim until init has reaped that.
		eventually(t, "cgroup "+group+" is removed", func() bool { return remove() == nil })
	})
	n := newNode(t)
	bundle := n.bundle("c1", `{}`)
	out, err := n.command(bundle, "c1", "start", n.params("c1", &options.Options{ShimCgroup: group})).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	r := &bootstrapapi.BootstrapResult{}
	if err := proto.Unmarshal(out, r); err != nil {
		t.Fatal(err)
	}
	pid := shimPid(t, r.Address)
	got, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil || !strings.Contains(string(got), group) {
		t.Errorf("shim is in %s, %v", got, err)
	}
	killWait(t, pid) // before its cgroup is removed
}

// A daemon whose starter was killed must not stay: nobody knows of it.
func TestStarterKilled(t *testing.T) {
	n := newNode(t)
	bundle := n.bundle("c1", `{}`)
	t.Setenv(helperEnv, "1")
	if err := os.MkdirAll(n.socketDir, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := listen(filepath.Join(n.socketDir, "1"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cmd, gate, err := spawn(flags{namespace: "ns", id: "c1"}, bootstrap{address: n.address}, bundle, l)
	if err != nil {
		t.Fatal(err)
	}
	gate.Close()
	if err := cmd.Wait(); err == nil {
		t.Error("the daemon ends as if all was well")
	}
	if got := n.sockets(); len(got) > 0 {
		t.Errorf("left behind: %v", got)
	}
}

func TestDelete(t *testing.T) {
	n := newNode(t)
	bundle := n.bundle("c1", `{}`)
	pid := shimPid(t, n.mustStart(bundle, "c1"))
	killWait(t, pid)
	if len(n.sockets()) != 1 {
		t.Fatalf("sockets %v", n.sockets())
	}
	remove := func(cmd []string, dir string) (*taskapi.DeleteResponse, error) {
		c := n.command(bundle, "c1", "delete", nil)
		c.Dir = dir
		c.Args = append(c.Args[:1], cmd...)
		var stderr bytes.Buffer
		c.Stderr = &stderr
		out, err := c.Output()
		if err != nil {
			return nil, fmt.Errorf("%w: %s", err, &stderr)
		}
		r := &taskapi.DeleteResponse{}
		return r, proto.Unmarshal(out, r)
	}
	for _, tt := range []struct {
		dir  string
		args []string
	}{
		{bundle, []string{"-namespace", "ns", "-id", "c1", "-bundle", bundle, "delete"}},
		{"/", []string{"-namespace", "ns", "-id", "c1", "-bundle", bundle, "delete"}},
		{bundle, []string{"-namespace", "ns", "-id", "c1", "delete"}},
		// Called in the bundle of the pod.
		{n.bundle("pod", `{}`), []string{"-namespace", "ns", "-id", "c1", "delete"}},
	} {
		r, err := remove(tt.args, tt.dir)
		if err != nil {
			t.Errorf("%v in %s: %v", tt.args, tt.dir, err)
		} else if r.Pid != 7 || r.ExitStatus != 137 {
			t.Errorf("answer %v", r)
		}
	}
	if got := n.sockets(); len(got) > 0 {
		t.Errorf("the dead shim's socket is left: %v", got)
	}
	if _, err := remove([]string{"-namespace", "ns", "-id", "../c1", "delete"}, bundle); err == nil {
		t.Error("a path is taken for an id")
	}
}

func TestInfo(t *testing.T) {
	dir := t.TempDir()
	runc := filepath.Join(dir, "fake-runc")
	if err := os.WriteFile(runc, []byte("#!/bin/sh\n[ $1 = features ] && echo '{\"ociVersionMin\":\"1.0.0\"}'\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	build := Build{Version: "v1.2.3", Commit: "abc"}
	for _, tt := range []struct {
		name     string
		opts     *options.Options
		features string
	}{
		{"tells features", &options.Options{BinaryName: runc}, `{"ociVersionMin":"1.0.0"}`},
		{"no such runtime", &options.Options{BinaryName: filepath.Join(dir, "nothing")}, ""},
		{"not JSON", &options.Options{BinaryName: "echo"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			opts := runtimeAny(t, tt.opts)
			if err := printInfo(t.Context(), bytes.NewReader(marshal(t, opts)), &out, build, fakeRuntime()); err != nil {
				t.Fatal(err)
			}
			info := &types.RuntimeInfo{}
			if err := proto.Unmarshal(out.Bytes(), info); err != nil {
				t.Fatal(err)
			}
			if info.Name != "io.containerd.stasis.v1" || info.Version.Version != "v1.2.3" || info.Version.Revision != "abc" {
				t.Errorf("info %v", info)
			}
			if !proto.Equal(info.Options, opts) {
				t.Errorf("options %v", info.Options)
			}
			if got := string(info.Features.GetValue()); got != tt.features {
				t.Errorf("features %q", got)
			}
		})
	}
	if err := printInfo(t.Context(), strings.NewReader(""), &bytes.Buffer{}, build, fakeRuntime()); err != nil {
		t.Errorf("no options: %v", err)
	}
	if err := printInfo(t.Context(), strings.NewReader("junk"), &bytes.Buffer{}, build, fakeRuntime()); err == nil {
		t.Error("junk is taken for options")
	}
}

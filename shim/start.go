package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"golang.org/x/sys/unix"
)

// start finds or spawns the shim of the container's group and prints its
// address. Nothing else may be printed, not even to the standard error, unless
// start fails: containerd reads both as the answer.
func start(f flags, stdin io.Reader, stdout io.Writer, rt Runtime) error {
	input, err := readAll(stdin)
	if err != nil {
		return err
	}
	b, err := parseBootstrap(f, input, os.Getenv)
	if err != nil {
		return err
	}
	bundle, err := f.bundleDir()
	if err != nil {
		return err
	}
	group, err := readGroup(bundle, f.id)
	if err != nil {
		return err
	}
	path, err := socketPath(b.socketDir, b.address, f.namespace, group)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(b.socketDir, 0o700); err != nil {
		return fmt.Errorf("make socket directory: %w", err)
	}
	// Held until the shim is known to serve: whoever starts a container of the
	// same group meanwhile must not be given the address of one that fails.
	lock, err := lockGroup(path)
	if err != nil {
		return err
	}
	defer lock.unlock()

	address := "unix://" + path
	// containerd 1.x finds the shim by this file when it restarts, and 2.x
	// does for a container that 1.x started.
	if err := writeFile(filepath.Join(bundle, "address"), address); err != nil {
		return fmt.Errorf("save the shim's address: %w", err)
	}
	answer, err := b.answer(address)
	if err != nil {
		return err
	}
	l, err := listenGroup(path)
	if err != nil {
		return err
	}
	if l != nil {
		if err := startDaemon(f, b, bundle, l, rt); err != nil {
			l.Close()
			if rerr := os.Remove(path); rerr != nil {
				err = errors.Join(err, fmt.Errorf("remove its socket: %w", rerr))
			}
			return err
		}
	}
	_, err = stdout.Write(answer)
	return err
}

// startDaemon spawns the shim on the listener and lets it go once it is where
// it belongs. If it fails, no process is left.
func startDaemon(f flags, b bootstrap, bundle string, l *net.UnixListener, rt Runtime) (err error) {
	var cgroup string
	if b.options != nil {
		opts, err := rt.DecodeOptions(b.options)
		if err != nil {
			return fmt.Errorf("decode runtime options: %w", err)
		}
		cgroup = opts.GetShimCgroup()
	}
	cmd, gate, err := spawn(f, b, bundle, l)
	if err != nil {
		return fmt.Errorf("spawn shim: %w", err)
	}
	defer func() {
		if err != nil {
			cmd.Process.Kill()
			cmd.Wait()
			err = fmt.Errorf("%w (the shim that was spawned, pid %d, is killed)", err, cmd.Process.Pid)
		}
		gate.Close()
	}()
	if cgroup != "" {
		if err := joinCgroup(cgroup, cmd.Process.Pid); err != nil {
			return fmt.Errorf("put shim into cgroup %q (option shim_cgroup; it must exist): %w", cgroup, err)
		}
	}
	if err := adjustOOMScore(cmd.Process.Pid); err != nil {
		return fmt.Errorf("adjust the shim's OOM score: %w", err)
	}
	if _, err := gate.Write([]byte{goAhead}); err != nil {
		return fmt.Errorf("the shim died before it could serve, see containerd's log: %w", err)
	}
	return nil
}

// File descriptors of the daemon.
const (
	listenerFD = 3
	gateFD     = 4
)

// goAhead through the gate tells the daemon to serve. If instead the gate
// closes, its starter failed or was killed, and nobody would ever find it.
const goAhead = 1

// spawn starts this binary anew as the daemon, which waits at its gate.
func spawn(f flags, b bootstrap, bundle string, l *net.UnixListener) (*exec.Cmd, *os.File, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	socket, err := l.File()
	if err != nil {
		return nil, nil, err
	}
	defer socket.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()

	args := []string{"-namespace", f.namespace, "-id", f.id, "-address", b.address}
	if b.debug {
		args = append(args, "-debug")
	}
	cmd := exec.Command(self, args...)
	cmd.Dir = bundle
	// The runtime that the shim runs inherits it too, and needs no more.
	cmd.Env = append(os.Environ(), "GOMAXPROCS=2", "TTRPC_ADDRESS="+b.ttrpcAddress)
	cmd.ExtraFiles = []*os.File{listenerFD - 3: socket, gateFD - 3: r}
	// Signals to containerd's process group are not for the shim.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}

	if os.Getenv("SCHED_CORE") != "" {
		// The daemon inherits the core scheduling domain of this process, and
		// the containers inherit that of the daemon.
		if err := unix.Prctl(unix.PR_SCHED_CORE, unix.PR_SCHED_CORE_CREATE, 0, unix.PR_SCHED_CORE_SCOPE_PROCESS_GROUP, 0); err != nil {
			w.Close()
			return nil, nil, fmt.Errorf("make a core scheduling domain (containerd sets SCHED_CORE; the kernel must have CONFIG_SCHED_CORE): %w", err)
		}
	}
	if err := cmd.Start(); err != nil {
		w.Close()
		return nil, nil, err
	}
	return cmd, w, nil
}

// groupAnnotations name the group of a container, in order of precedence.
var groupAnnotations = []string{
	"io.containerd.runc.v2.group",
	"io.kubernetes.cri.sandbox-id",
}

// readGroup reads from the bundle's spec which group the container is of: its
// own unless an annotation names another.
func readGroup(bundle, id string) (string, error) {
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return "", fmt.Errorf("read the container's spec: %w", err)
	}
	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(data, &spec); err != nil {
		return "", fmt.Errorf("read the container's spec %s: %w", filepath.Join(bundle, "config.json"), err)
	}
	for _, a := range groupAnnotations {
		group := spec.Annotations[a]
		if group == "" {
			continue
		}
		// The group becomes part of a path that is hashed: with ".." it could
		// name the shim of another namespace.
		if !filepath.IsLocal(group) {
			return "", fmt.Errorf("annotation %s: %q is not a valid group", a, group)
		}
		return group, nil
	}
	return id, nil
}

// joinCgroup moves the process into an existing cgroup.
func joinCgroup(path string, pid int) error {
	if cgroups.Mode() == cgroups.Unified {
		m, err := cgroup2.Load(path)
		if err != nil {
			return err
		}
		return m.AddProc(uint64(pid))
	}
	c, err := cgroup1.Load(cgroup1.StaticPath(path))
	if err != nil {
		return err
	}
	return c.AddProc(uint64(pid))
}

// adjustOOMScore makes the kernel kill the shim before containerd, this
// process's parent.
func adjustOOMScore(pid int) error {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", os.Getppid()))
	if err != nil {
		return err
	}
	score, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return err
	}
	score = min(score+1, 1000)
	err = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(strconv.Itoa(score)), 0)
	// To lower a score takes CAP_SYS_RESOURCE, which root may lack, in a user
	// namespace above all. It is not worth a container.
	if errors.Is(err, os.ErrPermission) {
		return nil
	}
	return err
}

// writeFile replaces the file as a whole: containerd may read it at any time.
func writeFile(path, content string) error {
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path))
	if err := os.WriteFile(tmp, []byte(content), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

package policy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// The tests of CheckProcesses look at processes that the test binary starts: itself,
// with the name of one of the deeds in the environment.
const deedEnv = "STASIS_TEST_DEED"

func TestMain(m *testing.M) {
	if name := os.Getenv(deedEnv); name != "" {
		runtime.LockOSThread()
		deeds[name]()
		fmt.Println("done")
		_, _ = io.Copy(io.Discard, os.Stdin) // until the test has looked
		os.Exit(0)
	}
	// What this process has inherited, those shall not.
	do(unix.CloseRange(given, 1<<20, unix.CLOSE_RANGE_CLOEXEC))
	os.Exit(m.Run())
}

// given is the descriptor that the test gives a process.
const given = 3

func do(err error) {
	if err != nil {
		panic(err)
	}
}

// deeds are what the processes do. They never close what they have.
var deeds = map[string]func(){
	"nothing": func() {},
	"lone namespace": func() {
		do(unix.Close(given))
		own, err := unix.Open("/proc/thread-self/ns/uts", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		do(err)
		do(unix.Unshare(unix.CLONE_NEWUTS))
		_, err = unix.Open("/proc/thread-self/ns/uts", unix.O_RDONLY, 0)
		do(err)
		do(unix.Setns(own, unix.CLONE_NEWUTS))
		do(unix.Close(own))
	},
	"honest": func() {
		do(unix.Close(given))
		dir, err := os.MkdirTemp("", "stasis")
		do(err)
		path := filepath.Join(dir, "file")
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT, 0o600)
		do(err)
		do(unix.Ftruncate(fd, 4096))
		_, err = unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
		do(err)
		do(os.RemoveAll(dir))
		_, err = unix.Open("/dev/null", unix.O_RDWR, 0)
		do(err)
		_, err = unix.Open("/proc/self/ns/mnt", unix.O_RDONLY, 0)
		do(err)
		_, err = unix.Open("/", unix.O_PATH, 0)
		do(err)
		_, err = unix.EpollCreate1(0)
		do(err)
		_, err = unix.InotifyInit1(0)
		do(err)
		_, err = unix.PidfdOpen(os.Getpid(), 0)
		do(err)
		mem, err := unix.MemfdCreate("x", 0)
		do(err)
		do(unix.Ftruncate(mem, 4096))
		_, err = unix.Mmap(mem, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
		do(err)
		_, err = unix.Mmap(-1, 0, 4096, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
		do(err)
		shm, err := unix.SysvShmGet(unix.IPC_PRIVATE, 4096, 0o600)
		do(err)
		_, err = unix.SysvShmAttach(shm, 0, 0)
		do(err)
		_, err = unix.SysvShmCtl(shm, unix.IPC_RMID, nil)
		do(err)
		_, _ = unix.MemfdCreate("x", unix.MFD_HUGETLB)
		var ring uintptr
		_, _, _ = unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&ring)), 0)
		own := fly(fd, unix.SOCK_STREAM) // a descriptor of its own in flight, in a socket in flight
		fly(own, unix.SOCK_DGRAM)
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		do(err)
		do(unix.Sendmsg(pair[0], []byte("x"), unix.UnixRights(pair[1], fd), nil, 0)) // in its own queue
	},
	"descriptor": func() {},
	"mapping": func() {
		_, err := unix.Mmap(given, 0, 1, unix.PROT_READ, unix.MAP_PRIVATE)
		do(err)
		do(unix.Close(given))
	},
	"working folder": func() {
		do(unix.Fchdir(given))
		do(unix.Close(given))
	},
	"root": func() {
		do(unix.Fchdir(given))
		do(unix.Chroot("."))
		do(unix.Close(given))
		do(unix.Chdir("/"))
	},
	"executable": func() {
		do(os.Setenv(deedEnv, "nothing"))
		unix.CloseOnExec(given)
		do(unix.Exec(fmt.Sprintf("/proc/self/fd/%d", given), os.Args, os.Environ()))
	},
	"thread's descriptor": func() {
		done := make(chan int)
		go func() {
			runtime.LockOSThread()
			do(unix.Unshare(unix.CLONE_FILES))
			done <- unix.Gettid()
			select {}
		}()
		<-done
		do(unix.Close(given))
	},
	"thread's folder": func() {
		done := make(chan int)
		go func() {
			runtime.LockOSThread()
			do(unix.Unshare(unix.CLONE_FS))
			do(unix.Fchdir(given))
			done <- unix.Gettid()
			select {}
		}()
		<-done
		do(unix.Close(given))
	},
	"in flight": func() {
		fly(given, unix.SOCK_STREAM)
		do(unix.Close(given))
	},
	"in flight, second datagram": func() {
		null, err := unix.Open("/dev/null", unix.O_RDWR, 0)
		do(err)
		flyAll(unix.SOCK_DGRAM, null, given)
		do(unix.Close(given))
	},
	"in flight in flight": func() {
		socket := fly(given, unix.SOCK_SEQPACKET)
		do(unix.Close(given))
		fly(socket, unix.SOCK_STREAM)
		do(unix.Close(socket))
	},
	"many": func() {
		do(unix.Close(given))
		fd, err := unix.Open("/etc/passwd", unix.O_RDONLY, 0)
		do(err)
		for range 10_000 { // of the same page, or they would be one
			_, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_PRIVATE)
			do(err)
		}
		for range 1000 {
			_, err := unix.Dup(fd)
			do(err)
		}
	},
	"chroot": func() {
		do(unix.Close(given))
		dir, err := os.MkdirTemp("", "stasis")
		do(err)
		_, err = unix.Open("/etc/passwd", unix.O_RDONLY, 0)
		do(err)
		do(unix.Chroot(dir))
		do(unix.Chdir("/"))
	},
}

// fly sends a descriptor and leaves it in the socket that it returns.
func fly(fd, kind int) int { return flyAll(kind, fd) }

func flyAll(kind int, fds ...int) int {
	pair, err := unix.Socketpair(unix.AF_UNIX, kind, 0)
	do(err)
	for _, fd := range fds {
		do(unix.Sendmsg(pair[0], []byte("some bytes"), unix.UnixRights(fd), nil, 0))
	}
	return pair[1]
}

// start runs a process in a mount namespace of its own that does a deed with a file of
// the test's.
func startDeed(t testing.TB, deed string, flags uintptr, file *os.File) int {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), deedEnv+"="+deed, "TMPDIR="+t.TempDir())
	cmd.ExtraFiles = []*os.File{file}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = struct{ io.Writer }{os.Stderr} // not the test's own file
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "done\n" {
		t.Fatalf("%s: %q, %v", deed, line, err)
	}
	return cmd.Process.Pid
}

// ownMounts is a spec whose only namespace is one for mounts.
func ownMounts() *specs.Spec {
	return &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.MountNamespace}}}}
}

func TestProcesses(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	plain := filepath.Join(dir, "file")
	if err := os.WriteFile(plain, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	memory := filepath.Join("/dev/shm", filepath.Base(dir)+fmt.Sprint(os.Getpid()))
	if err := os.WriteFile(memory, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(memory) })
	for name, c := range map[string]struct {
		deed  string
		file  string
		want  string // of the error; "" for none
		flags uintptr
	}{
		"honest":                     {deed: "honest", file: plain},
		"chroot":                     {deed: "chroot", file: plain},
		"descriptor":                 {deed: "descriptor", file: plain, want: "descriptor 3 leads to"},
		"descriptor of a folder":     {deed: "descriptor", file: dir, want: "descriptor 3 leads to"},
		"descriptor of a device":     {deed: "descriptor", file: "/dev/null", want: `descriptor 3 leads to "/dev/null"`},
		"descriptor of memory":       {deed: "descriptor", file: memory, want: "descriptor 3 leads to"},
		"descriptor of /proc":        {deed: "descriptor", file: "/proc", want: `descriptor 3 leads to "/proc"`},
		"host's mounts":              {deed: "descriptor", file: "/proc/self/ns/mnt", want: "descriptor 3 is of namespace"},
		"mapping":                    {deed: "mapping", file: plain, want: "mapping "},
		"working folder":             {deed: "working folder", file: dir, want: "working folder leads to"},
		"root":                       {deed: "root", file: dir, want: "root leads to"},
		"executable":                 {deed: "executable", file: "/proc/self/exe", want: "executable leads to"},
		"thread's descriptor":        {deed: "thread's descriptor", file: plain, want: "descriptor 3 leads to"},
		"thread's folder":            {deed: "thread's folder", file: dir, want: "working folder leads to"},
		"in flight":                  {deed: "in flight", file: plain, want: "a descriptor in flight leads to"},
		"in flight, second datagram": {deed: "in flight, second datagram", file: plain, want: "a descriptor in flight leads to"},
		"in flight in flight":        {deed: "in flight in flight", file: plain, want: "a descriptor in flight: a descriptor in flight leads to"},
		"namespace of the host":      {deed: "nothing", file: plain, flags: unix.CLONE_NEWUTS, want: "is in the host's mount namespace"},
		"another namespace":          {deed: "nothing", file: plain, flags: unix.CLONE_NEWNS | unix.CLONE_NEWUTS, want: "is in another uts namespace"},
	} {
		t.Run(name, func(t *testing.T) {
			file, err := os.OpenFile(c.file, unix.O_RDONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			if c.flags == 0 {
				c.flags = unix.CLONE_NEWNS
			}
			pid := startDeed(t, c.deed, c.flags, file)
			err = CheckProcesses(t.Context(), ownMounts(), []int{pid})
			switch {
			case c.want == "":
				if err != nil {
					t.Error(err)
				}
			case !errors.Is(err, errdefs.ErrPermissionDenied) || !strings.Contains(err.Error(), c.want):
				t.Errorf("%v; want it refused with %q", err, c.want)
			case !strings.Contains(err.Error(), "process "+fmt.Sprint(pid)+" ("):
				t.Errorf("%v; want the process in it", err)
			}
		})
	}
}

// TestLoneNamespace: a namespace that no process is in can be one that the holder has
// made, if the spec lets it make any.
func TestLoneNamespace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	plain, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	pid := startDeed(t, "lone namespace", unix.CLONE_NEWNS, plain)
	spec := ownMounts()
	if err := CheckProcesses(t.Context(), spec, []int{pid}); !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "is of namespace") {
		t.Errorf("without a capability: %v", err)
	}
	spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_SYS_ADMIN"}}
	if err := CheckProcesses(t.Context(), spec, []int{pid}); err != nil {
		t.Errorf("with CAP_SYS_ADMIN: %v", err)
	}
}

// TestProcessesOfOne checks that each process is looked at, that they have to be in
// one mount namespace, and what a grant changes.
func TestProcessesOfOne(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	file, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	honest := startDeed(t, "honest", unix.CLONE_NEWNS, file)
	other := startDeed(t, "honest", unix.CLONE_NEWNS, file)
	hostile := startDeed(t, "descriptor", unix.CLONE_NEWNS, file)

	admin := ownMounts()
	admin.Process.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_SYS_ADMIN"}}
	shared := ownMounts()
	shared.Linux.Namespaces = nil
	named := ownMounts()
	named.Linux.Namespaces[0].Path = fmt.Sprintf("/proc/%d/ns/mnt", honest)
	ended, end := context.WithCancel(t.Context())
	end()
	for name, c := range map[string]struct {
		ctx  context.Context
		spec *specs.Spec
		pids []int
		want string
	}{
		"one":               {spec: ownMounts(), pids: []int{honest}},
		"two namespaces":    {spec: ownMounts(), pids: []int{honest, other}, want: "is in another mount namespace than process"},
		"two with the cap":  {spec: admin, pids: []int{honest, other}},
		"the second":        {spec: admin, pids: []int{honest, hostile}, want: `descriptor 3 leads to "/dev/null"`},
		"own, not the spec": {spec: shared, pids: []int{honest}, want: "is in another mount namespace than the spec's"},
		"the host's":        {spec: shared, pids: []int{os.Getpid()}},
		"the named one":     {spec: named, pids: []int{honest}},
		"not the named one": {spec: named, pids: []int{other}, want: "is in another mount namespace than the spec's"},
		"none":              {spec: ownMounts(), want: "no restored process"},
		"gone":              {spec: ownMounts(), pids: []int{1 << 22}, want: "no such"},
		"cancelled":         {ctx: ended, spec: ownMounts(), pids: []int{honest}, want: context.Canceled.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			if c.ctx == nil {
				c.ctx = t.Context()
			}
			err := CheckProcesses(c.ctx, c.spec, c.pids)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

// BenchmarkProcesses looks at a small process, and at one with 10,000 mappings and
// 1,000 descriptors.
func BenchmarkProcesses(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skip("needs root")
	}
	file, err := os.Open("/dev/null")
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	for _, deed := range []string{"chroot", "many"} {
		b.Run(deed, func(b *testing.B) {
			pid := startDeed(b, deed, unix.CLONE_NEWNS, file)
			for b.Loop() {
				if err := CheckProcesses(b.Context(), ownMounts(), []int{pid}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

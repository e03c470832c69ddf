package stack

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// machine is what makes a Stack a host of its own, for Options.Machine: a network
// namespace, and a mount namespace, which is the only thing that its holder is
// there for. What programs write there to the folders of a host stays in the
// stack's, and mounts are seen by all of the machine's processes and by no others.
type machine struct {
	netns  *Netns
	holder *exec.Cmd
	// files are closed to end the holder and the goroutine that restarts containerd,
	// which closes restarted then.
	files     []*os.File
	restarted chan struct{}
}

// bare are folders of a machine that are empty at first; layered have what the
// host's have, and changes stay in the machine.
var (
	bare    = []string{"/run/containerd", "/var/lib", "/var/log"}
	layered = []string{"/etc", "/usr/local"}
)

// tunables are what the kubelet sets to values of its own, for the whole host. A
// machine has files in their place.
var tunables = []string{
	"/proc/sys/kernel/keys/root_maxbytes", "/proc/sys/kernel/keys/root_maxkeys", "/proc/sys/kernel/panic",
	"/proc/sys/kernel/panic_on_oops", "/proc/sys/vm/overcommit_memory", "/proc/sys/vm/panic_on_oom",
}

func readTunables() map[string]string {
	values := map[string]string{}
	for _, path := range tunables {
		value, _ := os.ReadFile(path)
		values[path] = string(value)
	}
	return values
}

// machineScript makes the mounts while the new mount namespace is private still, so
// that none of them shows up twice. Then mounts are shared within the machine, as
// systemd does it. There is no systemd: its command to restart containerd asks
// serveRestarts.
const machineScript = `set -eu
dir=$1 cache=$2 bare=$3 layered=$4 tunables=$5
# Of other stacks, which would be kept from going away.
while read -r _ _ _ _ target _; do
	case $target in */stasis-*) umount -l "$target" 2>/dev/null || true ;; esac
done </proc/self/mountinfo
for d in $bare; do
	mkdir -p "$d" "$dir/machine$d"
	mount --bind "$dir/machine$d" "$d"
done
for d in $layered; do
	mkdir -p "$dir/machine$d" "$dir/work$d"
	mount -t overlay -o "lowerdir=$d,upperdir=$dir/machine$d,workdir=$dir/work$d" machine "$d"
done
for f in $tunables; do
	mkdir -p "$dir/machine${f%/*}"
	cat "$f" >"$dir/machine$f"
	mount --bind "$dir/machine$f" "$f"
done
if [ -d /run/systemd ]; then mount -t tmpfs machine /run/systemd; fi
mkdir -p /etc/containerd /usr/local/bin
ln -s "$dir/config.toml" /etc/containerd/config.toml
ln -s "$dir/c.sock" /run/containerd/containerd.sock
ln -sf "$cache"/bin/* /usr/local/bin
mkfifo "$dir/restart" "$dir/restarted"
cat >"$dir/bin/systemctl" <<END
#!/bin/sh
[ "\$*" = "restart containerd" ] && echo >"$dir/restart" && read -r answer <"$dir/restarted" && [ "\$answer" = done ]
END
chmod +x "$dir/bin/systemctl"
ln -sf "$dir/bin/systemctl" /usr/local/bin
mount --make-rshared /
echo ready
exec cat
`

// startMachine makes the machine that containerd is to run in.
func (s *Stack) startMachine() error {
	m := &machine{netns: s.NewNetns(), restarted: make(chan struct{})}
	stdin, hold, err := os.Pipe()
	if err != nil {
		return err
	}
	defer stdin.Close()
	m.files = append(m.files, hold)
	m.holder = exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", machineScript, "sh", s.Dir,
		cacheDir(), strings.Join(bare, " "), strings.Join(layered, " "), strings.Join(tunables, " "))
	m.holder.Env = s.env
	m.holder.Stdin = stdin
	m.holder.Stderr = os.Stderr
	m.holder.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdout, err := m.holder.StdoutPipe()
	if err != nil {
		return err
	}
	if err := m.holder.Start(); err != nil {
		return fmt.Errorf("make a machine: %w", err)
	}
	s.machine = m
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		return fmt.Errorf("make a machine: its script ended early: %w", err)
	}
	requests, err := os.OpenFile(s.path("restart"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	answers, err := os.OpenFile(s.path("restarted"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	m.files = append(m.files, requests, answers)
	go func() {
		defer close(m.restarted)
		for r := bufio.NewReader(requests); ; {
			if _, err := r.ReadString('\n'); err != nil {
				return
			}
			answer := "done"
			if err := s.reboot(); err != nil {
				s.tb.Errorf("restart containerd: %v\n%s", err, tail(s.Logs(), 20))
				answer = "failed"
			}
			fmt.Fprintln(answers, answer)
		}
	}()
	return nil
}

// stopRestarts waits until nobody restarts containerd any more.
func (m *machine) stopRestarts() {
	if len(m.files) < 2 {
		return // it was never complete
	}
	for _, f := range m.files[1:] {
		f.Close()
	}
	<-m.restarted
}

// end lets the mount namespace go, and with it all that is mounted in it.
func (m *machine) end() error {
	return errors.Join(m.files[0].Close(), m.holder.Wait())
}

// enter is the command line that runs another one in the machine. No process
// comes between.
func (m *machine) enter() []string {
	return []string{"nsenter", "--mount=/proc/" + strconv.Itoa(m.holder.Process.Pid) + "/ns/mnt", "--net=" + m.netns.Path, "--"}
}

// Command is a program that was not started yet, with the stack's environment,
// where containerd runs: in the machine if there is one.
func (s *Stack) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	args = append([]string{name}, args...)
	if s.machine != nil {
		args = append(s.machine.enter(), args...)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = s.env
	return cmd
}

// MachinePath is where a file of the machine is to be found from outside.
func (s *Stack) MachinePath(path string) string {
	return filepath.Join("/proc", strconv.Itoa(s.machine.holder.Process.Pid), "root", path)
}

// MachineNetns is the network namespace of a machine: its own address, and that
// of the host on the other end.
func (s *Stack) MachineNetns() *Netns { return s.machine.netns }

// MachineFiles lists the files and folders of a machine that installations change,
// each with what tells whether it was changed.
func (s *Stack) MachineFiles() ([]string, error) {
	args := append(slices.Clone(layered), "-type", "d", "-printf", "%p %M\n", "-o", "-printf", "%p %M %s %T@ %l\n")
	out, err := s.Command(s.ctx, "find", args...).Output()
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", strings.Join(layered, " and "), err)
	}
	return strings.Split(string(out), "\n"), nil
}

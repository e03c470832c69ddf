// Command vm runs the core of the integration tests in a virtual machine: with a
// stock kernel of Debian's, cgroup v2 and AppArmor, which the machine that Stasis
// is developed on may lack.
//
//	contrib/setup.sh && contrib/setup.sh --vm && make build
//	go run ./integration/vm                  # what `make test-vm` does
//	go run ./integration/vm -variant systemd -run TestStats
//
// The machine is QEMU's. It runs on KVM where a kernel really boots there, else it
// is emulated (TCG), some thirty times slower. It has two disks: the Debian that
// contrib/setup.sh --vm makes, and one that is made anew each time, with the tests,
// Stasis, and the programs of the setup's cache. What it writes to them is thrown
// away. The tests write to a serial line, which is copied to stdout and to a file.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	run := flag.String("run", "", "only tests that match, instead of each pass's own list")
	variant := flag.String("variant", "", "only this variant: "+strings.Join(variantNames(), " or "))
	accel := flag.String("accel", "", "kvm or tcg, instead of trying")
	timeout := flag.Duration("timeout", 40*time.Minute, "how long one boot may take")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := test(ctx, *variant, *run, *accel, *timeout); err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		stop()
		os.Exit(1)
	}
}

func variantNames() []string {
	var names []string
	for _, v := range variants {
		names = append(names, v.name)
	}
	return names
}

// test runs the variants, of which one may be named.
func test(ctx context.Context, only, run, accel string, timeout time.Duration) error {
	if only != "" && !slices.Contains(variantNames(), only) {
		return fmt.Errorf("no variant %q: it is %s", only, strings.Join(variantNames(), " or "))
	}
	m := &machine{cache: os.Getenv("STASIS_CACHE"), accel: accel, timeout: timeout}
	if m.cache == "" {
		return errors.New(`STASIS_CACHE is not set: eval "$(contrib/setup.sh --env)"`)
	}
	if _, err := os.Stat(filepath.Join(m.cache, "vm", "root.img")); err != nil {
		return fmt.Errorf("%w: run contrib/setup.sh --vm", err)
	}
	var err error
	if m.dir, err = os.MkdirTemp("", "stasis-vm-"); err != nil {
		return err
	}
	defer os.RemoveAll(m.dir)
	m.results = filepath.Join(m.cache, "vm-results")
	if err := os.MkdirAll(m.results, 0o755); err != nil {
		return err
	}
	if m.accel == "" {
		m.accel = m.tryKVM(ctx)
	}
	// What a test waits for takes much less than it allows, on any CPU.
	slow := 1
	if m.accel == "tcg" {
		slow = 4
	}
	if err := m.makePayload(ctx, run, slow); err != nil {
		return err
	}
	var errs []error
	for _, v := range variants {
		if only == "" || only == v.name {
			if err := m.boot(ctx, v); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", v.name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// A machine is what boots.
type machine struct {
	cache, dir, results string
	accel               string
	timeout             time.Duration
}

func (m *machine) qemu(ctx context.Context, accel, params string, more ...string) *exec.Cmd {
	cpu := "host"
	if accel == "tcg" {
		// QEMU 7.2 gets cmpxchg16b wrong.
		accel, cpu = "tcg,thread=multi", "Nehalem,-cx16"
	}
	args := []string{
		"-nodefaults", "-display", "none", "-no-reboot", "-machine", "q35", "-accel", accel, "-cpu", cpu,
		"-smp", "2", "-m", "3072",
		"-kernel", filepath.Join(m.cache, "vm", "vmlinuz"), "-initrd", filepath.Join(m.cache, "vm", "initrd"),
		"-append", "console=ttyS0 panic=-1 " + params,
	}
	cmd := exec.CommandContext(ctx, filepath.Join(m.cache, "bin", "qemu-system-x86_64"), append(args, more...)...)
	// Where it keeps what the machine writes to its disks; it unlinks that at once.
	cmd.Env = append(os.Environ(), "TMPDIR="+m.dir)
	// It shall not outlive us, and Ctrl-C is for us.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// tryKVM returns kvm if a kernel boots with it, else tcg. A device to open is not
// enough: a machine that is itself a virtual one may have one that does not work.
func (m *machine) tryKVM(ctx context.Context) string {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		fmt.Println("vm: this host has no KVM; emulating the CPU")
		return "tcg"
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	out, err := m.qemu(ctx, "kvm", "stasis.probe", "-serial", "stdio").CombinedOutput()
	if err == nil && strings.Contains(string(out), "stasis-vm: alive") {
		fmt.Println("vm: on KVM")
		return "kvm"
	}
	fmt.Println("vm: no kernel boots on this host's KVM; emulating the CPU")
	return "tcg"
}

// boot runs one variant. It fails if a pass does, or does not end. What the emulator
// did wrong is no answer: then the variant is booted again, at most twice.
func (m *machine) boot(ctx context.Context, v variant) error {
	console := filepath.Join(m.results, v.name+".console.log")
	for again := 0; ; again++ {
		_ = os.Remove(console) // another boot's
		err := m.bootOnce(ctx, v, console)
		if err == nil || ctx.Err() != nil || m.accel != "tcg" || again == 2 {
			return err
		}
		if text, _ := os.ReadFile(console); !emulatorFault(text) {
			return err
		}
		fmt.Printf("vm: %s: %v\nvm: that is a fault of the emulator (see emulatorFault): booting %[1]s again\n", v.name, err)
	}
}

// emulatorFault tells from a machine's console whether its kernel died of QEMU's
// emulation. The kernel changes its own code by putting a breakpoint (int3) first,
// which each CPU that meets it is sent around until the code is whole. QEMU 7.2 with
// a thread per CPU drops its translation of the code just before the store, so the
// other CPU may translate the breakpoint once more and keep it, and runs into it when
// the kernel expects none any more. Nothing that a test does makes a kernel die of a
// breakpoint in its own code. One thread for all CPUs has no such race, but would
// need twice the time for every run.
func emulatorFault(console []byte) bool {
	oops := bytes.Index(console, []byte("Oops: int3: "))
	return oops >= 0 && bytes.Contains(console[oops:], []byte("Kernel panic - not syncing: "))
}

// bootOnce boots a variant and copies what its tests write to stdout.
func (m *machine) bootOnce(ctx context.Context, v variant, console string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, m.timeout, fmt.Errorf("the machine has not ended within %v", m.timeout))
	defer cancel()
	tests := filepath.Join(m.results, v.name+".tests.log")
	log, err := os.Create(tests)
	if err != nil {
		return err
	}
	defer log.Close()
	drive := func(file string) []string {
		return []string{"-drive", "if=virtio,format=raw,snapshot=on,cache=unsafe,file=" + strings.ReplaceAll(file, ",", ",,")}
	}
	cmd := m.qemu(ctx, m.accel, "apparmor=1 security=apparmor systemd.unified_cgroup_hierarchy=1 quiet loglevel=4 "+
		"stasis.variant="+v.name+" stasis.init="+v.init,
		slices.Concat(drive(filepath.Join(m.cache, "vm", "root.img")), drive(filepath.Join(m.dir, "payload.img")),
			[]string{"-serial", "file:" + console, "-serial", "stdio"})...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	started := time.Now()
	fmt.Printf("vm: booting %s\n", v.name)
	if err := cmd.Start(); err != nil {
		return err
	}
	passed, done, rerr := 0, false, error(nil)
	lines := bufio.NewReader(out)
	for rerr == nil {
		var line string
		line, rerr = lines.ReadString('\n')
		if _, err := io.WriteString(io.MultiWriter(log, os.Stdout), line); err != nil {
			return err
		}
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "stasis-vm: pass ") && strings.HasSuffix(line, " ended with 0") {
			passed++
		}
		done = done || line == "stasis-vm: done"
	}
	err = cmd.Wait()
	fmt.Printf("vm: %s: %d of %d passes are good; %v; logs: %s, %s\n",
		v.name, passed, len(v.passes), time.Since(started).Round(time.Second), tests, console)
	switch {
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case err == nil && done && passed == len(v.passes):
		return nil
	case err == nil && done:
		return errors.New("tests failed")
	case err == nil:
		err = errors.New("the machine ended before its tests did")
	}
	return fmt.Errorf("%w; the end of its console:\n%s", err, tail(console))
}

// tail returns the last lines of a file.
func tail(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

package processtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
)

// The test binary impersonates the two commands of a dump and a restore: runc, as far as it
// starts CRIU, talks to it and notes init's pid, and CRIU, as far as it tells how far it is
// (criu/images/rpc.proto): in a dump that it begins, in a restore that there is one
// process, which it makes and holds.

const (
	inputEnv = "STASIS_TEST_INPUT" // the FIFO that the restored process reads
	dumpEnv  = "STASIS_TEST_DUMP"  // a folder with the FIFOs of a dump: see Runtime.dump
	groupEnv = "STASIS_TEST_GROUP" // its control group, or ""
)

func init() {
	switch command() {
	case "criu", "runc":
		// CRIU traces by its first thread, whose number is its pid; and it ends with the
		// thread that has started it.
		runtime.LockOSThread()
	}
}

func command() string { return filepath.Base(os.Args[0]) }

// Main does not return if the test binary was called as one of the commands of
// InstallCRIU.
func Main() {
	var err error
	switch command() {
	case "runc":
		err = runRunc(os.Args)
	case "criu":
		err = runCRIU(os.Args)
	default:
		// Now, as it waits for a child, which a reaper would take.
		_, _ = os.FindProcess(os.Getpid())
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// InstallCRIU puts the commands runc and criu into the test's PATH, and makes the test
// the parent of what they leave.
func InstallCRIU(t *testing.T) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, name := range []string{"runc", "criu"} {
		if err := os.Symlink(self, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
}

// Types of messages.
const (
	typeDump    = 1
	typeRestore = 2
	typeNotify  = 6
)

func runRunc(args []string) error {
	request, pidFile := typeDump, ""
	if !slices.Contains(args, "checkpoint") {
		i := slices.Index(args, "--pid-file")
		if i < 0 || i+1 == len(args) || !slices.Contains(args, "restore") {
			return fmt.Errorf("neither checkpoint nor restore: %q", args)
		}
		request, pidFile = typeRestore, args[i+1]
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	theirs := os.NewFile(uintptr(pair[1]), "socket")
	cmd := exec.Command("criu", "swrk", "3")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	theirs.Close()
	defer cmd.Wait()
	if err := send(pair[0], number(1, uint64(request))); err != nil {
		return err
	}
	pid := 0
	for {
		answer, err := receive(pair[0])
		if err != nil {
			return err
		}
		kind, notify := int(fieldNumber(answer, 1)), field(answer, 5)
		switch {
		case kind == request && fieldNumber(answer, 2) != 1, kind == typeRestore && pid == 0:
			return fmt.Errorf("criu failed: type %d", kind)
		case kind == typeDump:
			return nil
		case kind == typeRestore:
			return os.WriteFile(pidFile, []byte(strconv.Itoa(pid)), 0o600)
		}
		if n := fieldNumber(notify, 2); n != 0 {
			pid = int(n)
		}
		if err := send(pair[0], append(number(1, typeNotify), number(3, 1)...)); err != nil {
			return err
		}
	}
}

func runCRIU(args []string) error {
	if len(args) != 3 || args[1] != "swrk" {
		return fmt.Errorf("not called by a runtime: %q", args)
	}
	fd, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	request, err := receive(fd)
	if err != nil {
		return err
	}
	if fieldNumber(request, 1) == typeDump {
		return criuDump(fd)
	}
	return criuRestore(fd)
}

// Names and contents of the FIFOs of a dump.
const (
	begunFIFO  = "begun"  // one byte, when CRIU has told that it begins
	answerFIFO = "answer" // dumped, or another byte: it fails
	dumped     = 'y'
)

func criuDump(fd int) error {
	if err := tell(fd, "pre-dump"); err != nil {
		return err
	}
	dir := os.Getenv(dumpEnv)
	if err := os.WriteFile(filepath.Join(dir, begunFIFO), []byte{0}, 0); err != nil {
		return err
	}
	answer, err := os.Open(filepath.Join(dir, answerFIFO))
	if err != nil {
		return err
	}
	got := make([]byte, 1)
	if _, err := answer.Read(got); err != nil {
		return err
	}
	success := uint64(0)
	if got[0] == dumped {
		success = 1
	}
	return send(fd, append(number(1, typeDump), number(2, success)...))
}

// tell tells the runtime how far CRIU is, and waits for an answer.
func tell(fd int, script string, more ...byte) error {
	message := slices.Concat(number(1, typeNotify), number(2, 1), bytesField(5, append(bytesField(1, []byte(script)), more...)))
	if err := send(fd, message); err != nil {
		return err
	}
	_, err := receive(fd)
	return err
}

func criuRestore(fd int) error {
	input, err := os.Open(os.Getenv(inputEnv))
	if err != nil {
		return err
	}
	cmd := exec.Command("cat")
	cmd.Stdin = input
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	pid := cmd.Process.Pid
	if _, err := unix.Wait4(pid, nil, 0, nil); err != nil { // until it has executed cat
		return err
	}
	if err := joinGroup(os.Getenv(groupEnv), pid); err != nil {
		return err
	}
	if err := tell(fd, "post-restore", number(2, uint64(pid))...); err != nil {
		_ = cmd.Process.Kill()
		return err
	}
	_ = tell(fd, "pre-resume") // after it CRIU takes no failure for one
	_ = unix.PtraceDetach(pid)
	return send(fd, append(number(1, typeRestore), number(2, 1)...))
}

func number(n protowire.Number, value uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), value)
}

func bytesField(n protowire.Number, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), value)
}

// field is a message's field of bytes, nil if it has none.
func field(message []byte, want protowire.Number) []byte {
	value, _ := find(message, want)
	return value
}

// fieldNumber is a message's field with a number, 0 if it has none.
func fieldNumber(message []byte, want protowire.Number) uint64 {
	_, number := find(message, want)
	return number
}

func find(message []byte, want protowire.Number) (value []byte, number uint64) {
	for len(message) > 0 {
		n, kind, tag := protowire.ConsumeTag(message)
		if tag < 0 {
			return nil, 0
		}
		used := protowire.ConsumeFieldValue(n, kind, message[tag:])
		if used < 0 {
			return nil, 0
		}
		if n == want {
			switch kind {
			case protowire.BytesType:
				value, _ = protowire.ConsumeBytes(message[tag:])
			case protowire.VarintType:
				number, _ = protowire.ConsumeVarint(message[tag:])
			}
		}
		message = message[tag+used:]
	}
	return value, number
}

func send(fd int, message []byte) error {
	_, err := unix.Write(fd, message)
	return err
}

func receive(fd int) ([]byte, error) {
	buf := make([]byte, 4096)
	n, err := unix.Read(fd, buf)
	if err == nil && n == 0 {
		err = errors.New("end of messages")
	}
	return buf[:max(n, 0)], err
}

// Package standin is what an OCI runtime starts in CRIU's place: a program that imports
// this package, such as the shim, becomes CRIU when it is called by that name with the
// environment below.
//
// It does so in init, as the runtime waits for it, and for a dump or a restore starts it
// twice: before main, all other packages of the shim would have been initialized, which
// takes as long as CRIU's own start. Go initializes packages in the order of their names,
// each after those that it imports (go.dev/ref/spec#Package_initialization): this one must
// not import path/filepath, say, for which a hundred others come first.
package standin

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"
)

const (
	// Name is the program that runtimes call.
	Name = "criu"
	// RelayEnv names the socket of the shim's relay, RealEnv the real CRIU. The folder
	// of the stand-in is the first of PATH.
	RelayEnv = "STASIS_CRIU_RELAY"
	RealEnv  = "STASIS_CRIU"
)

func init() {
	if len(os.Args) == 0 || path.Base(os.Args[0]) != Name || os.Getenv(RelayEnv) == "" {
		return
	}
	fmt.Fprintln(os.Stderr, become(os.Args))
	os.Exit(1)
}

// become becomes the real CRIU, and returns only if it cannot. Before, it gives the
// socket to the runtime, which the second argument names, to the shim, and CRIU one to
// the shim instead.
func become(args []string) error {
	if len(args) == 3 && args[1] == "swrk" {
		fd, err := strconv.Atoi(args[2])
		if err == nil {
			err = swap(os.Getenv(RelayEnv), fd)
		}
		if err != nil {
			return fmt.Errorf("hand CRIU's socket to the shim: %w", err)
		}
	}
	var env []string
	for _, v := range os.Environ() {
		if folders, ok := strings.CutPrefix(v, "PATH="); ok {
			_, folders, _ = strings.Cut(folders, ":")
			v = "PATH=" + folders
		}
		if !strings.HasPrefix(v, RelayEnv+"=") && !strings.HasPrefix(v, RealEnv+"=") {
			env = append(env, v)
		}
	}
	real := os.Getenv(RealEnv)
	return os.NewSyscallError("exec "+real, syscall.Exec(real, args, env))
}

// swap gives fd away and puts what comes back in its place.
func swap(socket string, fd int) error {
	s, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(s)
	if err := syscall.Connect(s, &syscall.SockaddrUnix{Name: socket}); err != nil {
		return err
	}
	if err := syscall.Sendmsg(s, []byte{0}, syscall.UnixRights(fd), nil, 0); err != nil {
		return err
	}
	oob := make([]byte, syscall.CmsgSpace(4))
	_, n, _, _, err := syscall.Recvmsg(s, make([]byte, 1), oob, syscall.MSG_CMSG_CLOEXEC)
	if err != nil {
		return err
	}
	messages, err := syscall.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return err
	}
	if len(messages) != 1 {
		return errors.New("got none instead")
	}
	fds, err := syscall.ParseUnixRights(&messages[0])
	if err != nil {
		return err
	}
	for _, got := range fds { // one, for more there was no room
		defer syscall.Close(got)
		err = errors.Join(err, syscall.Dup3(got, fd, 0))
	}
	return err
}

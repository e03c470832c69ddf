package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
)

// items are all kinds of state, in the order in which they are set up.
var items = []item{
	// Of a process itself.
	{"attributes", "", attributes},
	{"heap", "", heap},
	{"threads", "", threads},
	{"counter", "", counter},

	// Files.
	{"file", "", file},
	{"append", "", appendFile},
	{"deleted", "", deleted},
	{"directory", "", directory},
	{"mapping", "", mapping},
	{"tmpfs", "", tmpfs},
	{"devices", "", devices},
	{"flock", "file_locks", lockItem("flock")},
	{"fcntl", "file_locks", lockItem("fcntl")},
	{"ofd", "file_locks", lockItem("ofd")},

	// Between processes.
	{"tree", "", tree},
	{"zombie", "", zombie},
	{"pipe", "", pipe},
	{"fifo", "", fifo},
	{"socketpair", "", socketpair},
	{"scm", "", scm},
	{"memfd", "", memfd},
	{"sysv", "", sysv},
	{"pty", "", pty},
	{"signals", "", signals},

	// Events and time.
	{"eventfd", "", eventfd},
	{"epoll", "", epoll},
	{"inotify", "", inotifyIn("/dev/shm")},
	{"signalfd", "", signalfd},
	{"timerfd", "", timerfd},
	{"itimer", "", itimer},
	{"posixtimer", "", posixTimer},
	{"sleep", "", sleeping},

	// Network.
	{"unix", "", unixStream},
	{"dgram", "", unixDgram},
	{"udp", "", udp},
	{"listen", "", listen},
	{"tcp", "open_tcp", tcp},
	{"out", "open_tcp", out},

	// What CRIU has trouble with.
	{"stopped", "extra: CRIU hangs if it uses the freezer of cgroup v1", stopped},
	{"inotify-rootfs", "extra: irmap", inotifyIn("/var/probe")},
	{"unlinked", "extra: link_remap", unlinked},
	{"pidfd", "extra", pidfd},
	{"ticker", "extra: criu#3162", ticker},
	{"mptcp", "extra: CRIU cannot", mptcp},
	{"iouring", "extra: CRIU cannot", ioUring},
}

// text is the content of files and messages: n letters, the same for the same
// seed.
func text(seed string, n int) []byte {
	var key [32]byte
	copy(key[:], seed)
	r := rand.New(rand.NewChaCha8(key))
	b := make([]byte, n)
	for i := range b {
		b[i] = 'a' + byte(r.IntN(26))
	}
	return b
}

func same(what string, got, want []byte) error {
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%s: got %.60q (%d bytes), want %.60q (%d bytes)", what, got, len(got), want, len(want))
	}
	return nil
}

func equal[T comparable](what string, got, want T) error {
	if got != want {
		return fmt.Errorf("%s: got %v, want %v", what, got, want)
	}
	return nil
}

// all calls the functions until one fails.
func all(fs ...func() error) error {
	for _, f := range fs {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

// stream is one direction of something that has bytes in flight.
type stream struct {
	seed string
	sent int
	send func([]byte) error
	recv func(n int) ([]byte, error)
}

// fill puts bytes on their way.
func (s *stream) fill() error {
	s.sent++
	return s.send(text(fmt.Sprint(s.seed, s.sent), inFlight))
}

// check lets those arrive that are on their way, and sends others.
func (s *stream) check() error {
	got, err := s.recv(inFlight)
	if err != nil {
		return err
	}
	return errors.Join(same("bytes in flight", got, text(fmt.Sprint(s.seed, s.sent), inFlight)), s.fill())
}

// inFlight is how many bytes are always on their way.
const inFlight = 1000

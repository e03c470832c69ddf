package stack

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A Netns is a network namespace that outlives containers, joined to the
// host's by a pair of devices, so that a restored container finds its old
// address.
type Netns struct {
	Name string
	// Path is that of the namespace's file.
	Path string
	// HostAddr and Addr are the addresses of its two ends.
	HostAddr, Addr string
	device         string
}

// NewNetns makes a network namespace. Stop deletes it.
func (s *Stack) NewNetns() *Netns {
	s.tb.Helper()
	// A net of our own in a range set aside for benchmarks, which no host has.
	number := s.claim("198.18.0.0/15", 512)
	n := &Netns{
		Name:     fmt.Sprintf("%s%s-%d", dirPrefix, s.ID, len(s.netns)),
		device:   fmt.Sprintf("st%s%d", s.ID, len(s.netns)),
		HostAddr: fmt.Sprintf("198.%d.%d.1", 18+number>>8, number&0xff),
		Addr:     fmt.Sprintf("198.%d.%d.2", 18+number>>8, number&0xff),
	}
	n.Path = filepath.Join("/run/netns", n.Name)
	s.netns = append(s.netns, n)
	for _, args := range []string{
		"netns add " + n.Name,
		"link add " + n.device + " type veth peer name eth0 netns " + n.Name,
		"addr add " + n.HostAddr + "/24 dev " + n.device,
		"link set " + n.device + " up",
		"-n " + n.Name + " addr add " + n.Addr + "/24 dev eth0",
		"-n " + n.Name + " link set eth0 up",
		"-n " + n.Name + " link set lo up",
		"-n " + n.Name + " route add default via " + n.HostAddr,
	} {
		if err := ip(args); err != nil {
			s.tb.Fatalf("%v", err)
		}
	}
	return n
}

// claim returns a number below n that no other stack on this host has for the same
// thing, until Stop. A listener in the kernel's abstract namespace is what others
// see, so that a test that dies leaves no claim.
func (s *Stack) claim(thing string, n int) int {
	s.tb.Helper()
	start := rand.IntN(n)
	for i := range n {
		number := (start + i) % n
		l, err := net.Listen("unix", fmt.Sprintf("@stasis-test/%s/%d", thing, number))
		if err == nil {
			s.claims = append(s.claims, l)
			return number
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			s.tb.Fatalf("claim a part of %s: %v", thing, err)
		}
	}
	s.tb.Fatalf("all of %s is in use", thing)
	return 0
}

// With makes a container live in the network namespace.
func (n *Netns) With() oci.SpecOpts {
	return oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: n.Path})
}

// Firewall returns the rules of iptables and the tables of nftables in the
// network namespace. While CRIU dumps or restores TCP connections, its lock is
// among them.
func (n *Netns) Firewall() ([]string, error) {
	var rules []string
	err := inNetns(n.Path, func() { rules = firewallRules() })
	return rules, err
}

// makeNetnsShared makes later network namespaces visible in mount namespaces
// that are made from now on.
func makeNetnsShared(id string) error {
	name := dirPrefix + id + "-none"
	if err := ip("netns add " + name); err != nil {
		return err
	}
	return ip("netns del " + name)
}

// delete fails if the network namespace is not there any more, or something
// still lives in it.
func (n *Netns) delete() error {
	pids, err := exec.Command("ip", "netns", "pids", n.Name).Output()
	if err == nil && len(pids) > 0 {
		err = fmt.Errorf("processes in it: %s", strings.Join(strings.Fields(string(pids)), " "))
	}
	rules, _ := n.Firewall()
	for _, r := range rules {
		if strings.Contains(r, "CRIU") {
			err = fmt.Errorf("firewall left in it: %s", r)
		}
	}
	// Its other end goes with it.
	ip("link del " + n.device)
	if err := ip("netns del " + n.Name); err != nil {
		return err
	}
	return err
}

// removeNetns removes the network of a stack that nobody knows any more.
func removeNetns(id string) {
	ip("link del " + bridge(id))
	names, _ := filepath.Glob(filepath.Join("/run/netns", dirPrefix+id+"-*"))
	for _, n := range names {
		ip("netns del " + filepath.Base(n))
	}
}

func ip(args string) error {
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w\n%s", args, err, out)
	}
	return nil
}

// inNetns calls f in the network namespace.
func inNetns(path string, f func()) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	done := make(chan struct{})
	var enter func()
	enter = func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread never ends, so it must stay where it is. While
			// it is taken here, it cannot be another goroutine's.
			defer runtime.UnlockOSThread()
			go enter()
			<-done
			return
		}
		// Not unlocked: the thread ends with the goroutine, instead of being
		// used by others.
		defer close(done)
		if err = unix.Setns(fd, unix.CLONE_NEWNET); err == nil {
			f()
		}
	}
	go enter()
	<-done
	return err
}

package checkpoint

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// AnnotationTCP says what a restore does with established TCP connections:
// "keep" or "close". Without it they are kept if the container has all their
// local addresses, and closed if not.
const AnnotationTCP = "stasis.run/tcp"

// mustCloseTCP decides whether the connections of a checkpoint have to be
// closed. CRIU knows only all or nothing.
func mustCloseTCP(ckpt *Checkpoint, spec *specs.Spec) (bool, error) {
	// Connections that CRIU was told to leave out, a restore has to tell it again.
	if inv, err := ckpt.Inventory(); err != nil || inv.GetTcpClose() {
		return inv.GetTcpClose(), err
	}
	if !ckpt.options.OpenTCP {
		return false, nil
	}
	how, asked := spec.Annotations[AnnotationTCP]
	if !asked {
		return lacksAddress(ckpt, spec)
	}
	return how == "close", CheckTCP(how)
}

// CheckTCP refuses a value that AnnotationTCP cannot have.
func CheckTCP(how string) error {
	if how != "keep" && how != "close" {
		return fault.Invalid("annotation %s=%q: it is keep or close", AnnotationTCP, how)
	}
	return nil
}

// lacksAddress tells whether connections of a checkpoint have a local address
// that the container's network namespace has not.
func lacksAddress(ckpt *Checkpoint, spec *specs.Spec) (bool, error) {
	var have []netip.Addr // none but loopback's in a namespace that is made anew
	if path, own := networkNamespace(spec); !own {
		var err error
		if have, err = addressesIn(path); err != nil {
			return false, fmt.Errorf("list the addresses of the container's network namespace: %w", err)
		}
	}
	connected, err := ckpt.EstablishedTCP()
	if err != nil {
		return false, err
	}
	for _, addr := range connected {
		if !addr.IsLoopback() && !slices.Contains(have, addr) {
			return true, nil
		}
	}
	return false, nil
}

// networkNamespace returns the path of the network namespace that a spec has
// the container join, "" for the shim's own; own says that it gets a new one
// instead.
func networkNamespace(spec *specs.Spec) (path string, own bool) {
	if spec.Linux == nil {
		return "", false
	}
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			return ns.Path, ns.Path == ""
		}
	}
	return "", false
}

// addressesIn lists the addresses of the interfaces in a network namespace, ""
// for this process's own.
func addressesIn(path string) (addrs []netip.Addr, err error) {
	err = InNamespace(path, unix.CLONE_NEWNET, func() error {
		found, err := net.InterfaceAddrs()
		for _, a := range found {
			if prefix, err := netip.ParsePrefix(a.String()); err == nil {
				addrs = append(addrs, prefix.Addr().Unmap())
			}
		}
		return err
	})
	return addrs, err
}

// InNamespace runs fn on a thread that is in the namespace at path, of the kind that
// the flag of clone(2) names; "" is the caller's own. In a mount namespace the working
// folder and the root are the namespace's root.
func InNamespace(path string, kind int, fn func() error) error {
	if path == "" {
		return fn()
	}
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	done := make(chan struct{})
	var enter func()
	enter = func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			// The main thread never ends, so it must stay where it is. While
			// it is taken here, it cannot be another goroutine's.
			defer runtime.UnlockOSThread()
			go enter()
			<-done
			return
		}
		// Not unlocked: the thread is in the wrong namespace, and ends with
		// the goroutine.
		defer close(done)
		if kind == unix.CLONE_NEWNS {
			// Threads share them, and then the kernel lets none change its namespace.
			if err = os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_FS)); err != nil {
				return
			}
		}
		if err = unix.Setns(int(ns.Fd()), kind); err != nil {
			err = fmt.Errorf("enter %s: %w", path, err)
			return
		}
		err = fn()
	}
	go enter()
	<-done
	return err
}

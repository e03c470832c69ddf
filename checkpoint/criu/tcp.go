package criu

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/process"
)

// mustCloseTCP decides whether the connections of a checkpoint have to be
// closed. CRIU knows only all or nothing.
func mustCloseTCP(ckpt *checkpoint.Checkpoint, spec *specs.Spec) (bool, error) {
	// Connections that CRIU was told to leave out, a restore has to tell it again.
	if inv, err := ckpt.Inventory(); err != nil || inv.GetTcpClose() {
		return inv.GetTcpClose(), err
	}
	if !ckpt.Options().OpenTCP {
		return false, nil
	}
	how, asked := spec.Annotations[checkpoint.AnnotationTCP]
	if !asked {
		return lacksAddress(ckpt, spec)
	}
	return how == "close", checkpoint.CheckTCP(how)
}

// lacksAddress tells whether connections of a checkpoint have a local address
// that the container's network namespace has not.
func lacksAddress(ckpt *checkpoint.Checkpoint, spec *specs.Spec) (bool, error) {
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
	err = process.InNamespace(path, unix.CLONE_NEWNET, func() error {
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

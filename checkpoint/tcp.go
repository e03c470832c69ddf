package checkpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// AnnotationTCP says what a restore does with established TCP connections:
// "keep" or "close". Without it they are kept if the container has all their
// local addresses, and closed if not.
const AnnotationTCP = "stasis.run/tcp"

// mustCloseTCP decides whether the connections of a checkpoint have to be
// closed. CRIU knows only all or nothing.
func mustCloseTCP(img *Image, spec *specs.Spec) (bool, error) {
	switch how := spec.Annotations[AnnotationTCP]; how {
	case "keep":
		return false, nil
	case "close":
		return true, nil
	case "":
	default:
		return false, fmt.Errorf("annotation %s=%q: it is keep or close: %w", AnnotationTCP, how, errdefs.ErrInvalidArgument)
	}
	path, own := networkNamespace(spec)
	if own {
		// CRIU makes the namespace as it was, its addresses included.
		return false, nil
	}
	have, err := addressesIn(path)
	if err != nil {
		return false, fmt.Errorf("list the addresses of the container's network namespace: %w", err)
	}
	connected, err := img.EstablishedTCP()
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
	err = inNetworkNamespace(path, func() error {
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

// inNetworkNamespace runs fn on a thread that is in the network namespace at
// path; "" is the caller's own.
func inNetworkNamespace(path string, fn func() error) error {
	if path == "" {
		return fn()
	}
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread is in the wrong namespace, and ends
		// with the goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter %s: %w", path, err)
			return
		}
		done <- fn()
	}()
	return <-done
}

// annotationCRIUConfig names a CRIU configuration file for runc and crun. It is
// the way to options that the runtime's command line lacks (tcp-close in runc).
const annotationCRIUConfig = "org.criu.config"

// runtimeCRIUConfigs are the files that the runtimes use without the
// annotation.
var runtimeCRIUConfigs = []string{"/etc/criu/runc.conf", "/etc/criu/crun.conf"}

// setCRIUConfig has the runtime use a CRIU configuration file that holds lines,
// after those of the file it would have used. With no lines to add, and none
// added before, config.json stays as it is.
func setCRIUConfig(bundle string, spec *specs.Spec, lines string) error {
	path := filepath.Join(bundle, "criu.conf")
	current := spec.Annotations[annotationCRIUConfig]
	if lines == "" && current != path {
		return nil
	}
	if current != path {
		if err := writeCRIUConfig(path, current, lines); err != nil {
			return fmt.Errorf("write CRIU's configuration: %w", err)
		}
		if spec.Annotations == nil {
			spec.Annotations = map[string]string{}
		}
		spec.Annotations[annotationCRIUConfig] = path
		return writeSpecAnnotations(bundle, spec.Annotations)
	}
	return nil // an earlier try of this restore wrote it
}

func writeCRIUConfig(path, base, lines string) error {
	candidates := runtimeCRIUConfigs
	if base != "" {
		candidates = []string{base}
	}
	var config strings.Builder
	for _, c := range candidates {
		data, err := os.ReadFile(c)
		if errors.Is(err, os.ErrNotExist) && base == "" {
			continue
		}
		if err != nil {
			return err
		}
		config.Write(data)
		config.WriteByte('\n')
		break
	}
	config.WriteString(lines)
	return os.WriteFile(path, []byte(config.String()), 0o600)
}

// writeSpecAnnotations replaces the annotations of the bundle's config.json and
// leaves the rest as it is, fields this build does not know included.
func writeSpecAnnotations(bundle string, annotations map[string]string) error {
	path := filepath.Join(bundle, "config.json")
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var config map[string]json.RawMessage
	if err := json.Unmarshal(data, &config); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if config["annotations"], err = json.Marshal(annotations); err != nil {
		return err
	}
	if data, err = json.Marshal(config); err != nil {
		return err
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

package task

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// nodeConfig is what the node's administrator allows; docs/kubernetes.md has the
// file's form. It is read for each restore that it has a say in, so that a change
// needs no restart of anything.
type nodeConfig struct {
	Restore struct {
		// Archives are the folders that restores may take archives from.
		Archives []string `toml:"archives"`
		// Namespaces are, by namespace of Kubernetes, those others whose
		// checkpoints its pods may restore; "" is that of what was in no pod.
		Namespaces map[string][]string `toml:"namespaces"`
		// Unsigned is what pods get that ask for a checkpoint which no key that is
		// trusted has signed. Where root names the checkpoint, it has no say.
		Unsigned unsigned `toml:"unsigned"`
	} `toml:"restore"`

	path string // for errors
}

// unsigned is what becomes of a checkpoint that is not signed.
type unsigned string

const (
	unsignedRefuse unsigned = "refuse" // the default
	unsignedCheck  unsigned = "check"  // it is checked as every checkpoint is
)

// defaultNodeConfig need not exist, unlike one that the runtime's options name. It is
// /etc/stasis/config.toml.
func defaultNodeConfig() string { return filepath.Join(string(sign.DefaultDir()), "config.toml") }

const (
	// kubeletArchives is where the kubelet puts checkpoints.
	kubeletArchives = "/var/lib/kubelet/checkpoints"
	// anyNamespace stands for every namespace, and for none.
	anyNamespace = "*"
)

// readNodeConfig reads the file that the runtime's options name, or the default
// one. Who could write it could read the memory of other people's containers, so
// it has to be root's.
func readNodeConfig(path string) (*nodeConfig, error) {
	n := &nodeConfig{path: path}
	if path == "" {
		n.path = defaultNodeConfig()
	}
	n.Restore.Unsigned = unsignedRefuse
	n.Restore.Archives = []string{kubeletArchives}
	data, err := readRootFile(n.path)
	if errors.Is(err, fs.ErrNotExist) && path == "" {
		return n, nil
	}
	if err != nil {
		return nil, fault.Unusable("read the node's configuration: %v", err)
	}
	if err := decodeTOML(data, n); err != nil {
		return nil, fault.Unusable("the node's configuration %s: %v", n.path, err)
	}
	if u := n.Restore.Unsigned; u != unsignedRefuse && u != unsignedCheck {
		return nil, fault.Unusable("the node's configuration %s: restore.unsigned is %q; it is %s or %s", n.path, u, unsignedRefuse, unsignedCheck)
	}
	for _, folder := range n.Restore.Archives {
		if !filepath.IsAbs(folder) || filepath.Clean(folder) != folder {
			return nil, fault.Unusable("the node's configuration %s: restore.archives: %q is not a plain absolute path", n.path, folder)
		}
	}
	return n, nil
}

// readRootFile reads a small file that nobody but root can write.
func readRootFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, fmt.Errorf("%s: not a regular file", path)
	case st.Uid != 0:
		return nil, fmt.Errorf("%s is owned by user %d; it has to be root's", path, st.Uid)
	case st.Mode&0o022 != 0:
		return nil, fmt.Errorf("%s has mode %o, so others than root may write it: chmod 644 it", path, st.Mode&0o7777)
	}
	return readBounded(f)
}

func readBounded(f *os.File) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(body) > maxConfig {
		err = fmt.Errorf("%s: larger than %d bytes", f.Name(), maxConfig)
	}
	return body, err
}

// decodeTOML decodes strictly: a key that does not exist may be one misspelt.
func decodeTOML(data []byte, v any) error {
	err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(v)
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		return fmt.Errorf("unknown key %q", strings.Join(strict.Errors[0].Key(), "."))
	}
	return err
}

// allowNamespace tells whether a pod in the namespace to may restore a checkpoint
// of a pod in the namespace from, or of a container in no pod, which is "".
func (n *nodeConfig) allowNamespace(from, to string) error {
	if from == to {
		return nil
	}
	for _, of := range []string{to, anyNamespace} {
		if list := n.Restore.Namespaces[of]; slices.Contains(list, from) || slices.Contains(list, anyNamespace) {
			return nil
		}
	}
	whose := fmt.Sprintf("is of namespace %q", from)
	if from == "" {
		whose = "is not known to be of any pod"
	}
	return fault.New(errdefs.ErrPermissionDenied, "the checkpoint %s, and this pod is in namespace %q: the node's configuration (%s) would have to allow that: [restore.namespaces] %s = [%q]",
		whose, to, n.path, to, from)
}

// openArchive opens an archive that the configuration allows. Nothing in its path
// below the allowed folder may be a link: who can write there could else have a
// file read that is somebody else's.
func (n *nodeConfig) openArchive(path string) (*os.File, error) {
	for _, folder := range n.Restore.Archives {
		inside, err := filepath.Rel(folder, path)
		if err != nil || inside == "." || !filepath.IsLocal(inside) {
			continue
		}
		f, err := openBeneath(folder, inside)
		switch {
		case errors.Is(err, unix.ELOOP), errors.Is(err, unix.EXDEV):
			return nil, fault.New(errdefs.ErrPermissionDenied, "archive %s: there is a link in its path, and none is followed", path)
		case errors.Is(err, fs.ErrNotExist):
			return nil, fault.New(errdefs.ErrNotFound, "archive %s is not on this node", path)
		case err != nil:
			return nil, fmt.Errorf("open archive %s: %w", path, err)
		}
		return f, nil
	}
	return nil, fault.New(errdefs.ErrPermissionDenied, "archive %s is in none of the folders that restores may take archives from (%s): move it there, or have restore.archives of %s name its folder",
		path, strings.Join(n.Restore.Archives, ", "), n.path)
}

func openBeneath(folder, inside string) (*os.File, error) {
	dir, err := os.OpenFile(folder, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fd, err := unix.Openat2(int(dir.Fd()), inside, &unix.OpenHow{
		// O_NONBLOCK, lest a FIFO stops us.
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), filepath.Join(folder, inside))
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

package rootfs

import (
	"errors"
	"strings"

	"golang.org/x/sys/unix"
)

// xattrs are the extended attributes of one file: by an open descriptor where
// there is one, as that is much faster, else by a path, without following it.
type xattrs struct {
	list   func([]byte) (int, error)
	get    func(string, []byte) (int, error)
	set    func(string, []byte) error
	remove func(string) error
}

func xattrsOf(fd int) xattrs {
	return xattrs{
		list:   func(b []byte) (int, error) { return unix.Flistxattr(fd, b) },
		get:    func(name string, b []byte) (int, error) { return unix.Fgetxattr(fd, name, b) },
		set:    func(name string, b []byte) error { return unix.Fsetxattr(fd, name, b, 0) },
		remove: func(name string) error { return unix.Fremovexattr(fd, name) },
	}
}

func xattrsAt(path string) xattrs {
	return xattrs{
		list:   func(b []byte) (int, error) { return unix.Llistxattr(path, b) },
		get:    func(name string, b []byte) (int, error) { return unix.Lgetxattr(path, name, b) },
		set:    func(name string, b []byte) error { return unix.Lsetxattr(path, name, b, 0) },
		remove: func(name string) error { return unix.Lremovexattr(path, name) },
	}
}

// names lists the attributes. Where the file system has none there are none.
func (x xattrs) names() ([]string, error) {
	n, err := x.list(nil)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil || n == 0 {
		return nil, err
	}
	buf := make([]byte, n)
	// Fewer than it said, on overlayfs, which hides its own.
	if n, err = x.list(buf); err != nil || n == 0 {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00"), nil
}

// value returns an attribute, and false if there is none of that name.
func (x xattrs) value(name string) ([]byte, bool, error) {
	n, err := x.get(name, nil)
	for err == nil && n > 0 {
		buf := make([]byte, n)
		if n, err = x.get(name, buf); err == nil {
			return buf[:n], true, nil
		}
		if errors.Is(err, unix.ERANGE) { // it has grown
			n, err = x.get(name, nil)
		}
	}
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
		return nil, false, nil
	}
	return nil, err == nil, err
}

// carried returns the attributes that a layer carries.
func (x xattrs) carried() (map[string]string, error) {
	names, err := x.names()
	if err != nil {
		return nil, err
	}
	var all map[string]string
	for _, name := range names {
		if !carries(name) {
			continue
		}
		value, ok, err := x.value(name)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		if all == nil {
			all = map[string]string{}
		}
		all[name] = string(value)
	}
	return all, nil
}

// carries tells whether a layer has an attribute: it is the container's, and
// means the same on another host. user.overlay.* is overlayfs's own in a user
// namespace.
func carries(name string) bool {
	switch name {
	case "security.capability", "system.posix_acl_access", "system.posix_acl_default":
		return true
	}
	return strings.HasPrefix(name, "user.") && !strings.HasPrefix(name, "user.overlay.")
}

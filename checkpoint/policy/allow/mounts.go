package allow

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// EngineFile tells whether a path is one of those where Podman, CRI-O and the
// kubelet bind a file into every container that they make for it. /dev/shm is a
// folder, of Podman's.
func EngineFile(destination string) bool {
	switch destination {
	case "/dev/shm", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv", "/dev/termination-log":
		return true
	}
	return false
}

// IsBind tells whether a mount has a source on the host.
func IsBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

// fileSystem is one of the kernel's that every container may have.
type fileSystem struct {
	place    string // where; "" for anywhere
	readOnly bool
	options  []string // besides plainOptions; those that end in = have a value
}

var fileSystems = map[string]fileSystem{
	"proc":    {"/proc", false, []string{"hidepid=", "subset=", "gid="}},
	"sysfs":   {"/sys", true, nil},
	"cgroup":  {"/sys/fs/cgroup", true, []string{"nsdelegate", "memory_recursiveprot"}},
	"cgroup2": {"/sys/fs/cgroup", true, []string{"nsdelegate", "memory_recursiveprot"}},
	"mqueue":  {"/dev/mqueue", false, nil},
	"devpts":  {"/dev/pts", false, []string{"newinstance", "ptmxmode=", "mode=", "uid=", "gid=", "max="}},
	"tmpfs": {"", false, []string{"size=", "mode=", "uid=", "gid=", "nr_inodes=", "nr_blocks=", "huge=", "mpol=", "noswap",
		"inode32", "inode64", "tmpcopyup", "notmpcopyup"}},
}

// plainOptions are flags of the kernel, and propagation that leads out of no
// container.
var plainOptions = []string{
	"ro", "rw", "rro", "rrw", "nosuid", "suid", "rnosuid", "rsuid", "nodev", "dev", "rnodev", "rdev", "noexec", "exec", "rnoexec", "rexec",
	"relatime", "norelatime", "rrelatime", "noatime", "atime", "rnoatime", "strictatime", "nostrictatime", "nodiratime", "diratime",
	"nosymfollow", "symfollow", "sync", "async", "dirsync", "mand", "nomand", "silent", "loud", "iversion", "noiversion", "defaults",
	"private", "rprivate", "slave", "rslave", "unbindable", "runbindable",
}

func (b *builder) takeMounts() {
	for i, m := range b.asked.Mounts {
		field := fmt.Sprintf("mounts[%d]", i)
		if taken, ok := b.mount(field, m); ok {
			b.spec.Mounts = append(b.spec.Mounts, taken)
		}
	}
}

// mount returns a mount as the new container gets it, and false if it gets none.
func (b *builder) mount(field string, m specs.Mount) (specs.Mount, bool) {
	to := *clone(&m)
	if !plainPath(m.Destination) || path.Clean(m.Destination) == "/" {
		b.refuse(field, "a mount at %s", quote(m.Destination))
		return to, false
	}
	where := path.Clean(m.Destination)
	for _, option := range m.Options {
		switch {
		case option == "shared" || option == "rshared":
			b.refuse(field, "a mount at %s whose mounts the host would share", quote(m.Destination))
			return to, false
		case strings.HasPrefix(option, "context="):
			b.label(field, strings.Trim(strings.TrimPrefix(option, "context="), `"`), "container_file_t")
		}
	}
	if IsBind(m) {
		return to, b.bind(field, where, &to)
	}
	fs, known := fileSystems[m.Type]
	if !known {
		return to, b.ask(slices.Contains(b.g.Mounts, All), "--allow-mount", All, field, "a mount of type %s from %s at %s, with options %s",
			quote(m.Type), quote(m.Source), quote(m.Destination), quote(strings.Join(m.Options, ",")))
	}
	if len(m.UIDMappings)+len(m.GIDMappings) > 0 {
		b.refuse(field, "a mount of type %s with other owners", quote(m.Type))
	}
	b.options(field, m, fs.options)
	if !printable(m.Source) { // else it is only a name
		b.refuse(field, "a mount of %s", quote(m.Source))
	}
	switch {
	case fs.place != "" && where != fs.place:
		return to, b.ask(b.mountGranted(m.Type, m.Destination), "--allow-mount", m.Type+":"+m.Destination, field,
			"a mount of type %s at %s, where nothing of it is masked", m.Type, quote(m.Destination))
	case fs.readOnly && !readOnly(m.Options):
		return to, b.ask(b.mountGranted(m.Type, m.Destination), "--allow-mount", m.Type+":"+m.Destination, field,
			"a writable mount of type %s at %s", m.Type, quote(m.Destination))
	}
	return to, true
}

// bind is mount for one with a source on the host.
func (b *builder) bind(field, where string, m *specs.Mount) bool {
	if m.Type != "bind" && m.Type != "none" && m.Type != "" {
		b.refuse(field, "a mount at %s that is of type %s and a bind", quote(m.Destination), quote(m.Type))
		return false
	}
	b.options(field, *m, []string{"bind", "rbind"})
	if EngineFile(where) && !b.mountGranted(m.Source, m.Destination) && !b.g.Privileged {
		m.Source, m.UIDMappings, m.GIDMappings = "", nil, nil
		return true
	}
	if !plainPath(m.Source) {
		b.refuse(field, "a mount of %s", quote(m.Source))
		return false
	}
	how := "writable"
	if readOnly(m.Options) {
		how = "read-only"
	}
	if len(m.UIDMappings)+len(m.GIDMappings) > 0 {
		how += ", with other owners"
	}
	return b.ask(b.mountGranted(m.Source, m.Destination), "--allow-mount", m.Source+":"+m.Destination, field,
		"the host's %s at %s, %s", quote(m.Source), quote(m.Destination), how)
}

// mountGranted looks for SRC or SRC:DST. A source with a colon could be taken for
// both, and needs the second form.
func (b *builder) mountGranted(source, destination string) bool {
	if strings.Contains(source, ":") {
		return has(b.g.Mounts, source+":"+destination)
	}
	return has(b.g.Mounts, source, source+":"+destination)
}

// options refuses options that are not known to be harmless.
func (b *builder) options(field string, m specs.Mount, more []string) {
	for _, option := range m.Options {
		name, _, valued := strings.Cut(option, "=")
		if valued {
			name += "="
		}
		if !printable(option) || strings.Contains(option, ",") && !strings.HasPrefix(option, "context=") ||
			!slices.Contains(plainOptions, name) && !slices.Contains(more, name) && name != "context=" {
			b.refuse(field, "a mount at %s with option %s", quote(m.Destination), quote(option))
		}
	}
}

// readOnly goes by the last word that is said about it.
func readOnly(options []string) bool {
	is := false
	for _, option := range options {
		switch option {
		case "ro":
			is = true
		case "rw", "rrw", "defaults":
			is = false
		}
	}
	return is
}

// plainPath tells whether a path is absolute, and leads nowhere else than it says.
func plainPath(p string) bool {
	return path.IsAbs(p) && printable(p) && !slices.Contains(strings.Split(p, "/"), "..")
}

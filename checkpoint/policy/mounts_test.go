package policy

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

const mountsImage = "mountpoints-13.img"

// mount lets fn change one mount of the checkpoint.
func (f *forgery) mount(at string, fn func(*mnt.MntEntry)) {
	f.t.Helper()
	found := false
	alter(f, mountsImage, "MNTS", func(all []*mnt.MntEntry) []*mnt.MntEntry {
		for _, m := range all {
			if m.GetMountpoint() == at {
				fn(m)
				found = true
			}
		}
		return all
	})
	if !found {
		f.t.Fatalf("no mount at %s", at)
	}
}

func (f *forgery) addMount(m *mnt.MntEntry) {
	f.t.Helper()
	alter(f, mountsImage, "MNTS", func(all []*mnt.MntEntry) []*mnt.MntEntry {
		base := proto.Clone(all[0]).(*mnt.MntEntry)
		base.ExtKey, base.MntId, base.ParentMntId = nil, proto.Uint32(9000+uint32(len(all))), nil
		proto.Merge(base, m)
		if base.ParentMntId == nil { // that by path
			at := ""
			for _, other := range all {
				if o := other.GetMountpoint(); len(o) > len(at) && o != base.GetMountpoint() && isBelow(base.GetMountpoint(), o) {
					at, base.ParentMntId = o, other.MntId
				}
			}
		}
		return append(all, base)
	})
}

func (f *forgery) removeMount(at string) {
	f.t.Helper()
	alter(f, mountsImage, "MNTS", func(all []*mnt.MntEntry) (rest []*mnt.MntEntry) {
		for _, m := range all {
			if m.GetMountpoint() != at {
				rest = append(rest, m)
			}
		}
		return rest
	})
}

func TestMounts(t *testing.T) {
	for _, tc := range []struct {
		name string
		fn   func(*forgery)
		want string // "" if it passes
	}{
		{"one more", func(f *forgery) {
			f.addMount(&mnt.MntEntry{Mountpoint: proto.String("/host"), Fstype: proto.Uint32(16), Fsname: proto.String("ext4"),
				Source: proto.String("/dev/sda1"), RootDev: proto.Uint32(8388609)})
		}, `the checkpoint has a mount at "/host", where the spec has none`},
		{"one that a privileged process makes", func(f *forgery) {
			f.addMount(&mnt.MntEntry{Mountpoint: proto.String("/mnt"), Fstype: proto.Uint32(uint32(mnt.Fstype_TMPFS))})
			f.grantCap("CAP_SYS_ADMIN")
		}, ""},
		{"one that no process makes", func(f *forgery) {
			f.addMount(&mnt.MntEntry{Mountpoint: proto.String("/mnt"), Fstype: proto.Uint32(16), RootDev: proto.Uint32(8388609)})
			f.grantCap("CAP_SYS_ADMIN")
		}, `a mount at "/mnt"`},
		{"one less", func(f *forgery) { f.removeMount("/etc/hosts") }, "the checkpoint has no mount at /etc/hosts, where the spec has one"},
		{"one more in the spec", func(f *forgery) {
			f.spec.Mounts = append(f.spec.Mounts, specs.Mount{Destination: "/data", Type: "bind", Source: "/data"})
		}, "the checkpoint has no mount at /data"},
		{"a link in the root filesystem", func(f *forgery) {
			must(f.t, os.Mkdir(filepath.Join(f.root, "new"), 0o755))
			must(f.t, os.Symlink("/new", filepath.Join(f.root, "old")))
			f.spec.Mounts = append(f.spec.Mounts, specs.Mount{Destination: "/old/data", Type: "bind", Source: "/data"})
			f.addMount(&mnt.MntEntry{Mountpoint: proto.String("/new/data"), ExtKey: proto.String("/new/data"), RootDev: proto.Uint32(266338304)})
		}, ""},
		{"twice", func(f *forgery) {
			f.addMount(&mnt.MntEntry{Mountpoint: proto.String("/proc/sys"), Fstype: proto.Uint32(1), Root: proto.String("/sys")})
		}, `mount "/proc/sys" is there twice`},
		{"unmasked", func(f *forgery) { f.removeMount("/proc/keys") }, "/proc/keys is not masked"},
		{"masked by another", func(f *forgery) {
			f.mount("/proc/keys", func(m *mnt.MntEntry) { m.ExtKey = proto.String("/etc/hosts") })
		}, `"/proc/keys" is not masked`},
		{"writable", func(f *forgery) {
			f.mount("/proc/sys", func(m *mnt.MntEntry) { *m.Flags &^= unix.MS_RDONLY })
		}, `"/proc/sys" is not read-only`},
		{"missing read-only", func(f *forgery) { f.removeMount("/proc/sys") }, "/proc/sys is not read-only"},
		{"another folder read-only", func(f *forgery) {
			f.mount("/proc/sys", func(m *mnt.MntEntry) { m.Root = proto.String("/irq") })
		}, `"/proc/sys" is not read-only`},
		{"writable sysfs", func(f *forgery) {
			f.mount("/sys", func(m *mnt.MntEntry) { *m.Flags &^= unix.MS_RDONLY })
		}, `the mount at "/sys" is not ro, as the spec has it`},
		{"set-user-ID programs", func(f *forgery) {
			f.mount("/dev", func(m *mnt.MntEntry) { *m.Flags &^= unix.MS_NOSUID })
		}, `the mount at "/dev" is not nosuid`},
		{"writable cgroup", func(f *forgery) {
			f.mount("/sys/fs/cgroup/memory", func(m *mnt.MntEntry) { *m.Flags &^= unix.MS_RDONLY })
		}, `the mount at "/sys/fs/cgroup/memory" is not ro`},
		{"host's cgroup", func(f *forgery) {
			f.mount("/sys/fs/cgroup/memory", func(m *mnt.MntEntry) { m.ExtKey, m.Root = nil, proto.String("/") })
		}, `a mount at "/sys/fs/cgroup/memory", where the spec has none`},
		{"another type", func(f *forgery) {
			f.mount("/dev/mqueue", func(m *mnt.MntEntry) { m.Fstype = proto.Uint32(1) })
		}, `the mount at "/dev/mqueue" is a "proc", the spec has a mqueue`},
		{"overlay", func(f *forgery) {
			f.mount("/dev/mqueue", func(m *mnt.MntEntry) { m.Fstype = proto.Uint32(uint32(mnt.Fstype_OVERLAYFS)) })
		}, `is a "overlayfs", the spec has a mqueue`},
		{"another volume", func(f *forgery) {
			f.mount("/etc/hosts", func(m *mnt.MntEntry) { m.ExtKey = proto.String("/etc/resolv.conf") })
		}, `the mount at "/etc/hosts" is that of "/etc/resolv.conf"`},
		{"own in place of a volume", func(f *forgery) {
			f.mount("/etc/hosts", func(m *mnt.MntEntry) { m.ExtKey = nil })
		}, `the mount at "/etc/hosts" is one of the checkpoint's own`},
		{"volume in place of its own", func(f *forgery) {
			f.mount("/dev/mqueue", func(m *mnt.MntEntry) { m.ExtKey = proto.String("/etc/hosts") })
		}, `the mount at "/dev/mqueue" is one from outside`},
		{"read-only volume", func(f *forgery) {
			for i, m := range f.spec.Mounts {
				if m.Destination == "/etc/hosts" {
					f.spec.Mounts[i].Options = []string{"rbind", "ro"}
				}
			}
		}, `the mount at "/etc/hosts" is not ro`},
		{"part of a volume", func(f *forgery) {
			f.mount("/dev/mqueue", func(m *mnt.MntEntry) { m.RootDev = proto.Uint32(266338304) })
		}, "is of the same file system as one from outside"},
		{"part of its own", func(f *forgery) {
			f.mount("/dev/mqueue", func(m *mnt.MntEntry) { m.Root = proto.String("/a") })
		}, `shows only "/a" of its file system`},
		{"climbing root", func(f *forgery) {
			f.mount("/proc/sys", func(m *mnt.MntEntry) { m.Root = proto.String("/sys/../../..") })
		}, `"/sys/../../.." climbs with ..`},
		{"climbing", func(f *forgery) {
			f.mount("/proc/sys", func(m *mnt.MntEntry) { m.Mountpoint = proto.String("/../proc/sys") })
		}, "climbs with .."},
		{"relative", func(f *forgery) {
			f.mount("/proc/sys", func(m *mnt.MntEntry) { m.Mountpoint = proto.String("proc/sys") })
		}, `path "proc/sys" is not absolute`},
		{"shared", func(f *forgery) {
			f.mount("/etc/hosts", func(m *mnt.MntEntry) { m.SharedId = proto.Uint32(1) })
		}, "is shared with the host"},
		{"plugin", func(f *forgery) {
			f.mount("/etc/hosts", func(m *mnt.MntEntry) { m.WithPlugin = proto.Bool(true) })
		}, "needs a plugin"},
		{"writable root", func(f *forgery) { f.spec.Root.Readonly = true }, "the root filesystem is writable"},
		{"no root", func(f *forgery) { f.removeMount("/") }, "there is no root mount"},
		{"second namespace", func(f *forgery) {
			data, err := os.ReadFile(filepath.Join(f.dir, mountsImage))
			must(f.t, err)
			f.raw("mountpoints-14.img", data)
		}, "2 mount namespaces, which needs CAP_SYS_ADMIN"},
		{"file on a folder", func(f *forgery) {
			must(f.t, os.MkdirAll(filepath.Join(f.root, "etc/hosts"), 0o755))
			for i, m := range f.spec.Mounts {
				if m.Destination == "/etc/hosts" {
					f.spec.Mounts[i].Source = filepath.Join(f.dir, mountsImage)
				}
			}
		}, "the mount at /etc/hosts is a file in the spec and a folder in the checkpoint"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newForgery(t)
			tc.fn(f)
			f.judged(tc.want)
		})
	}
}

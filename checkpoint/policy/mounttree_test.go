package policy

import (
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/mnt"
	"google.golang.org/protobuf/proto"
)

// TestMountTree gives mounts other parents and numbers.
func TestMountTree(t *testing.T) {
	parent := func(at string, of uint32) func(*forgery) {
		return func(f *forgery) { f.mount(at, func(m *mnt.MntEntry) { m.ParentMntId = &of }) }
	}
	for _, tc := range []struct {
		name string
		fn   func(*forgery)
		want string
	}{
		{"read-only path", parent("/proc/sys", 337), `the mount at "/proc/sys" is below that at "/", not that at "/proc"`},
		{"mask of a file", parent("/proc/keys", 337), `the mount at "/proc/keys" is below that at "/", not that at "/proc"`},
		{"mask of a folder", parent("/sys/firmware", 337), `the mount at "/sys/firmware" is below that at "/"`},
		{"nested", parent("/dev/shm", 337), `the mount at "/dev/shm" is below that at "/"`},
		{"below a sibling", parent("/dev/shm", 341), `the mount at "/dev/shm" is below that at "/dev/pts", not that at "/dev"`},
		{"below what is below it", parent("/dev", 357), `the mount at "/dev" is below that at "/dev/shm"`},
		{"below itself", parent("/dev", 340), `the mount at "/dev" is below that at "/dev", not that at "/"`},
		{"below none", parent("/dev", 4711), `the mount at "/dev" is below none`},
		{"the root below another", parent("/", 340), `the root mount is below that at "/dev"`},
		{"the root below itself", parent("/", 337), ""},
		{"one number", func(f *forgery) { f.mount("/proc/sys", func(m *mnt.MntEntry) { *m.MntId = 300 }) }, `has the number 300 of another one`},
		{"the root's number", func(f *forgery) { f.mount("/proc/sys", func(m *mnt.MntEntry) { *m.MntId = 337 }) }, `has the number 337 of another one`},
		{"a path with a slash more", func(f *forgery) {
			f.mount("/proc/sys", func(m *mnt.MntEntry) { m.Mountpoint = proto.String("/proc//sys") })
		}, `path "/proc//sys" is not as the kernel tells paths`},
		{"a path with a dot", func(f *forgery) {
			f.mount("/proc/sys", func(m *mnt.MntEntry) { m.Mountpoint = proto.String("/proc/./sys") })
		}, "is not as the kernel tells paths"},
		{"second root", func(f *forgery) {
			f.addMount(&mnt.MntEntry{Mountpoint: proto.String("/"), ParentMntId: u32(337)})
		}, `mount "/" is there twice`},
		{"a folder that was deleted", func(f *forgery) { f.mount("/proc/sys", func(m *mnt.MntEntry) { m.Deleted = proto.Bool(true) }) }, "is of a folder that a restore would make"},
		{"one number in two namespaces", func(f *forgery) {
			f.grantCap("CAP_SYS_ADMIN")
			alter(f, mountsImage, "MNTS", func(all []*mnt.MntEntry) []*mnt.MntEntry {
				msgs := make([]proto.Message, len(all))
				for i, m := range all {
					msgs[i] = m
				}
				f.write("mountpoints-14.img", "MNTS", msgs...)
				return nil
			})
		}, "of another one"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newForgery(t)
			tc.fn(f)
			f.judged(tc.want)
		})
	}
}

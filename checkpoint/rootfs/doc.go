// Package rootfs saves and restores what a container changed in its root
// filesystem: its writable layer.
//
// While the container is frozen, Copy takes the layer as it is on the disk. After
// the thaw OverlayLayer (or TreeLayer, where a container has a whole tree of its
// own) writes it as an OCI layer, and Apply puts such a layer onto the root
// filesystem of another container. SplitDeleted and JoinDeleted translate to
// and from the format of Podman, CRI-O and the kubelet: a tar without whiteouts,
// and a list of what was deleted.
//
// A layer says of every file: its path, kind, content, owner, mode, time of
// modification to the nanosecond, hard links, and the extended attributes
// user.*, security.capability and system.posix_acl_*. The others are the
// host's policy (security.selinux) or the file system's own (trusted.*), and do
// not travel. Sockets do not either, as tar has no word for them. Holes are
// written as zeros, as the OCI asks, and are made again by Apply.
//
// Every tree and every tar is untrusted. Files are named relative to their open
// folder, links are not followed, and no tar reaches beyond the root it is
// applied to.
package rootfs

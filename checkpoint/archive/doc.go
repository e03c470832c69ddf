// Package archive reads and writes the tar that Podman exports a checkpoint to,
// CRI-O and containerd's CRI write for the kubelet, and that is the single layer
// of Podman's and CRI-O's checkpoint images. It has no specification; what is
// known here comes from the sources of these programs and of checkpointctl.
//
// What stands in one, all names relative to its root:
//
//	config.dump       JSON: the container; see config
//	spec.dump         JSON: its OCI runtime spec
//	status.dump       JSON: CRI's status of it; only containerd's CRI
//	checkpoint/       CRIU's images, flat
//	rootfs-diff.tar   changed files: of Podman and CRI-O a plain tar,
//	                  of containerd a compressed OCI layer with whiteouts
//	deleted.files     JSON: list of deleted paths; Podman and CRI-O
//	stats-dump        CRIU's statistics
//	dump.log          CRIU's log
//
// Others may be there; of those only devshm-checkpoint.tar is of use to anyone
// but its writer (see Read). Podman puts the metadata first, containerd sorts by
// name, so checkpoint/ comes first there.
package archive

// Names in an archive that only archives have; the others are in package layout.
const (
	configName  = "config.dump"
	specName    = "spec.dump"
	statusName  = "status.dump"
	filesName   = "rootfs-diff.tar"
	deletedName = "deleted.files"
)

// Package oci keeps checkpoints as images in containerd's content and image
// store. Three formats are written and read, each from and into a
// capture.Capture:
//
//   - Runnable, Stasis's own: an ordinary OCI image, made of the layers of the
//     container's image, its writable layer, and a last layer with the folder
//     /.stasis. Another runtime starts it afresh on the saved files.
//   - Index, as `ctr containers checkpoint --rw --image --task` writes it.
//   - Podman, one layer with the archive of package checkpoint/archive in it,
//     as `podman container checkpoint --create-image` and CRI-O have it.
//
// All that is read is untrusted: of sizes and numbers only as much is believed
// as was checked, digests are compared while reading, and nothing is written
// but plain files into one folder.
//
// Contexts carry containerd's namespace, and when something is written a lease
// (WithLease): what is not yet in the image store would else be collected.
package oci

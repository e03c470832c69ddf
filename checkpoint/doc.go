// Package checkpoint is a checkpoint as a value on disk: how its folder is
// written so that a crash never leaves half of one that looks whole, how it is
// signed, how it is checked before anything is restored from it, and what a
// restore has to know about it. Package checkpoint/criu makes and restores
// checkpoints; package checkpoint/layout names their files.
//
// A checkpoint is one flat folder: CRIU's images, runc's descriptors.json, and
// the manifest stasis.json. docs/checkpoint-format.md describes it. A folder
// made by runc, CRI-O, Podman or containerd's own shim has no manifest and
// opens as well: what the manifest would say is then read from the images.
//
// A checkpoint is untrusted input. Open reads only regular files of that one
// folder, follows no link, and allocates no more than a file of the limits in
// limits.go can ask for. It does not judge whether the container may have the
// privileges that the images ask for.
//
// Errors of this package match errdefs: ErrNotFound for a folder that is not
// there, ErrInvalidArgument for one that is no checkpoint or was altered,
// ErrFailedPrecondition for a good or unfinished one that cannot be used here
// and now.
package checkpoint

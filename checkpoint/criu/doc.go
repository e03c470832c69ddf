// Package criu drives CRIU by way of the OCI runtime: Dump writes a container into a
// folder that package checkpoint then completes, and Restore brings it back from a
// checkpoint that was opened.
//
// A dump that fails, or a CRIU that is killed in it, leaves the container as it was: its
// connections open, its network without CRIU's lock, running or paused. A restore that
// fails leaves nothing. Errors hold CRIU's own error lines.
//
// In a restore the shim is between the runtime and CRIU (Exec), so that the restored
// processes can be looked at before any of them runs.
//
// Package criu/img reads and writes the images.
package criu

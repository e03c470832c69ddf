// Package process is Stasis's view of the operating system: child processes
// and their exits (Reaper), the OCI runtime (Runtime, an interface), stdio and
// consoles (IO), and control groups with their OOM events (Cgroup). Package
// processtest has a fake runtime for tests.
//
// Nothing in it knows about tasks, containerd or checkpoints.
package process

// Package task is containerd's Task service: its calls on one side, containers
// and their processes on the other.
//
// What holds, and where:
//
//   - Each process has one goroutine that sees its life through (proc.go): its
//     exit is published after its start; init's exit is published last of a
//     container's, and no exec starts after init has died.
//   - A container's mutex guards fields and is never held across a call of the
//     runtime, CRIU, I/O or a send, so State, Wait, Pids and Connect answer at
//     once, also in the middle of a dump. Calls that change a container queue
//     (container.go).
//   - What is legal in which state is one table (state.go).
//   - Whether and how a container is restored is decided once, in Create; Start
//     executes that plan (plan.go).
//
// The OCI runtime is process.Runtime, of which the tests have a fake.
package task

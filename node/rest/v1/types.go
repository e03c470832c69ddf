// Package v1 has what goes over the wire in stasisd's interface /v1, and a client of it.
// The file docs/rest-api.md describes the requests. The package needs nothing of
// containerd, so that every program can use it.
package v1

import (
	"encoding/json"
	"time"
)

// Container is a container in containerd.
type Container struct {
	ID      string    `json:"id"`
	Name    string    `json:"name" doc:"Kubernetes' name of it, or its ID"`
	Pod     *Pod      `json:"pod,omitempty"`
	Image   string    `json:"image,omitempty"`
	Runtime string    `json:"runtime"`
	Status  string    `json:"status" doc:"running, paused, stopped or created; empty without a task"`
	Pid     uint32    `json:"pid" doc:"of its main process, 0 without a task"`
	Created time.Time `json:"created"`
}

// Pod is a pod of Kubernetes.
type Pod struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid,omitempty"`
}

// ContainerList is the answer with containers.
type ContainerList struct {
	Items []Container `json:"items"`
}

// Finding is what a node has, or lacks.
type Finding struct {
	Name   string `json:"name"`
	State  string `json:"state" enum:"ok,warn,missing"`
	Detail string `json:"detail"`
	Fix    string `json:"fix,omitempty"`
}

// FindingList is the answer with findings.
type FindingList struct {
	Items []Finding `json:"items"`
}

// RestoreBody says what to restore.
type RestoreBody struct {
	Checkpoint string `json:"checkpoint" minLength:"1" maxLength:"512" doc:"an image, which is pulled if it is not here"`
	Name       string `json:"name,omitempty" maxLength:"76" doc:"the container's ID; without it, the one that it had"`
	TCPClose   bool   `json:"tcp_close,omitempty" doc:"close all TCP connections"`
	Network    string `json:"network,omitempty" maxLength:"90" pattern:"^(none|host|join=[A-Za-z0-9._-]+)$" doc:"none: its own, with a loopback only; host, and join=ID, that of another container, need scope admin"`
	Registry
	Privileged  bool    `json:"privileged,omitempty" doc:"grant all that the checkpoint's spec asks for; needs scope admin"`
	Grants      *Grants `json:"grants,omitempty" doc:"grant some of what the checkpoint's spec asks for; needs scope admin"`
	Snapshotter string  `json:"snapshotter,omitempty" maxLength:"76" doc:"containerd's; without it, containerd's own choice"`
	WaitHealthy string  `json:"wait_healthy,omitempty" maxLength:"4096" doc:"run in the container by sh -c until it succeeds; needs scope exec"`
	WaitSeconds int     `json:"wait_seconds,omitempty" minimum:"0" maximum:"3600" doc:"how long wait_healthy waits; 60 without it"`
}

// Grants are what a container may have beyond an ordinary one, if its checkpoint's spec
// asks for it. docs/security.md has what each value may be; "all" is one of each list.
type Grants struct {
	Mounts        []string `json:"mounts,omitempty" maxItems:"100" maxLength:"4096" doc:"of the host: SRC or SRC:DST"`
	Devices       []string `json:"devices,omitempty" maxItems:"100" maxLength:"4096" doc:"a path on the host, or a rule such as \"c 10:229 rwm\""`
	Namespaces    []string `json:"namespaces,omitempty" maxItems:"100" maxLength:"4096" doc:"of the host: pid, network, ipc, uts; or the path of one"`
	Capabilities  []string `json:"capabilities,omitempty" maxItems:"100" maxLength:"64"`
	Seccomp       string   `json:"seccomp,omitempty" enum:"profile,unconfined" doc:"a profile that permits more than containerd's default, or none"`
	NewPrivileges bool     `json:"new_privileges,omitempty" doc:"no_new_privs may be off"`
	Unmask        []string `json:"unmask,omitempty" maxItems:"100" maxLength:"4096" doc:"paths of /proc and /sys that need be neither masked nor read-only"`
	Sysctls       []string `json:"sysctls,omitempty" maxItems:"100" maxLength:"256"`
	Ulimits       []string `json:"ulimits,omitempty" maxItems:"100" maxLength:"64"`
	Labels        []string `json:"labels,omitempty" maxItems:"100" maxLength:"4096" doc:"of SELinux, profiles of AppArmor"`
	Priorities    []string `json:"priorities,omitempty" maxItems:"100" maxLength:"64" doc:"oom, scheduler, io, cpu, memory, network"`
	CgroupParent  string   `json:"cgroup_parent,omitempty" maxLength:"4096" doc:"where the new control group goes: a path or a slice"`
}

// Checkpoint is a checkpoint in containerd's image store.
type Checkpoint struct {
	Ref         string    `json:"ref"`
	Digest      string    `json:"digest"`
	Created     time.Time `json:"created"`
	Format      string    `json:"format"`
	Container   string    `json:"container" doc:"its name"`
	ContainerID string    `json:"container_id"`
	Pod         *Pod      `json:"pod,omitempty"`
	Base        string    `json:"base,omitempty" doc:"the image that the container was made from"`
	Bytes       int64     `json:"bytes" doc:"what it takes besides its base image"`
	SignedBy    []string  `json:"signed_by" doc:"key IDs that it names, not verified"`
	KeyTrusted  bool      `json:"key_trusted" doc:"one of them is trusted here"`
	Broken      string    `json:"broken,omitempty" doc:"why it cannot be read"`
}

// CheckpointList is a page of checkpoints.
type CheckpointList struct {
	Items []Checkpoint `json:"items" doc:"the newest first"`
	Next  string       `json:"next,omitempty" doc:"after for the next page; there is none without it"`
}

// CheckpointBody says what to checkpoint, and how.
type CheckpointBody struct {
	Containers  []string `json:"containers,omitempty" maxItems:"100" maxLength:"76" doc:"IDs in containerd"`
	Pod         string   `json:"pod,omitempty" maxLength:"512" doc:"instead: a Kubernetes pod, NAME or NAMESPACE/NAME"`
	Ref         string   `json:"ref,omitempty" maxLength:"512" doc:"the image's name; without it, localhost/CONTAINER:TIME"`
	Format      string   `json:"format,omitempty" enum:"runnable,index,podman" doc:"runnable if there is none"`
	Compression string   `json:"compression,omitempty" enum:"zstd,gzip,none" doc:"zstd if there is none"`
	Exit        bool     `json:"exit,omitempty" doc:"end the container with the checkpoint"`
	PreDumps    int      `json:"pre_dumps,omitempty" minimum:"-1" maximum:"127" doc:"how often the memory is written before, while the container runs; -1: until that gets no less"`
	Push        bool     `json:"push,omitempty" doc:"send the image to the registry that ref names"`
	Registry
	TCP         string `json:"tcp,omitempty" enum:"keep,close" doc:"what becomes of TCP connections; without it, one is an error"`
	FileLocks   bool   `json:"file_locks,omitempty"`
	UnixSockets bool   `json:"external_unix_sockets,omitempty" doc:"save Unix sockets that are connected to outside the container"`
	Terminal    bool   `json:"terminal,omitempty" doc:"save a terminal whose session leader is outside the container"`
	LinkRemap   bool   `json:"link_remap,omitempty" doc:"save open files that were deleted and have other names; only with exit"`
	GhostLimit  uint64 `json:"ghost_limit,omitempty" doc:"the size in bytes of the largest deleted file that is saved; 0: CRIU's default"`
}

// Registry says how to talk to registries.
type Registry struct {
	PlainHTTP bool   `json:"plain_http,omitempty" doc:"without TLS, with the credentials of root if a registry asks; needs scope admin"`
	Login     *Login `json:"login,omitempty" doc:"for one registry; without it, credentials are those of root on the node"`
}

// Login is how to log in to a registry. stasisd does not keep it.
type Login struct {
	Registry string `json:"registry" minLength:"1" maxLength:"255" doc:"host, or host:port, as in the names of its images"`
	Username string `json:"username,omitempty" maxLength:"255" doc:"without it, the password is an identity token"`
	Password string `json:"password" minLength:"1" maxLength:"65536" format:"password"`
}

// PushBody says where to push a checkpoint.
type PushBody struct {
	Target string `json:"target,omitempty" maxLength:"512" doc:"its name in the registry; without it, its own"`
	Registry
}

// PullBody says what to pull.
type PullBody struct {
	Ref string `json:"ref" minLength:"1" maxLength:"512"`
	Registry
}

// ImageList is the answer with images.
type ImageList struct {
	Items []Image `json:"items"`
	OCI   bool    `json:"oci" doc:"the file was an OCI image, which may hold several, and no archive"`
}

// Image is an image in containerd.
type Image struct {
	Ref    string `json:"ref"`
	Digest string `json:"digest"`
}

// EventWatching is the type of the first event: what happens from then on is told.
const EventWatching = "watching"

// Event is what happened to a container.
type Event struct {
	Type      string    `json:"type" enum:"watching,create,start,exec,exit,oom,pause,resume,checkpoint,delete" doc:"watching is the first: what happens from then on is told"`
	Container string    `json:"container,omitempty" doc:"its ID"`
	Process   string    `json:"process,omitempty" doc:"the ID of a process that was added to it; none is its main process"`
	Pid       uint32    `json:"pid,omitempty"`
	Status    uint32    `json:"status,omitempty" doc:"of exit and delete: the exit code, or 128 and the signal"`
	Time      time.Time `json:"time"`
}

// State is how far a job is.
type State string

// States. A job ends in one of the last four.
const (
	StateQueued      State = "queued" // as many as can are at work
	StateRunning     State = "running"
	StateDone        State = "done"
	StateFailed      State = "failed"
	StateCanceled    State = "canceled"
	StateInterrupted State = "interrupted" // stasisd ended before it did
)

// Ended tells whether a job in this state will change no more.
func (s State) Ended() bool { return s != StateQueued && s != StateRunning }

// Job is an operation that goes on after the answer to its request.
type Job struct {
	ID        string    `json:"id"`
	Kind      string    `json:"kind" doc:"checkpoint, restore, push, pull or verify"`
	Of        string    `json:"of" doc:"the container or the image that it is about"`
	Namespace string    `json:"namespace" doc:"containerd's"`
	Who       string    `json:"who" doc:"who asked for it"`
	State     State     `json:"state" enum:"queued,running,done,failed,canceled,interrupted"`
	Created   time.Time `json:"created"`
	Ended     time.Time `json:"ended,omitzero"`
	// Progress is there while it runs.
	Progress *Progress `json:"progress,omitempty"`
	// Result is there when it has ended, also beside an error.
	Result json.RawMessage `json:"result,omitempty" doc:"by kind; also of what succeeded before an error"`
	Error  *Problem        `json:"error,omitempty"`
}

// JobList is the answer with jobs.
type JobList struct {
	Items []Job `json:"items" doc:"the newest first"`
}

// Progress is how far a job is.
type Progress struct {
	Of    string `json:"of" doc:"the container or the image at work"`
	Stage string `json:"stage" doc:"dump, store, push, pull, unpack, restore"`
	Done  int64  `json:"done" doc:"bytes"`
	Total int64  `json:"total" doc:"bytes, 0 if unknown"`
}

// Package capture is what a checkpoint consists of outside of containerd. Every
// format that a checkpoint travels in is read into a Capture and written from one,
// so n formats take n readers and n writers, and no pair of formats knows of the other.
package capture

import (
	"context"
	"encoding/json"
	"io"
	"time"
)

// Capture is a checkpoint of one container: the images, the changes of its root
// filesystem, and what it takes to make the container anew.
type Capture struct {
	Info Info
	// Spec is the OCI runtime spec that containerd had for the container, as
	// JSON.
	Spec json.RawMessage
	// Images is the folder with CRIU's images, flat, as in
	// docs/checkpoint-format.md. It may hold stasis.json and logs.
	Images string
	// Layer is what the container changed in its root filesystem. It is nil if
	// the checkpoint does not tell.
	Layer Layer
	// DevShm is a file: a tar of what was in /dev/shm, if that was mounted from
	// outside, as Podman does. It is empty if there was none.
	DevShm string
}

// Layer is a writable layer: an uncompressed OCI layer (a tar with whiteouts).
// It can be written any number of times, to the same bytes.
type Layer interface {
	// WriteLayer writes the tar.
	WriteLayer(ctx context.Context, w io.Writer) error
}

// Info says what a checkpoint is and where it came from. It is the info.json of
// a runnable image; the other formats have their own names for most of it. Unknown
// strings are empty, unknown times zero.
type Info struct {
	Version int `json:"version"` // of this struct as JSON: 1
	// ContainerID is containerd's (or the other engine's) ID.
	ContainerID string `json:"container_id"`
	// ContainerName is what people call it: in a pod its name there, else the ID.
	ContainerName string `json:"container_name"`
	// Namespace is containerd's.
	Namespace string `json:"namespace,omitempty"`
	Pod       *Pod   `json:"pod,omitempty"`
	Base      Base   `json:"base"`
	// Runtime is containerd's name of it, such as "io.containerd.stasis.v1".
	Runtime string `json:"runtime,omitempty"`
	// OCIRuntime is what ran CRIU: "runc", "1.3.2".
	OCIRuntime Program `json:"oci_runtime"`
	// Engine is the program that made the checkpoint: "stasis", "podman".
	Engine Program `json:"engine"`
	CRIU   string  `json:"criu,omitempty"` // version
	Host   Host    `json:"host"`
	// Created is when the container was, Checkpointed when the checkpoint was.
	Created      time.Time `json:"created,omitzero"`
	Checkpointed time.Time `json:"checkpointed,omitzero"`
	// Labels are the container's in containerd.
	Labels map[string]string `json:"labels,omitempty"`
	// Stats is nil if there are no numbers.
	Stats *Stats `json:"stats,omitempty"`
}

// Pod is a Kubernetes pod.
type Pod struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	UID       string `json:"uid,omitempty"`
	ID        string `json:"id,omitempty"` // of the sandbox
}

// Base is the image that the container was made from.
type Base struct {
	// Name is a reference as containerd has it: docker.io/library/redis:7.
	Name string `json:"name,omitempty"`
	// Digest is of what Name points at: an index or a manifest.
	Digest string `json:"digest,omitempty"`
	// Config is the digest of the image's config, which CRI calls the image's ID.
	Config string `json:"config,omitempty"`
	// Snapshotter is where the container's root filesystem was.
	Snapshotter string `json:"snapshotter,omitempty"`
}

// Program is a name and a version.
type Program struct {
	Name    string `json:"name,omitempty"`
	Version string `json:"version,omitempty"`
}

// Host is where a checkpoint was made.
type Host struct {
	Architecture string `json:"architecture,omitempty"` // Go's name: amd64
	Kernel       string `json:"kernel,omitempty"`       // uname -r
	CgroupV2     bool   `json:"cgroup_v2"`
	// Distribution is ID and VERSION_ID of os-release.
	Distribution Program `json:"distribution"`
}

// Stats are durations in nanoseconds and sizes in bytes.
type Stats struct {
	Frozen     time.Duration `json:"frozen_ns"` // the container stood still
	ImageBytes int64         `json:"image_bytes"`
	LayerBytes int64         `json:"layer_bytes"`
}

package archive

import (
	"cmp"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// config is config.dump. checkpointctl's lib/metadata.go has the keys that all
// programs share; CRI-O and containerd write just those, Podman its whole
// container (libpod/container_config.go).
type config struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	// RootfsImage is the image as its user called it, RootfsImageName its full
	// name. RootfsImageRef is its ID (CRI-O) or NAME@DIGEST (containerd), and
	// RootfsImageID is Podman's ID of it: that of the image's config, in hex.
	RootfsImage     string    `json:"rootfsImage,omitempty"`
	RootfsImageRef  string    `json:"rootfsImageRef,omitempty"`
	RootfsImageID   string    `json:"rootfsImageID,omitempty"`
	RootfsImageName string    `json:"rootfsImageName,omitempty"`
	Runtime         string    `json:"runtime,omitempty"`
	CreatedTime     time.Time `json:"createdTime,omitzero"`
	CheckpointedAt  time.Time `json:"checkpointedTime,omitzero"`

	// Podman's: the container has these files from its image or its mounts, and
	// Podman must not bind its own over them.
	UseImageResolvConf bool `json:"UseImageResolvConf"`
	UseImageHosts      bool `json:"UseImageHosts"`
	UseImageHostname   bool `json:"useImageHostname"`
	Passwd             bool `json:"passwd"`

	// Stasis has what the other keys cannot tell. Only ours has it.
	Stasis *extension `json:"stasis,omitempty"`
}

// extension is what Write adds, for Read.
type extension struct {
	Info capture.Info `json:"info"`
	// Annotations are the keys of annotations of the spec that Write added.
	Annotations []string `json:"added_annotations,omitempty"`
}

// Annotations of a spec by which engines tell, and are told by others.
const (
	managerKey     = "io.container.manager" // "libpod", "cri-o"
	criPrefix      = "io.kubernetes.cri."   // containerd's
	criContainer   = criPrefix + "container-name"
	crioPrefix     = "io.kubernetes.cri-o."
	crioAnnotation = crioPrefix + "Annotations"
	kubePrefix     = "io.kubernetes."
)

// Names of engines.
const (
	enginePodman = "podman"
	engineCRIO   = "cri-o"
)

// newConfig is config.dump of a capture, whose annotations were added to.
func newConfig(i capture.Info, added []string) config {
	c := config{
		ID:              i.ContainerID,
		Name:            cmp.Or(i.ContainerName, i.ContainerID),
		RootfsImage:     i.Base.Name,
		RootfsImageName: i.Base.Name,
		RootfsImageRef:  i.Base.Config,
		// Podman knows a runtime by its name, without the version.
		Runtime:        cmp.Or(i.OCIRuntime.Name, "runc"),
		CreatedTime:    i.Created,
		CheckpointedAt: i.Checkpointed,

		UseImageResolvConf: true,
		UseImageHosts:      true,
		UseImageHostname:   true,

		Stasis: &extension{i, added},
	}
	if _, hex, ok := strings.Cut(i.Base.Config, ":"); ok {
		c.RootfsImageID = hex
	}
	if named, err := reference.ParseDockerRef(i.Base.Name); err == nil {
		if d, err := digest.Parse(i.Base.Digest); err == nil {
			if ref, err := reference.WithDigest(reference.TrimNamed(named), d); err == nil {
				c.RootfsImageRef = ref.String()
			}
		}
	}
	return c
}

// info is what an archive tells of a container. annotations are those of its
// spec.
func (c config) info(annotations map[string]string) capture.Info {
	if c.Stasis != nil && c.Stasis.Info.Version == capture.InfoVersion {
		return c.Stasis.Info
	}
	i := capture.Info{
		Version:      capture.InfoVersion,
		ContainerID:  c.ID,
		Created:      c.CreatedTime,
		Checkpointed: c.CheckpointedAt,
		Base:         capture.Base{Name: cmp.Or(c.RootfsImageName, c.RootfsImage)},
	}
	i.Base.Digest, i.Base.Config = c.digests()
	if strings.HasPrefix(c.Runtime, "io.containerd.") {
		i.Runtime = c.Runtime
	} else {
		i.OCIRuntime.Name = c.Runtime
	}
	pod := capture.Pod{}
	switch manager := annotations[managerKey]; {
	case manager == "libpod":
		i.Engine.Name = enginePodman
		i.ContainerName = c.Name
	case manager == engineCRIO:
		i.Engine.Name = engineCRIO
		i.ContainerName = annotations[kubePrefix+"container.name"]
		pod = capture.Pod{
			Name:      annotations[kubePrefix+"pod.name"],
			Namespace: annotations[kubePrefix+"pod.namespace"],
			UID:       annotations[kubePrefix+"pod.uid"],
			ID:        annotations[crioPrefix+"SandboxID"],
		}
	case annotations[criContainer] != "":
		i.Engine.Name = "containerd"
		i.ContainerName = annotations[criContainer]
		pod = capture.Pod{
			Name:      annotations[criPrefix+"sandbox-name"],
			Namespace: annotations[criPrefix+"sandbox-namespace"],
			UID:       annotations[criPrefix+"sandbox-uid"],
			ID:        annotations[criPrefix+"sandbox-id"],
		}
	default:
		i.Engine.Name = manager
	}
	if pod != (capture.Pod{}) {
		i.Pod = &pod
	}
	i.ContainerName = cmp.Or(i.ContainerName, c.Name, c.ID)
	return i
}

// digests finds the digests of the image and of its config.
func (c config) digests() (image, conf string) {
	for _, ref := range []string{c.RootfsImageName, c.RootfsImage, c.RootfsImageRef} {
		if _, d, ok := strings.Cut(ref, "@"); ok && digest.Digest(d).Validate() == nil {
			image = d
		}
	}
	for _, id := range []string{c.RootfsImageRef, c.RootfsImageID} {
		id = string(digest.SHA256) + ":" + strings.TrimPrefix(id, string(digest.SHA256)+":")
		if digest.Digest(id).Validate() == nil {
			conf = id
		}
	}
	return image, conf
}

// addAnnotations returns a spec with what readers look for in its annotations,
// and the keys that were added.
func addAnnotations(spec json.RawMessage, i capture.Info) (json.RawMessage, []string, error) {
	have, err := annotationsOf(spec)
	if err != nil {
		return nil, nil, err
	}
	add := map[string]string{}
	// checkpointctl has a container's name from there, unless it is Podman's.
	if name := cmp.Or(i.ContainerName, i.ContainerID); have[managerKey] == "" && have[criContainer] == "" && name != "" {
		add[criContainer] = name
	}
	// CRI-O cannot do without, and restores these.
	if have[crioAnnotation] == "" {
		kube := map[string]string{}
		for key, value := range have {
			if strings.HasPrefix(key, kubePrefix+"container.") || strings.HasPrefix(key, kubePrefix+"pod.") {
				kube[key] = value
			}
		}
		data, err := json.Marshal(kube)
		if err != nil {
			return nil, nil, err
		}
		add[crioAnnotation] = string(data)
	}
	spec, err = editAnnotations(spec, func(annotations map[string]string) { maps.Copy(annotations, add) })
	return spec, slices.Sorted(maps.Keys(add)), err
}

// removeAnnotations is the reverse of addAnnotations.
func removeAnnotations(spec json.RawMessage, keys []string) (json.RawMessage, error) {
	if len(keys) == 0 {
		return spec, nil
	}
	return editAnnotations(spec, func(annotations map[string]string) {
		for _, key := range keys {
			delete(annotations, key)
		}
	})
}

// editAnnotations changes the annotations of a spec and nothing else, including
// what this version of the spec's Go types does not know.
func editAnnotations(spec json.RawMessage, edit func(map[string]string)) (json.RawMessage, error) {
	annotations, err := annotationsOf(spec)
	if err != nil {
		return nil, err
	}
	if annotations == nil {
		annotations = map[string]string{}
	}
	edit(annotations)
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(spec, &fields); err != nil {
		return nil, err
	}
	delete(fields, annotationsField)
	if len(annotations) > 0 {
		if fields[annotationsField], err = json.Marshal(annotations); err != nil {
			return nil, err
		}
	}
	return json.Marshal(fields)
}

const annotationsField = "annotations"

func annotationsOf(spec json.RawMessage) (map[string]string, error) {
	var fields map[string]json.RawMessage
	var annotations map[string]string
	err := json.Unmarshal(spec, &fields)
	if data, ok := fields[annotationsField]; ok && err == nil {
		err = json.Unmarshal(data, &annotations)
	}
	if err != nil {
		return nil, fault.Invalid("no valid spec of a container: %v", err)
	}
	return annotations, nil
}

package oci

import (
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/stasis-run/stasis/checkpoint/capture"
)

// Annotations of a runnable image's manifest. Those of a string in capture.Info
// are left out if that is empty. Times are RFC 3339, sizes are in bytes.
const (
	// AnnotationCheckpoint says what the image is; its value is a Format. Records
	// of the image store have it as a label.
	AnnotationCheckpoint = "stasis.run/checkpoint"
	// AnnotationVersion is the format's: "1".
	AnnotationVersion = "stasis.run/checkpoint.version"
	// AnnotationCheckpointLayer is the digest of the layer that holds /.stasis.
	AnnotationCheckpointLayer = "stasis.run/checkpoint.layer"
	// AnnotationWritableLayer is the digest of the container's writable layer.
	// It is missing if the checkpoint does not tell what that was.
	AnnotationWritableLayer = "stasis.run/writable.layer"
	// AnnotationUncompressed is the size of the layer's tar. The descriptors of
	// both layers have it, not the manifest.
	AnnotationUncompressed = "stasis.run/uncompressed-size"
	// AnnotationSigned are the IDs of the keys by which the checkpoint says it is
	// signed, with commas between. All formats have it; nothing but a list goes by it.
	AnnotationSigned = "stasis.run/signed-by"

	AnnotationContainerID    = "stasis.run/container.id"
	AnnotationContainerName  = "stasis.run/container.name"
	AnnotationNamespace      = "stasis.run/container.namespace"
	AnnotationCreated        = "stasis.run/container.created"
	AnnotationCheckpointed   = "stasis.run/checkpointed"
	AnnotationPodName        = "stasis.run/pod.name"
	AnnotationPodNamespace   = "stasis.run/pod.namespace"
	AnnotationPodUID         = "stasis.run/pod.uid"
	AnnotationPodID          = "stasis.run/pod.id"
	AnnotationBaseName       = "stasis.run/base.name"
	AnnotationBaseDigest     = "stasis.run/base.digest"
	AnnotationBaseConfig     = "stasis.run/base.config"
	AnnotationSnapshotter    = "stasis.run/snapshotter"
	AnnotationRuntime        = "stasis.run/runtime"
	AnnotationOCIRuntime     = "stasis.run/oci-runtime.name"
	AnnotationOCIVersion     = "stasis.run/oci-runtime.version"
	AnnotationEngine         = "stasis.run/engine.name"
	AnnotationEngineVersion  = "stasis.run/engine.version"
	AnnotationCRIU           = "stasis.run/criu.version"
	AnnotationArchitecture   = "stasis.run/host.architecture"
	AnnotationKernel         = "stasis.run/host.kernel"
	AnnotationDistribution   = "stasis.run/host.distribution.name"
	AnnotationDistributionID = "stasis.run/host.distribution.version"
)

// formatVersion is of the runnable image.
const formatVersion = 1

// annotated lists the strings of an Info, which has a Pod, by annotation.
func annotated(i *capture.Info) map[string]*string {
	return map[string]*string{
		AnnotationContainerID:    &i.ContainerID,
		AnnotationContainerName:  &i.ContainerName,
		AnnotationNamespace:      &i.Namespace,
		AnnotationPodName:        &i.Pod.Name,
		AnnotationPodNamespace:   &i.Pod.Namespace,
		AnnotationPodUID:         &i.Pod.UID,
		AnnotationPodID:          &i.Pod.ID,
		AnnotationBaseName:       &i.Base.Name,
		AnnotationBaseDigest:     &i.Base.Digest,
		AnnotationBaseConfig:     &i.Base.Config,
		AnnotationSnapshotter:    &i.Base.Snapshotter,
		AnnotationRuntime:        &i.Runtime,
		AnnotationOCIRuntime:     &i.OCIRuntime.Name,
		AnnotationOCIVersion:     &i.OCIRuntime.Version,
		AnnotationEngine:         &i.Engine.Name,
		AnnotationEngineVersion:  &i.Engine.Version,
		AnnotationCRIU:           &i.CRIU,
		AnnotationArchitecture:   &i.Host.Architecture,
		AnnotationKernel:         &i.Host.Kernel,
		AnnotationDistribution:   &i.Host.Distribution.Name,
		AnnotationDistributionID: &i.Host.Distribution.Version,
	}
}

// toAnnotations says what of an Info a list of checkpoints shows.
func toAnnotations(i capture.Info) map[string]string {
	if i.Pod == nil {
		i.Pod = &capture.Pod{}
	}
	as := map[string]string{}
	for key, s := range annotated(&i) {
		if *s != "" {
			as[key] = *s
		}
	}
	for key, t := range map[string]time.Time{AnnotationCreated: i.Created, AnnotationCheckpointed: i.Checkpointed} {
		if !t.IsZero() {
			as[key] = t.UTC().Format(time.RFC3339Nano)
		}
	}
	return as
}

// fromAnnotations is the reverse of toAnnotations. What cannot be understood is
// left out: it is for people to read, and no restore depends on it.
func fromAnnotations(as map[string]string) capture.Info {
	i := capture.Info{Version: capture.InfoVersion, Pod: &capture.Pod{}}
	for key, s := range annotated(&i) {
		*s = as[key]
	}
	if *i.Pod == (capture.Pod{}) {
		i.Pod = nil
	}
	i.Created, _ = time.Parse(time.RFC3339Nano, as[AnnotationCreated])
	i.Checkpointed, _ = time.Parse(time.RFC3339Nano, as[AnnotationCheckpointed])
	return i
}

// Annotations of other engines. By one of the first three they know an image
// for a checkpoint of their own kind, so no other may carry it.
const (
	criuPrefix   = "org.criu.checkpoint."
	podmanPrefix = "io.podman.annotations.checkpoint."

	criuName   = criuPrefix + "container.name"
	podmanName = podmanPrefix + "name"
	crioName   = "io.kubernetes.cri-o.annotations.checkpoint.name"
)

// criuAnnotations are what checkpointctl, CRI-O and containerd's CRI agreed on:
// https://github.com/checkpoint-restore/checkpointctl, lib/annotations.go.
func criuAnnotations(i capture.Info) map[string]string {
	as := map[string]string{
		"engine.name":              i.Engine.Name,
		"engine.version":           i.Engine.Version,
		"container.name":           i.ContainerName,
		"rootfsImageName":          i.Base.Name,
		"rootfsImageUserRequested": i.Base.Name,
		"rootfsImageSha":           i.Base.Digest,
		"rootfsImageID":            i.Base.Config,
		"runtime.name":             i.OCIRuntime.Name,
		"runtime.version":          i.OCIRuntime.Version,
		"criu.version":             i.CRIU,
		"host.arch":                i.Host.Architecture,
		"host.kernel":              i.Host.Kernel,
		"cgroup.version":           cgroupVersion(i),
		"distribution.name":        i.Host.Distribution.Name,
		"distribution.version":     i.Host.Distribution.Version,
	}
	if i.Pod != nil {
		maps.Copy(as, map[string]string{
			"pod.name":      i.Pod.Name,
			"pod.namespace": i.Pod.Namespace,
			"pod.uid":       i.Pod.UID,
			"pod.id":        i.Pod.ID,
		})
	}
	maps.DeleteFunc(as, func(_, value string) bool { return value == "" })
	return prefixed(criuPrefix, as)
}

// podmanAnnotations are Podman's: libpod/define/annotations.go. It writes all
// fourteen, whether it knows them or not.
func podmanAnnotations(i capture.Info) map[string]string {
	return prefixed(podmanPrefix, map[string]string{
		"name":                 i.ContainerName,
		"rawImageName":         i.Base.Name,
		"rootfsImageID":        strings.TrimPrefix(i.Base.Config, "sha256:"),
		"rootfsImageName":      i.Base.Name,
		"podman.version":       i.Engine.Version,
		"criu.version":         criuNumber(i.CRIU),
		"runtime.name":         i.OCIRuntime.Name,
		"runtime.version":      i.OCIRuntime.Version,
		"conmon.version":       "",
		"host.arch":            i.Host.Architecture,
		"host.kernel":          i.Host.Kernel,
		"cgroups.version":      cgroupVersion(i),
		"distribution.version": i.Host.Distribution.Version,
		"distribution.name":    i.Host.Distribution.Name,
	})
}

// fromForeign reads the annotations of other engines, as fromAnnotations does
// Stasis's.
func fromForeign(as map[string]string) capture.Info {
	first := func(keys ...string) string {
		for _, key := range keys {
			if as[key] != "" {
				return as[key]
			}
		}
		return ""
	}
	both := func(key string) string { return first(criuPrefix+key, podmanPrefix+key) }
	engine := capture.Program{Name: as[criuPrefix+"engine.name"], Version: as[criuPrefix+"engine.version"]}
	if engine.Name == "" && as[podmanName] != "" {
		engine = capture.Program{Name: "podman", Version: as[podmanPrefix+"podman.version"]}
	}
	i := capture.Info{
		Version:       capture.InfoVersion,
		ContainerName: first(criuName, podmanName, crioName),
		Base: capture.Base{
			Name:   first(criuPrefix+"rootfsImageUserRequested", criuPrefix+"rootfsImageName", podmanPrefix+"rootfsImageName"),
			Digest: as[criuPrefix+"rootfsImageSha"],
			Config: both("rootfsImageID"),
		},
		OCIRuntime: capture.Program{Name: both("runtime.name"), Version: both("runtime.version")},
		Engine:     engine,
		CRIU:       criuText(both("criu.version")),
		Host: capture.Host{
			Architecture: both("host.arch"),
			Kernel:       both("host.kernel"),
			CgroupV2:     first(criuPrefix+"cgroup.version", podmanPrefix+"cgroups.version") == "v2",
			Distribution: capture.Program{Name: both("distribution.name"), Version: both("distribution.version")},
		},
	}
	pod := capture.Pod{
		Name:      as[criuPrefix+"pod.name"],
		Namespace: as[criuPrefix+"pod.namespace"],
		UID:       as[criuPrefix+"pod.uid"],
		ID:        as[criuPrefix+"pod.id"],
	}
	if pod != (capture.Pod{}) {
		i.Pod = &pod
	}
	return i
}

// prefixed completes the keys.
func prefixed(prefix string, as map[string]string) map[string]string {
	full := map[string]string{}
	for key, value := range as {
		full[prefix+key] = value
	}
	return full
}

func cgroupVersion(i capture.Info) string {
	if i.Host.CgroupV2 {
		return "v2"
	}
	return "v1"
}

// criuNumber writes a version as CRIU's own interface and Podman do: 4.2.1 is
// 40201.
func criuNumber(version string) string {
	var major, minor, sub int
	if n, _ := fmt.Sscanf(version, "%d.%d.%d", &major, &minor, &sub); n < 2 {
		return ""
	}
	return strconv.Itoa(major*10000 + minor*100 + sub)
}

// criuText is the reverse of criuNumber; it leaves alone what is no number.
func criuText(number string) string {
	n, err := strconv.Atoi(number)
	switch {
	case err != nil || n < 10000:
		return number
	case n%100 == 0:
		return fmt.Sprintf("%d.%d", n/10000, n/100%100)
	}
	return fmt.Sprintf("%d.%d.%d", n/10000, n/100%100, n%100)
}

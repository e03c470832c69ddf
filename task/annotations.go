package task

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/stasis-run/stasis/checkpoint"
)

// Annotations of a container by which a restore is asked for; docs/kubernetes.md
// tells what they mean. Those of a pod are the annotations of each of its
// containers.
const (
	annotationPrefix = "stasis.run/"
	// annotationRestoreFrom is a checkpoint, for the one container of a pod; with
	// a dot and the name of a container, for that one.
	annotationRestoreFrom = annotationPrefix + "restore-from"
	// annotationRestart is a restartPolicy.
	annotationRestart = annotationPrefix + "restart"
)

// restartPolicy says what starts when a container that was restored is started
// once more.
type restartPolicy string

const (
	// restartFresh is the default: old memory must not run on newer volumes, and
	// what has crashed would crash again.
	restartFresh   restartPolicy = "fresh"
	restartRestore restartPolicy = "restore"
)

// restoreRequest is what the annotations of a container ask for.
type restoreRequest struct {
	// from is a checkpoint: a name in containerd, or the path of an archive. It is
	// empty if none is asked for.
	from string
	// named: it is asked for by the container's name, so the checkpoint may be
	// of a container of another.
	named   bool
	restart restartPolicy
}

// maxReference bounds the name of a checkpoint, in bytes: a path's bound.
const maxReference = 4096

// restoreRequest reads the annotations. One that does not exist may be a request
// misspelt, so it is refused. The sandbox of a pod has them too, and none are meant for it.
func (c *config) restoreRequest() (restoreRequest, error) {
	r := restoreRequest{restart: restartFresh}
	if c.Annotations[criContainerType] == criSandbox {
		return r, nil
	}
	// In this order, so that an error is the same each time.
	keys := make([]string, 0, len(c.Annotations))
	for key := range c.Annotations {
		if strings.HasPrefix(key, annotationPrefix) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	for _, key := range keys {
		value := c.Annotations[key]
		container, named := strings.CutPrefix(key, annotationRestoreFrom+".")
		switch {
		case key == annotationRestoreFrom || named:
			if err := checkReference(key, value); err != nil {
				return r, err
			}
			if named && container == "" {
				return r, invalid("annotation %s: after the dot stands a container's name", key)
			}
			if named && container == c.Annotations[criContainerName] {
				r.from, r.named = value, true
			} else if !named && !r.named {
				r.from = value
			}
		case key == annotationRestart:
			r.restart = restartPolicy(value)
			if r.restart != restartFresh && r.restart != restartRestore {
				return r, invalid("annotation %s=%q: it is %s or %s", key, value, restartFresh, restartRestore)
			}
		case key == checkpoint.AnnotationTCP:
			if err := checkpoint.CheckTCP(value); err != nil {
				return r, err
			}
		default:
			return r, invalid("annotation %s: there is none of that name; there are %s, %s.CONTAINER, %s and %s",
				key, annotationRestoreFrom, annotationRestoreFrom, annotationRestart, checkpoint.AnnotationTCP)
		}
	}
	return r, nil
}

func checkReference(key, value string) error {
	switch {
	case value == "":
		return invalid("annotation %s is empty: it is the name of a checkpoint in containerd, or the path of an archive", key)
	case len(value) > maxReference:
		return invalid("annotation %s has more than %d bytes", key, maxReference)
	case strings.ContainsFunc(value, func(c rune) bool { return c <= ' ' || c == 0x7f }):
		return invalid("annotation %s=%q: neither a name nor a path has spaces or control characters", key, value)
	case filepath.IsAbs(value) && filepath.Clean(value) != value:
		return invalid("annotation %s=%q: the path is to be written as %q", key, value, filepath.Clean(value))
	}
	return nil
}

// Annotations of CRI, from containerd's internal/cri/annotations.
const (
	criContainerType    = "io.kubernetes.cri.container-type"
	criSandbox          = "sandbox" // a value of it
	criContainerName    = "io.kubernetes.cri.container-name"
	criSandboxNamespace = "io.kubernetes.cri.sandbox-namespace"
	criSandboxID        = "io.kubernetes.cri.sandbox-id"
	criSandboxUID       = "io.kubernetes.cri.sandbox-uid"
	criSandboxName      = "io.kubernetes.cri.sandbox-name"
)

// podNamespace is the namespace of Kubernetes that the container is in; inPod is
// false for one that is in no pod.
func (c *config) podNamespace() (namespace string, inPod bool) {
	namespace, inPod = c.Annotations[criSandboxNamespace]
	return namespace, inPod
}

// pod is the pod that the container is in, or nil.
func (c *config) pod() *checkpoint.Pod {
	namespace, inPod := c.podNamespace()
	if !inPod {
		return nil
	}
	return &checkpoint.Pod{Name: c.Annotations[criSandboxName], Namespace: namespace, UID: c.Annotations[criSandboxUID]}
}

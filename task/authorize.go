package task

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// authority is what the node says of whose checkpoints a container may have. For a pod
// it has to be known who has made a checkpoint, and whose it is: it holds another one's
// memory. Outside of pods, root has named it.
type authority struct {
	keys *sign.Trust
	node *nodeConfig // nil where it has no say
	// archive is the archive that an annotation names, found to be allowed, or nil.
	// close closes it.
	archive   *os.File
	namespace string // of the pod
	inPod     bool
}

// authorize reads the node's keys and configuration, once, and opens the archive that src
// names, if it does. A key that is withdrawn while the checkpoint is fetched still counts.
func (c *container) authorize(src *source) (*authority, error) {
	a := &authority{}
	a.namespace, a.inPod = c.config.podNamespace()
	var err error
	if a.keys, err = sign.DefaultDir().Trust(); err != nil {
		return nil, err
	}
	if !a.inPod && src.kind != fromAnnotation {
		return a, nil
	}
	if a.node, err = readNodeConfig(c.nodeConfig); err != nil {
		return nil, err
	}
	if src.kind == fromAnnotation && filepath.IsAbs(src.path) {
		a.archive, err = a.node.openArchive(src.path)
	}
	return a, err
}

func (a *authority) close() {
	if a.archive != nil {
		a.archive.Close()
	}
}

// openOptions are those to open the checkpoint with.
func (a *authority) openOptions(src *source, found located) checkpoint.OpenOptions {
	// Files that were fetched, or are in an image, do not lie where they were written.
	o := checkpoint.OpenOptions{Trust: a.keys, Reread: src.kind != fromFolder}
	if a.inPod {
		o.Require = a.node.Restore.Unsigned == unsignedRefuse
		// What is in a folder that root names does not tell whose it is, unless it
		// is signed.
		o.Allow = func(ckpt *checkpoint.Checkpoint) error {
			return a.node.allowNamespace(namespaceOf(ckpt, found.info), a.namespace)
		}
	}
	return o
}

// explain tells the administrator what would do without a signature.
func (a *authority) explain(err error) error {
	if errors.Is(err, checkpoint.ErrNotSigned) {
		return fmt.Errorf("%w (restore.unsigned = %q in the node's configuration, %s, would do without)", err, unsignedCheck, a.node.path)
	}
	return err
}

// namespaceOf is the namespace of the pod that a checkpoint is of, "" if it is of none:
// what was signed says so; else, what came with it.
func namespaceOf(ckpt *checkpoint.Checkpoint, info capture.Info) string {
	if _, signed := ckpt.Signer(); signed {
		if pod := ckpt.Manifest().Container.Pod; pod != nil {
			return pod.Namespace
		}
		return ""
	}
	if info.Pod != nil {
		return info.Pod.Namespace
	}
	return ""
}

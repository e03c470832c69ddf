package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"

	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/oci"
)

// StageRequest says what to copy for a shim that is about to restore it; see
// capture.Fetched.
type StageRequest struct {
	// Dir is the folder for the copy, which does not exist yet.
	Dir string
	// Ref is an image; if it is empty, Archive is read.
	Ref     string
	Archive io.Reader
	// Container is the ID of the container that it is for.
	Container string
}

// Stage copies a checkpoint into a folder. After an error, that is not there.
func (n *Node) Stage(ctx context.Context, r StageRequest) (_ *capture.Fetched, err error) {
	ctx, c, done, err := n.leased(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(r.Dir))
		}
	}()
	var got *capture.Capture
	if r.Ref == "" {
		got, err = archive.Read(ctx, r.Archive, r.Dir, archive.Limits{})
	} else {
		got, err = stageImage(ctx, c, r.Ref, r.Dir)
	}
	if err != nil {
		return nil, err
	}
	// A reader may have put it there already.
	layer := filepath.Join(r.Dir, layout.Layer)
	if got.Layer != nil && got.Layer != capture.Layer(capture.FileLayer(layer)) {
		if err := writeLayer(ctx, layer, got.Layer); err != nil {
			return nil, err
		}
	}
	fetched := &capture.Fetched{Info: got.Info}
	if fetched.OtherBase, err = otherBase(ctx, c, r.Container, got.Info.Base); err != nil {
		return nil, err
	}
	return fetched, nil
}

func stageImage(ctx context.Context, c *client.Client, ref, dir string) (*capture.Capture, error) {
	record, err := localImage(ctx, c, ref)
	if errdefs.IsNotFound(err) {
		return nil, fault.New(errdefs.ErrNotFound, "there is no image of that name in containerd's namespace %s on this node: pull it, or import it (`stasis import`)", namespaceOf(ctx))
	}
	if err != nil {
		return nil, err
	}
	return oci.Read(ctx, c.ContentStore(), record.Target, dir)
}

func writeLayer(ctx context.Context, path string, layer capture.Layer) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(layer.WriteLayer(ctx, f), f.Close()); err != nil {
		return fmt.Errorf("copy the files that the container had changed: %w", err)
	}
	return nil
}

// otherBase compares the image of a container with the one that a checkpoint builds
// on, as far as the checkpoint tells. It returns what is different, or "".
func otherBase(ctx context.Context, c *client.Client, container string, base capture.Base) (string, error) {
	record, err := c.ContainerService().Get(ctx, container)
	if err != nil {
		return "", fmt.Errorf("look at container %s: %w", container, err)
	}
	if record.Image == "" {
		return "", nil // made of a folder; whoever made it knows
	}
	img, err := c.ImageService().Get(ctx, record.Image)
	if err != nil {
		return "", fmt.Errorf("look at the container's image: %w", err)
	}
	here := imageIdentity{name: img.Name, digests: []string{img.Target.Digest.String()}}
	if base.Config != "" {
		config, err := images.Config(ctx, c.ContentStore(), img.Target, platforms.Default())
		if err != nil {
			return "", fmt.Errorf("look at the container's image %s: %w", img.Name, err)
		}
		here.config = config.Digest.Encoded()
	} else if base.Digest != "" {
		// An index names one that was pulled by the digest of its own, too.
		manifests, err := images.Children(ctx, c.ContentStore(), img.Target)
		if err != nil {
			return "", fmt.Errorf("look at the container's image %s: %w", img.Name, err)
		}
		for _, m := range manifests {
			if images.IsManifestType(m.MediaType) {
				here.digests = append(here.digests, m.Digest.String())
			}
		}
	}
	return here.differs(base), nil
}

// imageIdentity is what an image is known by.
type imageIdentity struct {
	name    string
	digests []string // of the index, and of the manifests in it
	config  string   // in hex
}

// differs says how a checkpoint's base is another image, by the best that is known
// of that; "" if it is the same, or nothing is known.
func (i imageIdentity) differs(base capture.Base) string {
	const text = "the checkpoint builds on image %s (%s), and the container is made from image %s (%s): give the container the same image"
	name := base.Name
	if name == "" {
		name = "without a name"
	}
	switch {
	case base.Config != "":
		if want := strings.TrimPrefix(base.Config, "sha256:"); want != i.config {
			return fmt.Sprintf(text, name, "config "+want, i.name, "config "+i.config)
		}
	case base.Digest != "":
		for _, d := range i.digests {
			if d == base.Digest {
				return ""
			}
		}
		return fmt.Sprintf(text, name, base.Digest, i.name, i.digests[0])
	case base.Name != "" && normalName(base.Name) != normalName(i.name):
		return fmt.Sprintf(text, name, "nothing but its name is known", i.name, i.digests[0])
	}
	return ""
}

// normalName completes a name as Docker does.
func normalName(name string) string {
	if named, err := reference.ParseDockerRef(name); err == nil {
		return named.String()
	}
	return name
}

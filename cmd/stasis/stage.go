package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/archive"
	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/image"
)

// newStageCommand copies a checkpoint for the shim; see capture.Fetched.
func newStageCommand(a *app) *cobra.Command {
	var container string
	var fromArchive bool
	cmd := &cobra.Command{
		Use:    "stage DIR [REF]",
		Short:  "Copy a checkpoint for the shim, which is about to restore it",
		Hidden: true,
		Args:   cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref := ""
			if len(args) > 1 {
				ref = args[1]
			}
			if fromArchive == (ref != "") {
				return usageError("either REF or --archive")
			}
			return a.stage(cmd.Context(), args[0], ref, container)
		},
	}
	cmd.Flags().StringVar(&container, "container", "", "`ID` of the container that it is for")
	cmd.Flags().BoolVar(&fromArchive, "archive", false, fmt.Sprintf("read an archive from descriptor %d", capture.FetchedArchive))
	return cmd
}

// stage reads from the descriptor if ref is empty. After an error, dir is not
// there.
func (a *app) stage(ctx context.Context, dir, ref, container string) (err error) {
	ctx, c, done, err := a.leased(ctx)
	if err != nil {
		return err
	}
	defer done()
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	var got *capture.Capture
	if ref == "" {
		f := os.NewFile(capture.FetchedArchive, "archive")
		defer f.Close()
		got, err = archive.Read(ctx, f, dir, archive.Limits{})
	} else {
		got, err = a.stageImage(ctx, c, ref, dir)
	}
	if err != nil {
		return err
	}
	// A reader may have put it there already.
	layer := filepath.Join(dir, capture.FetchedLayer)
	if got.Layer != nil && got.Layer != capture.Layer(capture.FileLayer(layer)) {
		if err := writeLayer(ctx, layer, got.Layer); err != nil {
			return err
		}
	}
	fetched := capture.Fetched{Info: got.Info}
	if fetched.OtherBase, err = otherBase(ctx, c, container, got.Info.Base); err != nil {
		return err
	}
	return json.NewEncoder(a.out).Encode(fetched)
}

func (a *app) stageImage(ctx context.Context, c *client.Client, ref, dir string) (*capture.Capture, error) {
	record, err := localImage(ctx, c, ref)
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("there is no image of that name in containerd's namespace %s on this node: pull it, or import it (`stasis import`)", a.namespace)
	}
	if err != nil {
		return nil, err
	}
	return image.Read(ctx, c.ContentStore(), record.Target, dir)
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

package node

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/inspect"
)

// Difference is what is not the same in two checkpoints.
type Difference struct {
	// Files is nil if one of the two does not tell what files the container
	// changed.
	Files     []FileDiff            `json:"files"`
	Processes []inspect.ProcessDiff `json:"processes"`
}

// FileDiff is a file that is not the same in both.
type FileDiff struct {
	Path string `json:"path"`
	// Change is "added", "changed" or "deleted". A file of the image that was
	// changed for the first time since counts as added.
	Change string `json:"change"`
	Size   int64  `json:"size,omitempty"` // in the second, in bytes
}

// DiffRequest names two checkpoints of a container, each an image, an archive, or a
// folder of CRIU's images.
type DiffRequest struct {
	First, Second string
	// MaxSize is how many bytes each may have unpacked; 0: half of what is free on the
	// disk.
	MaxSize int64
}

// Diff tells what changed from the first to the second.
func (n *Node) Diff(ctx context.Context, r DiffRequest) (*Difference, error) {
	first, cleanup, err := n.openCapture(ctx, r.First, r.MaxSize)
	defer cleanup()
	if err != nil {
		return nil, err
	}
	second, cleanup, err := n.openCapture(ctx, r.Second, r.MaxSize)
	defer cleanup()
	if err != nil {
		return nil, err
	}
	d := &Difference{}
	if d.Processes, err = inspect.Diff(ctx, first.Images, second.Images); err != nil {
		return nil, err
	}
	d.Files, err = diffFiles(ctx, first.Layer, second.Layer)
	return d, err
}

// Bounds on what is kept in memory of a layer.
const (
	maxLayerEntries = 1 << 20
	maxLayerNames   = 256 << 20 // bytes, of all names together
)

// layerEntry is what is compared of a file in a layer: its size, and a sum of
// its content and all attributes but times, as a folder's changes whenever something in
// it does.
type layerEntry struct {
	size int64
	sum  [sha256.Size]byte
}

const whiteout = ".wh."

// diffFiles compares two layers; of the same image, as the files in it are in
// neither.
func diffFiles(ctx context.Context, first, second capture.Layer) ([]FileDiff, error) {
	if first == nil || second == nil {
		return nil, nil
	}
	was, err := readLayer(ctx, first)
	if err != nil {
		return nil, fmt.Errorf("read the files of the first: %w", err)
	}
	is, err := readLayer(ctx, second)
	if err != nil {
		return nil, fmt.Errorf("read the files of the second: %w", err)
	}
	diffs := []FileDiff{}
	for _, name := range slices.Sorted(maps.Keys(is)) {
		entry := is[name]
		old, there := was[name]
		dir, base := path.Split(name)
		if file, gone := strings.CutPrefix(base, whiteout); gone {
			if !there {
				diffs = append(diffs, FileDiff{Path: dir + file, Change: "deleted"})
			}
			continue
		}
		switch {
		case !there:
			// Or it is a file of the image that was changed since; a layer does
			// not tell.
			diffs = append(diffs, FileDiff{name, "added", entry.size})
		case old != entry:
			diffs = append(diffs, FileDiff{name, "changed", entry.size})
		}
	}
	for name := range was {
		dir, base := path.Split(name)
		_, there := is[name]
		_, deleted := is[dir+whiteout+base]
		if there || deleted {
			continue
		}
		if file, gone := strings.CutPrefix(base, whiteout); gone {
			if _, back := is[dir+file]; !back {
				diffs = append(diffs, FileDiff{Path: dir + file, Change: "added"})
			}
			continue
		}
		diffs = append(diffs, FileDiff{Path: name, Change: "deleted"})
	}
	slices.SortFunc(diffs, func(a, b FileDiff) int { return strings.Compare(a.Path, b.Path) })
	return diffs, nil
}

// readLayer reads the entries of a layer, by path.
func readLayer(ctx context.Context, l capture.Layer) (map[string]layerEntry, error) {
	r, w := io.Pipe()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer r.Close()
	go func() { w.CloseWithError(l.WriteLayer(ctx, w)) }()
	entries := map[string]layerEntry{}
	names := 0
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			// So that an error of the writer behind the end is noticed.
			if _, err := io.Copy(io.Discard, r); err != nil {
				return nil, err
			}
			return entries, nil
		}
		if err != nil {
			return nil, err
		}
		if len(entries) == maxLayerEntries {
			return nil, fmt.Errorf("more than %d files: %w", maxLayerEntries, errdefs.ErrInvalidArgument)
		}
		name := path.Clean("/" + h.Name)
		if names += len(name); names > maxLayerNames {
			return nil, fmt.Errorf("names of more than %d bytes together: %w", maxLayerNames, errdefs.ErrInvalidArgument)
		}
		e := layerEntry{size: h.Size}
		sum := sha256.New()
		fmt.Fprintf(sum, "%q %o %d:%d %q %d:%d %d\n", h.Typeflag, h.Mode, h.Uid, h.Gid, h.Linkname, h.Devmajor, h.Devminor, h.Size)
		for _, key := range slices.Sorted(maps.Keys(h.PAXRecords)) {
			if strings.HasPrefix(key, "SCHILY.xattr.") {
				fmt.Fprintf(sum, "%q=%q\n", key, h.PAXRecords[key])
			}
		}
		if _, err := io.Copy(sum, t); err != nil {
			return nil, err
		}
		sum.Sum(e.sum[:0])
		entries[name] = e
	}
}

package checkpoint

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"runtime"
	"slices"
	"sync"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sync/errgroup"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sign"
	"github.com/stasis-run/stasis/checkpoint/sum"
)

// hashBuffer is small enough to stay in a CPU's cache.
const hashBuffer = 256 << 10

// oldHash returns the hash that a file of that name has in a manifest of version 1 or
// 2, and its name there. It tells damage and not forgery.
func oldHash(name string) (string, hash.Hash) {
	if layout.Pages.Has(name) {
		return "xxh64", xxhash.New()
	}
	return "sha256", sha256.New()
}

// oldSum returns the sum of the open file f, which has that name in the checkpoint,
// as a manifest of version 1 or 2 has it.
func oldSum(ctx context.Context, f *os.File, name string) (string, error) {
	kind, hash := oldHash(name)
	buf := hashBuffers.Get().(*[hashBuffer]byte)
	defer hashBuffers.Put(buf)
	for n := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return "", context.Cause(ctx)
		}
		read, err := f.ReadAt(buf[:], n)
		hash.Write(buf[:read])
		n += int64(read)
		if errors.Is(err, io.EOF) {
			return kind + ":" + hex.EncodeToString(hash.Sum(nil)), nil
		}
		if err != nil {
			return "", err
		}
	}
}

var hashBuffers = sync.Pool{New: func() any { return new([hashBuffer]byte) }}

// sumFiles returns the sums of files in the folder dir, of which names and sizes are
// given, in their order. All chunks of all files are summed side by side.
func sumFiles(ctx context.Context, dir string, files []File) ([]sum.Sum, error) {
	type chunk struct{ file, n int }
	var chunks []chunk
	sums := make([][]byte, len(files))
	for i, f := range files {
		n := sum.Chunks(f.Size)
		sums[i] = make([]byte, n*sum.Size)
		for c := range n {
			chunks = append(chunks, chunk{i, c})
		}
	}
	err := inParallel(ctx, len(chunks), func(ctx context.Context, i int) error {
		c := chunks[i]
		return sumChunk(ctx, dir, files[c.file], c.n, sums[c.file][c.n*sum.Size:])
	})
	if err != nil {
		return nil, err
	}
	done := make([]sum.Sum, len(files))
	for i := range files {
		done[i] = sum.Join(sums[i])
	}
	return done, nil
}

// sumChunk puts the sum of a file's n-th chunk into to.
func sumChunk(ctx context.Context, dir string, file File, n int, to []byte) error {
	f, err := openIn(dir, file.Name)
	if err != nil {
		return err
	}
	defer f.Close()
	from := int64(n) * sum.ChunkSize
	// One byte more than it has, at the end, so that a file that has grown shows.
	size := min(file.Size-from, sum.ChunkSize)
	last := from+size == file.Size
	r := io.NewSectionReader(f, from, size)
	buf := hashBuffers.Get().(*[hashBuffer]byte)
	defer hashBuffers.Put(buf)
	one, got, err := sum.Of(capture.NewReader(ctx, r), buf[:])
	if err != nil {
		return fmt.Errorf("%s: %w", file.Name, err)
	}
	if info, err := f.Stat(); err != nil || got != size || last && info.Size() != file.Size {
		return errors.Join(fault.Invalid("%s: its size changed while it was read", file.Name), err)
	}
	copy(to, one[:])
	return nil
}

// AddSum completes the manifest of the checkpoint in dir that was made with
// Folder.LeaveSum, and signs it, unless key is nil or it is of an older version. If known, which has a sum, is
// of the name, size and inode of the file without one, that is taken; else the file is
// read. A manifest that is complete, or a folder without one, stays as it is.
func AddSum(ctx context.Context, dir string, known File, key *sign.Key) error {
	m, err := readManifestBy(dir, decodeUnsummed)
	if err != nil || m == nil {
		return wrap(dir, err)
	}
	i := slices.IndexFunc(m.Files, func(f File) bool { return f.Sum == "" })
	if i < 0 {
		return nil
	}
	file := &m.Files[i]
	if file.Name == known.Name && file.Size == known.Size && file.Inode == known.Inode {
		file.setSum(known.sum())
	} else {
		sums, err := sumFiles(ctx, dir, []File{*file})
		if err != nil {
			return wrap(dir, err)
		}
		file.setSum(sums[0])
	}
	if m.Version < signedVersion {
		// Of a shim that was started before an update, and so has other sums. It does
		// not say whose pod it is of, which a signature would have to.
		key = nil
		if err := m.sumAnew(ctx, dir, i); err != nil {
			return wrap(dir, err)
		}
	}
	// Until the manifest has the sum, no restore takes the checkpoint, so the
	// envelope comes first.
	return wrap(dir, writeSigned(dir, m, key, nil))
}

// sumAnew makes a manifest one of the newest version, with new sums of all files but the
// i-th, which has one.
func (m *Manifest) sumAnew(ctx context.Context, dir string, i int) error {
	others := slices.Delete(slices.Clone(m.Files), i, i+1)
	sums, err := sumFiles(ctx, dir, others)
	if err != nil {
		return err
	}
	for n := range others {
		others[n].setSum(sums[n])
	}
	m.Version, m.Files = manifestVersion, slices.Insert(others, i, m.Files[i])
	return nil
}

// inParallel calls fn with 0 to n-1, on as many goroutines as there are CPUs,
// and returns the first error; the context of the others ends with it.
func inParallel(ctx context.Context, n int, fn func(ctx context.Context, i int) error) error {
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i := 0; i < n && gctx.Err() == nil; i++ {
		group.Go(func() error { return fn(gctx, i) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx)
}

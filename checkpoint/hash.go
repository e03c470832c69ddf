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
	"path/filepath"
	"runtime"
	"slices"
	"sync"

	"github.com/cespare/xxhash/v2"
)

// hashBuffer is small enough to stay in a CPU's cache.
const hashBuffer = 256 << 10

// newHash returns the hash that a file of that name has in the manifest, and its
// name there. A sum tells damage and not forgery, as who can alter an image can
// alter the manifest. So the pages, which may be gigabytes, are not worth the
// second that sha256 takes for each.
func newHash(name string) (string, hash.Hash) {
	if isPages(name) {
		return "xxh64", xxhash.New()
	}
	return "sha256", sha256.New()
}

// hashFile returns the sum of the open file f, which has that name in the
// checkpoint, and its length. The sum is as the manifest has it: the kind, a
// colon, and hex.
func hashFile(ctx context.Context, f *os.File, name string) (string, int64, error) {
	kind, hash := newHash(name)
	// Most files are small.
	size := int64(hashBuffer)
	if info, err := f.Stat(); err == nil {
		size = info.Size()
	}
	buf := make([]byte, min(max(size+1, 512), hashBuffer))
	for n := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return "", 0, context.Cause(ctx)
		}
		read, err := f.ReadAt(buf, n)
		hash.Write(buf[:read])
		n += int64(read)
		if errors.Is(err, io.EOF) {
			return kind + ":" + hex.EncodeToString(hash.Sum(nil)), n, nil
		}
		if err != nil {
			return "", 0, err
		}
	}
}

// AddSum completes the manifest of the checkpoint in dir that was made with
// DumpRequest.LeaveSum. If known, which has a sum, is of the name, size and inode of
// the file without one, that is taken; else the file is read. A manifest that is
// complete, or a folder without one, stays as it is.
func AddSum(ctx context.Context, dir string, known File) error {
	m, err := readManifestBy(dir, decodeUnsummed)
	if err != nil || m == nil {
		return wrap(dir, err)
	}
	i := slices.IndexFunc(m.Files, func(f File) bool { return f.Sum == "" })
	if i < 0 {
		return nil
	}
	file := &m.Files[i]
	if file.Sum = known.Sum; file.Name != known.Name || file.Size != known.Size || file.Inode != known.Inode {
		f, err := openIn(dir, file.Name)
		if err != nil {
			return wrap(dir, err)
		}
		defer f.Close()
		if file.Sum, _, err = hashFile(ctx, f, file.Name); err != nil {
			return wrap(dir, fmt.Errorf("%s: %w", file.Name, err))
		}
	}
	data, err := m.encode()
	if err != nil {
		return wrap(dir, err)
	}
	return wrap(dir, os.WriteFile(filepath.Join(dir, manifestName), data, 0o600))
}

// inParallel calls fn with 0 to n-1, on as many goroutines as there are CPUs,
// and returns the first error; the context of the others ends with it.
func inParallel(ctx context.Context, n int, fn func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(n, runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for i := range next {
				if err := fn(ctx, i); err != nil {
					cancel(err)
				}
			}
		})
	}
	for i := 0; i < n && ctx.Err() == nil; i++ {
		select {
		case next <- i:
		case <-ctx.Done():
		}
	}
	close(next)
	wg.Wait()
	return context.Cause(ctx)
}

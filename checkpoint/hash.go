package checkpoint

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"
)

const (
	// hashBuffer is small enough to stay in a CPU's cache.
	hashBuffer = 256 << 10
	hashPiece  = 64 << 10 // takes about 50 µs
	// followEvery is how often the follower looks for what CRIU has written
	// meanwhile. At 2 GB/s that is 20 MB, which Commit hashes in as many ms.
	followEvery = 10 * time.Millisecond
)

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

// partialSum is the sum of the first n bytes of a file.
type partialSum struct {
	file *os.File
	kind string
	hash hash.Hash
	n    int64
	seen []sample // what was at some places when they were hashed
}

// sample is what a file had before offset end, when it was hashed.
type sample struct {
	end  int64
	size int
	data [32]byte
}

func newPartialSum(f *os.File, name string) *partialSum {
	kind, hash := newHash(name)
	return &partialSum{file: f, kind: kind, hash: hash}
}

// String is the sum as the manifest has it: the kind, a colon, and hex.
func (s *partialSum) String() string { return s.kind + ":" + hex.EncodeToString(s.hash.Sum(nil)) }

// advance hashes on to the file's present end, or until stop says so.
func (s *partialSum) advance(buf []byte, stop func() bool) error {
	for !stop() {
		n, err := s.file.ReadAt(buf, s.n)
		if n > 0 {
			// A hash cannot be interrupted, so a garbage collection may
			// have to wait for one, at this goroutine's priority.
			for piece := range slices.Chunk(buf[:n], hashPiece) {
				s.hash.Write(piece)
			}
			s.n += int64(n)
			last := sample{end: s.n, size: min(n, len(sample{}.data))}
			copy(last.data[:], buf[n-last.size:n])
			s.seen = append(s.seen, last)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// stillTrue reports whether s is the sum of a prefix of what is now at path.
// CRIU appends to its page images and does nothing else to them; should it ever
// allocate them ahead, or go back and change them, then what was hashed is no
// longer what the file holds, and the samples tell.
func (s *partialSum) stillTrue(path string) bool {
	here, err := os.Lstat(path)
	if err != nil {
		return false
	}
	hashed, err := s.file.Stat()
	if err != nil || !os.SameFile(here, hashed) || here.Size() < s.n {
		return false
	}
	var now [len(sample{}.data)]byte
	for _, was := range s.seen {
		at := was.end - int64(was.size)
		if _, err := s.file.ReadAt(now[:was.size], at); err != nil || !bytes.Equal(now[:was.size], was.data[:was.size]) {
			return false
		}
	}
	return true
}

// follower hashes the images with memory pages while CRIU writes them, so that
// Commit need not read gigabytes once more. What it reads is in the page cache.
//
// The container is frozen meanwhile, so nothing may be taken from CRIU: the
// goroutine has a thread of its own with the lowest priority. On a busy host it
// does not get far, and Commit hashes the rest, after the thaw.
type follower struct {
	dir  string
	stop chan struct{}
	done chan struct{}
	// sums is the goroutine's until done is closed, then its stopper's.
	sums map[string]*partialSum
}

func follow(dir string) *follower {
	f := &follower{dir: dir, stop: make(chan struct{}), done: make(chan struct{}), sums: map[string]*partialSum{}}
	go f.run()
	return f
}

// finish stops the goroutine and waits for it; at most one buffer is still
// read. It may be called again.
func (f *follower) finish() map[string]*partialSum {
	if !f.stopped() {
		close(f.stop)
	}
	<-f.done
	return f.sums
}

func (f *follower) stopped() bool {
	select {
	case <-f.stop:
		return true
	default:
		return false
	}
}

func (f *follower) run() {
	defer close(f.done)
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 19)
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	var buf []byte
	for {
		select {
		case <-f.stop:
			return
		case <-tick.C:
		}
		// What cannot be listed, opened or read now is Commit's to report.
		for _, name := range pageImages(f.dir) {
			sum := f.sums[name]
			if sum == nil {
				file, err := openIn(f.dir, name)
				if err != nil {
					continue
				}
				sum = newPartialSum(file, name)
				f.sums[name] = sum
			}
			if buf == nil {
				buf = make([]byte, hashBuffer)
			}
			_ = sum.advance(buf, f.stopped)
		}
	}
}

func pageImages(dir string) []string {
	d, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	return slices.DeleteFunc(names, func(name string) bool { return !isPages(name) })
}

func closeSums(sums map[string]*partialSum) {
	for _, s := range sums {
		s.file.Close()
	}
}

// hashFile returns the sum of the open file f, which has that name in the
// checkpoint, and its length. start, if not nil, is the sum of a prefix of f.
func hashFile(ctx context.Context, f *os.File, name string, start *partialSum) (string, int64, error) {
	s := newPartialSum(f, name)
	if start != nil {
		s.hash, s.n = start.hash, start.n
	}
	// Most files are small, and the pages are mostly hashed already.
	left := int64(0)
	if info, err := f.Stat(); err == nil {
		left = info.Size() - s.n
	}
	buf := make([]byte, min(max(left+1, 512), hashBuffer))
	for {
		if err := ctx.Err(); err != nil {
			return "", 0, context.Cause(ctx)
		}
		n, err := f.ReadAt(buf, s.n)
		s.hash.Write(buf[:n])
		s.n += int64(n)
		if errors.Is(err, io.EOF) {
			return s.String(), s.n, nil
		}
		if err != nil {
			return "", 0, err
		}
	}
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

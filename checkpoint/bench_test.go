package checkpoint

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkCommit measures Commit after 1 GiB was written to one page image in
// steps of 256 KiB, as fast as it goes, beside a hash of the whole from scratch.
func BenchmarkCommit(b *testing.B) {
	const size, step = 1 << 30, 256 << 10
	block := make([]byte, step)
	rand.NewChaCha8([32]byte{}).Read(block)
	var commit, scratch, written time.Duration
	for b.Loop() {
		dir := filepath.Join(b.TempDir(), "c")
		f, err := NewFolder(dir)
		must(b, err)
		must(b, os.CopyFS(f.Path(), os.DirFS(filepath.Join("testdata", "runc-sleep"))))
		start := time.Now()
		file, err := os.Create(filepath.Join(f.Path(), "pages-7.img"))
		must(b, err)
		for range size / step {
			_, err := file.Write(block)
			must(b, err)
		}
		must(b, file.Close())
		written += time.Since(start)

		start = time.Now()
		must(b, f.Commit(Manifest{}, false))
		commit += time.Since(start)

		start = time.Now()
		_, err = sumFiles(context.Background(), dir, []File{{Name: "pages-7.img", Size: size}})
		must(b, err)
		scratch += time.Since(start)
		must(b, os.RemoveAll(dir))
	}
	ms := func(d time.Duration) float64 { return float64(d.Milliseconds()) / float64(b.N) }
	b.ReportMetric(ms(written), "ms-write")
	b.ReportMetric(ms(commit), "ms-commit")
	b.ReportMetric(ms(scratch), "ms-scratch")
}

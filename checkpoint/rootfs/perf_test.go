package rootfs

import (
	"context"
	"os"
	"testing"
	"time"
)

func TestPerf(t *testing.T) {
	if os.Getenv("PERF") == "" {
		t.Skip()
	}
	s := time.Now()
	n, err := Copy(context.Background(), os.Getenv("PERF"), "/tmp/h-rootfs/src", nil)
	t.Log(n, err, time.Since(s))
}

package checkpoint

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"
)

func TestManual(t *testing.T) {
	for _, d := range strings.Fields(os.Getenv("CKPT")) {
		s := time.Now()
		img, err := Open(context.Background(), d)
		if err != nil {
			t.Logf("%s: %v", d, err)
			continue
		}
		tcp, err := img.EstablishedTCP()
		t.Logf("%s: %+v %v %v %v", d, img.Options(), tcp, err, time.Since(s))
	}
}

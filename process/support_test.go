package process

import (
	"context"
	"os"
	"path/filepath"
	"testing"
)

func TestSupports(t *testing.T) {
	reaper()
	for name, tc := range map[string]struct {
		script          string
		checkpoint, pod bool
	}{
		"all":           {`case $1 in checkpoint) ;; restore) echo "  --lsm-mount-context VALUE" ;; *) exit 1 ;; esac`, true, true},
		"no pods":       {`case $1 in checkpoint|restore) echo "  --lsm-profile VALUE" ;; *) exit 1 ;; esac`, true, false},
		"no restore":    {`case $1 in checkpoint) ;; *) exit 1 ;; esac`, false, false},
		"no checkpoint": {`case $1 in restore) ;; *) exit 1 ;; esac`, false, false},
		"nothing":       {`exit 1`, false, false},
	} {
		runtime := filepath.Join(t.TempDir(), "runtime")
		if err := os.WriteFile(runtime, []byte("#!/bin/sh\n"+tc.script+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		if got := SupportsCheckpoint(context.Background(), runtime); got != tc.checkpoint {
			t.Errorf("%s: checkpoint and restore: %v, want %v", name, got, tc.checkpoint)
		}
		if got := SupportsPodRestore(context.Background(), runtime); got != tc.pod {
			t.Errorf("%s: restore into a pod: %v, want %v", name, got, tc.pod)
		}
	}
	if SupportsCheckpoint(context.Background(), filepath.Join(t.TempDir(), "none")) {
		t.Error("a runtime that is not there has checkpoint and restore")
	}
}

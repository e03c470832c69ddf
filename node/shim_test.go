package node

import (
	"context"
	"io"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/api"
)

// fakeShim answers every request with the same updates.
type fakeShim struct {
	updates []*api.CheckpointUpdate
}

func (f *fakeShim) Checkpoint(context.Context, *api.CheckpointRequest) (api.Checkpoints_CheckpointClient, error) {
	return &fakeStream{updates: f.updates}, nil
}

type fakeStream struct {
	api.Checkpoints_CheckpointClient
	updates []*api.CheckpointUpdate
}

func (s *fakeStream) Recv() (*api.CheckpointUpdate, error) {
	if len(s.updates) == 0 {
		return nil, io.EOF
	}
	u := s.updates[0]
	s.updates = s.updates[1:]
	return u, nil
}

// TestMemoryFileOfShim passes on what a shim tells of the memory file. One that is older
// tells nothing, and one that is newer may send what is not known here.
func TestMemoryFileOfShim(t *testing.T) {
	progress := &api.CheckpointUpdate{Update: &api.CheckpointUpdate_Progress{Progress: &api.Progress{Stage: "dump", DoneBytes: 1}}}
	file := &api.CheckpointUpdate{Update: &api.CheckpointUpdate_MemoryFile{MemoryFile: &api.MemoryFile{Path: "a/b", Size: 7}}}
	unknown := &api.CheckpointUpdate{}
	must0(t, proto.Unmarshal([]byte{0x7a, 1, 0}, unknown)) // field 15
	result := &api.CheckpointUpdate{Update: &api.CheckpointUpdate_Result{Result: &api.CheckpointResult{ImageBytes: 3}}}
	for about, tc := range map[string]struct {
		updates []*api.CheckpointUpdate
		files   int
	}{
		"a file":          {[]*api.CheckpointUpdate{progress, file, progress, result}, 1},
		"an older shim":   {[]*api.CheckpointUpdate{progress, result}, 0},
		"a newer message": {[]*api.CheckpointUpdate{unknown, result}, 0},
	} {
		s := &shim{CheckpointsClient: &fakeShim{updates: tc.updates}}
		files := 0
		got, err := s.checkpoint(t.Context(), &api.CheckpointRequest{}, Progress(nil).of("c"), func(f *api.MemoryFile) {
			files++
			if f.Path != "a/b" || f.Size != 7 {
				t.Errorf("%s: %v", about, f)
			}
		})
		if err != nil || got.ImageBytes != 3 || files != tc.files {
			t.Errorf("%s: %v, %v, %d files; want %d", about, got, err, files, tc.files)
		}
	}
}

package rest

import (
	"cmp"
	"context"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/danielgtaylor/huma/v2"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/node"
)

// Checkpoint is a checkpoint in containerd's image store.
type Checkpoint struct {
	Ref        string    `json:"ref"`
	Digest     string    `json:"digest"`
	Created    time.Time `json:"created"`
	Format     string    `json:"format"`
	Container  string    `json:"container" doc:"its name"`
	Pod        *Pod      `json:"pod,omitempty"`
	Bytes      int64     `json:"bytes" doc:"what it takes besides its base image"`
	SignedBy   []string  `json:"signed_by" doc:"key IDs that it names, not verified"`
	KeyTrusted bool      `json:"key_trusted" doc:"one of them is trusted here"`
	Broken     string    `json:"broken,omitempty" doc:"why it cannot be read"`
}

func checkpointOf(l node.Listed) Checkpoint {
	c := Checkpoint{Ref: l.Ref, Digest: l.Digest, Created: l.Created, Format: string(l.Format), Container: l.Info.ContainerName,
		Bytes: l.Bytes(), SignedBy: append([]string{}, l.SignedBy...), KeyTrusted: l.KeyTrusted, Broken: l.Broken}
	c.Pod = podOf(l.Info.Pod)
	return c
}

// CheckpointBody says what to checkpoint, and how.
type CheckpointBody struct {
	Containers  []string `json:"containers,omitempty" maxItems:"100" maxLength:"76" doc:"IDs in containerd"`
	Pod         string   `json:"pod,omitempty" maxLength:"512" doc:"instead: a Kubernetes pod, NAME or NAMESPACE/NAME"`
	Ref         string   `json:"ref,omitempty" maxLength:"512" doc:"the image's name; without it, localhost/CONTAINER:TIME"`
	Format      string   `json:"format,omitempty" enum:"runnable,index,podman" doc:"runnable if there is none"`
	Compression string   `json:"compression,omitempty" enum:"zstd,gzip,none" doc:"zstd if there is none"`
	Exit        bool     `json:"exit,omitempty" doc:"end the container with the checkpoint"`
	PreDumps    int      `json:"pre_dumps,omitempty" minimum:"0" maximum:"127" doc:"how often the memory is written before, while the container runs"`
	Push        bool     `json:"push,omitempty" doc:"send the image to the registry that ref names"`
	PlainHTTP   bool     `json:"plain_http,omitempty" doc:"push without TLS, with the credentials of root if the registry asks; needs scope admin"`
	TCP         string   `json:"tcp,omitempty" enum:"keep,close" doc:"what becomes of TCP connections; without it, one is an error"`
	FileLocks   bool     `json:"file_locks,omitempty"`
	UnixSockets bool     `json:"external_unix_sockets,omitempty" doc:"save Unix sockets that are connected to outside the container"`
	Terminal    bool     `json:"terminal,omitempty" doc:"save a terminal whose session leader is outside the container"`
	LinkRemap   bool     `json:"link_remap,omitempty" doc:"save open files that were deleted and have other names; only with exit"`
	GhostLimit  uint64   `json:"ghost_limit,omitempty" doc:"the size in bytes of the largest deleted file that is saved; 0: CRIU's default"`
}

// PushBody says where to push a checkpoint.
type PushBody struct {
	Target    string `json:"target,omitempty" maxLength:"512" doc:"its name in the registry; without it, its own"`
	PlainHTTP bool   `json:"plain_http,omitempty" doc:"without TLS, with the credentials of root if the registry asks; needs scope admin"`
}

// PullBody says what to pull.
type PullBody struct {
	Ref       string `json:"ref" minLength:"1" maxLength:"512"`
	PlainHTTP bool   `json:"plain_http,omitempty" doc:"without TLS, with the credentials of root if the registry asks; needs scope admin"`
}

// CheckpointList is a page of checkpoints.
type CheckpointList struct {
	Items []Checkpoint `json:"items" doc:"the newest first"`
	Next  string       `json:"next,omitempty" doc:"after for the next page; there is none without it"`
}

// InCheckpoint is in the input of each request about one image, which its path has with
// %2F for each slash. (huma does not look into embedded types that are not exported.)
type InCheckpoint struct {
	InNamespace
	Ref string `path:"ref" maxLength:"512" doc:"the image, with %2F for each slash" example:"registry.example.com%2Fdb:monday"`
}

func (s *server) v1Checkpoints(api huma.API, m *v1Mux) {
	s.v1Read(api, m)
	type checkpoint struct {
		InNamespace
		Body CheckpointBody
	}
	add(api, m, ScopeCheckpoint, huma.Operation{OperationID: "checkpoint", Method: "POST", Path: "/v1/checkpoints", Summary: "Checkpoint containers", DefaultStatus: 202},
		func(ctx context.Context, in *checkpoint) (*accepted, error) {
			b := in.Body
			r := node.CheckpointRequest{Containers: b.Containers, Pod: b.Pod, Ref: b.Ref, Format: b.Format, Compression: b.Compression,
				Exit: b.Exit, PreDumps: b.PreDumps, Push: b.Push, PlainHTTP: b.PlainHTTP,
				Options: node.DumpOptions{OpenTCP: b.TCP == "keep", TCPClose: b.TCP == "close", FileLocks: b.FileLocks, ExternalUnixSockets: b.UnixSockets,
					Terminal: b.Terminal, LinkRemap: b.LinkRemap, GhostLimit: b.GhostLimit}}
			if err := r.Check(); err != nil {
				return nil, err
			}
			if err := s.mayPlain(ctx, b.PlainHTTP); err != nil {
				return nil, err
			}
			return s.accept(ctx, "checkpoint", cmp.Or(b.Pod, strings.Join(b.Containers, " ")), func(ctx context.Context, tell node.Progress) (any, error) {
				r.Progress = tell
				results, err := s.o.Node.Checkpoint(ctx, r)
				s.metrics.checkpointed(results)
				return results, err
			})
		})
	type push struct {
		InCheckpoint
		Body PushBody `required:"false"`
	}
	add(api, m, ScopeCheckpoint, huma.Operation{OperationID: "push", Method: "POST", Path: "/v1/checkpoints/{ref}/push", Summary: "Send a checkpoint to a registry", DefaultStatus: 202},
		func(ctx context.Context, in *push) (*accepted, error) {
			if err := s.mayPlain(ctx, in.Body.PlainHTTP); err != nil {
				return nil, err
			}
			return s.accept(ctx, "push", in.Ref, func(ctx context.Context, tell node.Progress) (any, error) {
				img, err := s.o.Node.Push(ctx, node.PushRequest{Ref: in.Ref, Target: in.Body.Target, PlainHTTP: in.Body.PlainHTTP, Progress: tell})
				return orNothing(img), err
			})
		})
	type pull struct {
		InNamespace
		Body PullBody
	}
	add(api, m, ScopeRestore, huma.Operation{OperationID: "pull", Method: "POST", Path: "/v1/pulls", Summary: "Fetch a checkpoint from a registry", DefaultStatus: 202},
		func(ctx context.Context, in *pull) (*accepted, error) {
			if err := s.mayPlain(ctx, in.Body.PlainHTTP); err != nil {
				return nil, err
			}
			return s.accept(ctx, "pull", in.Body.Ref, func(ctx context.Context, tell node.Progress) (any, error) {
				img, err := s.o.Node.Pull(ctx, node.PullRequest{Ref: in.Body.Ref, PlainHTTP: in.Body.PlainHTTP, Progress: tell})
				return orNothing(img), err
			})
		})
	type deleted struct{}
	add(api, m, ScopeCheckpoint, huma.Operation{OperationID: "removeCheckpoint", Method: "DELETE", Path: "/v1/checkpoints/{ref}", Summary: "Remove a checkpoint", DefaultStatus: 204},
		func(ctx context.Context, in *InCheckpoint) (*deleted, error) {
			_, err := s.o.Node.Remove(ctx, in.Ref)
			return nil, err
		})
}

// mayPlain refuses registries without TLS to a caller without scope admin: root's
// credentials would go to whom that likes, for all to read.
func (s *server) mayPlain(ctx context.Context, plain bool) error {
	if !plain {
		return nil
	}
	return s.needs(ctx, ScopeAdmin, "plain_http")
}

// orNothing is nil for a nil image, which is none as a value of an interface.
func orNothing(img *node.Image) any {
	if img == nil {
		return nil
	}
	return img
}

// v1Read adds what changes nothing.
func (s *server) v1Read(api huma.API, m *v1Mux) {
	type query struct {
		InNamespace
		Container string `query:"container" doc:"its name, its ID, or NAMESPACE/POD/NAME"`
		Format    string `query:"format" enum:"runnable,index,podman"`
		Limit     int    `query:"limit" default:"100" minimum:"1" maximum:"1000"`
		After     string `query:"after" doc:"next of the page before"`
	}
	add(api, m, ScopeRead, huma.Operation{OperationID: "listCheckpoints", Method: "GET", Path: "/v1/checkpoints", Summary: "List checkpoints"},
		func(ctx context.Context, in *query) (*output[CheckpointList], error) {
			all, err := s.o.Node.List(ctx, node.ListRequest{Container: in.Container, Format: in.Format})
			if err != nil {
				return nil, err
			}
			out := &output[CheckpointList]{}
			out.Body.Items = []Checkpoint{}
			if in.After != "" {
				i := slices.IndexFunc(all, func(l node.Listed) bool { return l.Ref == in.After })
				if i < 0 {
					return nil, fault.New(errdefs.ErrNotFound, "after %q: that checkpoint is gone: list from the beginning", in.After)
				}
				all = all[i+1:]
			}
			for i, l := range all {
				if i == in.Limit {
					out.Body.Next = all[i-1].Ref
					break
				}
				out.Body.Items = append(out.Body.Items, checkpointOf(l))
			}
			return out, nil
		})
	add(api, m, ScopeRead, huma.Operation{OperationID: "inspectCheckpoint", Method: "GET", Path: "/v1/checkpoints/{ref}", Summary: "Tell what is in a checkpoint: what `stasis inspect --output json` prints"},
		func(ctx context.Context, in *InCheckpoint) (*output[any], error) {
			report, err := s.o.Node.Inspect(ctx, node.InspectRequest{Checkpoint: in.Ref})
			if err != nil {
				return nil, err
			}
			return &output[any]{report}, nil
		})
	type diff struct {
		InCheckpoint
		With string `query:"with" required:"true" doc:"the later checkpoint"`
	}
	add(api, m, ScopeRead, huma.Operation{OperationID: "diffCheckpoints", Method: "GET", Path: "/v1/checkpoints/{ref}/diff", Summary: "Tell what changed from one checkpoint to another: what `stasis diff --output json` prints"},
		func(ctx context.Context, in *diff) (*output[any], error) {
			d, err := s.o.Node.Diff(ctx, node.DiffRequest{First: in.Ref, Second: in.With})
			if err != nil {
				return nil, err
			}
			return &output[any]{d}, nil
		})
	add(api, m, ScopeRead, huma.Operation{OperationID: "verifyCheckpoint", Method: http.MethodPost, Path: "/v1/checkpoints/{ref}/verify", Summary: "Read a checkpoint and compare it with what was signed: what `stasis verify --output json` prints", DefaultStatus: 202},
		func(ctx context.Context, in *InCheckpoint) (*accepted, error) {
			return s.accept(ctx, "verify", in.Ref, func(ctx context.Context, _ node.Progress) (any, error) {
				v, err := s.o.Node.Verify(ctx, in.Ref)
				if v == nil {
					return nil, err
				}
				return v, err
			})
		})
}

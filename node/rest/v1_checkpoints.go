package rest

import (
	"cmp"
	"context"
	"net/http"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/danielgtaylor/huma/v2"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/node"
	"github.com/stasis-run/stasis/node/rest/v1"
)

func checkpointOf(l node.Listed) v1.Checkpoint {
	return v1.Checkpoint{Ref: l.Ref, Digest: l.Digest, Created: l.Created, Format: string(l.Format),
		Container: l.Info.ContainerName, ContainerID: l.Info.ContainerID, Pod: podOf(l.Info.Pod), Base: l.Info.Base.Name,
		Bytes: l.Bytes(), SignedBy: append([]string{}, l.SignedBy...), KeyTrusted: l.KeyTrusted, Broken: l.Broken}
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
		Body v1.CheckpointBody
	}
	add(api, m, ScopeCheckpoint, huma.Operation{OperationID: "checkpoint", Method: "POST", Path: "/v1/checkpoints", Summary: "Checkpoint containers", DefaultStatus: 202},
		func(ctx context.Context, in *checkpoint) (*accepted, error) {
			b := in.Body
			r := node.CheckpointRequest{Containers: b.Containers, Pod: b.Pod, Ref: b.Ref, Format: b.Format, Compression: b.Compression,
				Exit: b.Exit, PreDumps: b.PreDumps, Push: b.Push, Registry: registryOf(b.Registry),
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
		Body v1.PushBody `required:"false"`
	}
	add(api, m, ScopeCheckpoint, huma.Operation{OperationID: "push", Method: "POST", Path: "/v1/checkpoints/{ref}/push", Summary: "Send a checkpoint to a registry", DefaultStatus: 202},
		func(ctx context.Context, in *push) (*accepted, error) {
			if err := s.mayPlain(ctx, in.Body.PlainHTTP); err != nil {
				return nil, err
			}
			return s.accept(ctx, "push", in.Ref, func(ctx context.Context, tell node.Progress) (any, error) {
				img, err := s.o.Node.Push(ctx, node.PushRequest{Ref: in.Ref, Target: in.Body.Target, Registry: registryOf(in.Body.Registry), Progress: tell})
				return orNothing(img), err
			})
		})
	type pull struct {
		InNamespace
		Body v1.PullBody
	}
	add(api, m, ScopeRestore, huma.Operation{OperationID: "pull", Method: "POST", Path: "/v1/pulls", Summary: "Fetch a checkpoint from a registry", DefaultStatus: 202},
		func(ctx context.Context, in *pull) (*accepted, error) {
			if err := s.mayPlain(ctx, in.Body.PlainHTTP); err != nil {
				return nil, err
			}
			return s.accept(ctx, "pull", in.Body.Ref, func(ctx context.Context, tell node.Progress) (any, error) {
				img, err := s.o.Node.Pull(ctx, node.PullRequest{Ref: in.Body.Ref, Registry: registryOf(in.Body.Registry), Progress: tell})
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

func registryOf(r v1.Registry) node.Registry {
	out := node.Registry{PlainHTTP: r.PlainHTTP}
	if l := r.Login; l != nil {
		out.Login = &node.Login{Registry: l.Registry, Username: l.Username, Password: l.Password}
	}
	return out
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
		func(ctx context.Context, in *query) (*output[v1.CheckpointList], error) {
			all, err := s.o.Node.List(ctx, node.ListRequest{Container: in.Container, Format: in.Format})
			if err != nil {
				return nil, err
			}
			out := &output[v1.CheckpointList]{}
			out.Body.Items = []v1.Checkpoint{}
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
	type inspect struct {
		InCheckpoint
		Secrets bool `query:"secrets" doc:"tell the environment of the processes, too; needs scope checkpoint"`
	}
	add(api, m, ScopeRead, huma.Operation{OperationID: "inspectCheckpoint", Method: "GET", Path: "/v1/checkpoints/{ref}", Summary: "Tell what is in a checkpoint: what `stasis inspect --output json` prints"},
		func(ctx context.Context, in *inspect) (*output[any], error) {
			if in.Secrets {
				// Who has it may have all of the checkpoint, by export.
				if err := s.needs(ctx, ScopeCheckpoint, "secrets"); err != nil {
					return nil, err
				}
			}
			report, err := s.o.Node.Inspect(ctx, node.InspectRequest{Checkpoint: in.Ref, Secrets: in.Secrets})
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

package rest

import (
	"cmp"
	"context"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/policy/allow"
	"github.com/stasis-run/stasis/node"
	"github.com/stasis-run/stasis/node/rest/v1"
)

func podOf(p *capture.Pod) *v1.Pod {
	if p == nil {
		return nil
	}
	return &v1.Pod{Namespace: p.Namespace, Name: p.Name, UID: p.UID}
}

func (s *server) v1Containers(api huma.API, m *v1Mux) {
	add(api, m, ScopeRead, huma.Operation{OperationID: "listContainers", Method: "GET", Path: "/v1/containers", Summary: "List containers"},
		func(ctx context.Context, _ *InNamespace) (*output[v1.ContainerList], error) {
			all, err := s.o.Node.Containers(ctx)
			if err != nil {
				return nil, err
			}
			out := &output[v1.ContainerList]{}
			out.Body.Items = []v1.Container{}
			for _, c := range all {
				out.Body.Items = append(out.Body.Items, v1.Container{ID: c.ID, Name: c.Name, Pod: podOf(c.Pod), Image: c.Image, Runtime: c.Runtime,
					Status: c.Status, Pid: c.Pid, Created: c.Created})
			}
			return out, nil
		})
	add(api, m, ScopeRead, huma.Operation{OperationID: "checkNode", Method: "GET", Path: "/v1/check", Summary: "Tell whether this node can checkpoint and restore"},
		func(ctx context.Context, _ *InNamespace) (*output[v1.FindingList], error) {
			out := &output[v1.FindingList]{}
			for _, f := range s.o.Node.Check(ctx) {
				out.Body.Items = append(out.Body.Items, v1.Finding(f))
			}
			return out, nil
		})
	type restore struct {
		InNamespace
		Body v1.RestoreBody
	}
	add(api, m, ScopeRestore, huma.Operation{OperationID: "restore", Method: "POST", Path: "/v1/restores", Summary: "Start a container from a checkpoint", DefaultStatus: 202},
		func(ctx context.Context, in *restore) (*accepted, error) {
			r, err := s.restoreRequest(ctx, in.Body)
			if err != nil {
				return nil, err
			}
			return s.accept(ctx, "restore", r.Checkpoint, func(ctx context.Context, tell node.Progress) (any, error) {
				r.Progress = tell
				result, err := s.o.Node.Restore(ctx, r)
				if result == nil {
					return nil, err
				}
				return result, err
			})
		})
}

// restoreRequest is what a body asks for, if the caller may ask for that.
func (s *server) restoreRequest(ctx context.Context, b v1.RestoreBody) (node.RestoreRequest, error) {
	r := node.RestoreRequest{Checkpoint: b.Checkpoint, Name: b.Name, TCPClose: b.TCPClose, Registry: registryOf(b.Registry), Snapshotter: b.Snapshotter,
		Healthy: b.WaitHealthy, HealthyTimeout: time.Duration(cmp.Or(b.WaitSeconds, 60)) * time.Second}
	if g := b.Grants; g != nil {
		r.Grants = allow.Grants{Mounts: g.Mounts, Devices: g.Devices, Namespaces: g.Namespaces, Capabilities: g.Capabilities, Seccomp: g.Seccomp,
			NewPrivileges: g.NewPrivileges, Unmask: g.Unmask, Sysctls: g.Sysctls, Ulimits: g.Ulimits, Labels: g.Labels, Priorities: g.Priorities,
			CgroupParent: g.CgroupParent}
	}
	r.Grants.Network, r.Grants.Privileged = b.Network, b.Privileged
	if b.Privileged || b.Grants != nil || b.PlainHTTP || b.Network != "" && b.Network != "none" {
		if err := s.needs(ctx, ScopeAdmin, "privileged, grants, plain_http, and a network of the host or of another container"); err != nil {
			return r, err
		}
	}
	if b.WaitHealthy != "" {
		if err := s.needs(ctx, ScopeExec, "wait_healthy"); err != nil {
			return r, err
		}
	}
	return r, nil
}

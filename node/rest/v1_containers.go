package rest

import (
	"context"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/node"
)

// Container is a container in containerd.
type Container struct {
	ID      string    `json:"id"`
	Name    string    `json:"name" doc:"Kubernetes' name of it, or its ID"`
	Pod     *Pod      `json:"pod,omitempty"`
	Image   string    `json:"image,omitempty"`
	Runtime string    `json:"runtime"`
	Status  string    `json:"status" doc:"running, paused, stopped or created; empty without a task"`
	Pid     uint32    `json:"pid" doc:"of its main process, 0 without a task"`
	Created time.Time `json:"created"`
}

// Pod is a pod of Kubernetes.
type Pod struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid,omitempty"`
}

func podOf(p *capture.Pod) *Pod {
	if p == nil {
		return nil
	}
	return &Pod{p.Namespace, p.Name, p.UID}
}

// Finding is what a node has, or lacks.
type Finding struct {
	Name   string `json:"name"`
	State  string `json:"state" enum:"ok,warn,missing"`
	Detail string `json:"detail"`
	Fix    string `json:"fix,omitempty"`
}

// ContainerList is the answer with containers.
type ContainerList struct {
	Items []Container `json:"items"`
}

// FindingList is the answer with findings.
type FindingList struct {
	Items []Finding `json:"items"`
}

// RestoreBody says what to restore.
type RestoreBody struct {
	Checkpoint string `json:"checkpoint" minLength:"1" maxLength:"512" doc:"an image, which is pulled if it is not here"`
	Name       string `json:"name,omitempty" maxLength:"76" doc:"the container's ID; without it, the one that it had"`
	TCPClose   bool   `json:"tcp_close,omitempty" doc:"close all TCP connections"`
	Network    string `json:"network,omitempty" enum:"none,host" doc:"none: its own, with a loopback only; host needs scope admin"`
	PlainHTTP  bool   `json:"plain_http,omitempty" doc:"pull without TLS, with the credentials of root if the registry asks; needs scope admin"`
	Privileged bool   `json:"privileged,omitempty" doc:"grant all that the checkpoint's spec asks for; needs scope admin"`
}

func (s *server) v1Containers(api huma.API, m *v1Mux) {
	add(api, m, ScopeRead, huma.Operation{OperationID: "listContainers", Method: "GET", Path: "/v1/containers", Summary: "List containers"},
		func(ctx context.Context, _ *InNamespace) (*output[ContainerList], error) {
			all, err := s.o.Node.Containers(ctx)
			if err != nil {
				return nil, err
			}
			out := &output[ContainerList]{}
			out.Body.Items = []Container{}
			for _, c := range all {
				out.Body.Items = append(out.Body.Items, Container{c.ID, c.Name, podOf(c.Pod), c.Image, c.Runtime, c.Status, c.Pid, c.Created})
			}
			return out, nil
		})
	add(api, m, ScopeRead, huma.Operation{OperationID: "checkNode", Method: "GET", Path: "/v1/check", Summary: "Tell whether this node can checkpoint and restore"},
		func(ctx context.Context, _ *InNamespace) (*output[FindingList], error) {
			out := &output[FindingList]{}
			for _, f := range s.o.Node.Check(ctx) {
				out.Body.Items = append(out.Body.Items, Finding(f))
			}
			return out, nil
		})
	type restore struct {
		InNamespace
		Body RestoreBody
	}
	add(api, m, ScopeRestore, huma.Operation{OperationID: "restore", Method: "POST", Path: "/v1/restores", Summary: "Start a container from a checkpoint", DefaultStatus: 202},
		func(ctx context.Context, in *restore) (*accepted, error) {
			b := in.Body
			if b.Privileged || b.Network == "host" || b.PlainHTTP {
				if err := s.needs(ctx, ScopeAdmin, "privileged, network host and plain_http"); err != nil {
					return nil, err
				}
			}
			r := node.RestoreRequest{Checkpoint: b.Checkpoint, Name: b.Name, TCPClose: b.TCPClose, PlainHTTP: b.PlainHTTP}
			r.Grants.Network, r.Grants.Privileged = b.Network, b.Privileged
			return s.accept(ctx, "restore", b.Checkpoint, func(ctx context.Context, tell node.Progress) (any, error) {
				r.Progress = tell
				result, err := s.o.Node.Restore(ctx, r)
				if result == nil {
					return nil, err
				}
				return result, err
			})
		})
}

package rest

import (
	"context"
	"net/http"
	"time"

	"github.com/containerd/errdefs"
	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/sse"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/node"
	"github.com/stasis-run/stasis/node/rest/v1"
)

// accepted is the answer to a request whose work goes on as a job.
type accepted struct {
	Location string `header:"Location" doc:"the job"`
	Body     v1.Job
}

// accept begins a job.
func (s *server) accept(ctx context.Context, kind, of string, do func(context.Context, node.Progress) (any, error)) (*accepted, error) {
	job, err := s.jobs.start(ctx, kind, of, do)
	if err != nil {
		return nil, err
	}
	return &accepted{"/v1/jobs/" + job.ID + "?namespace=" + job.Namespace, job}, nil
}

// needs refuses a caller without a scope.
func (s *server) needs(ctx context.Context, scope Scope, what string) error {
	namespace := namespaceOf(ctx)
	if who := callerIn(ctx); !who.may(scope, namespace) {
		return fault.New(errdefs.ErrPermissionDenied, "%s may not: %s needs scope %s in namespace %s", who.name, what, scope, namespace)
	}
	return nil
}

// scopeOf is the scope that beginning a job of a kind needs, and so canceling it.
func scopeOf(kind string) Scope {
	switch kind {
	case "restore", "pull":
		return ScopeRestore
	case "verify":
		return ScopeRead
	}
	return ScopeCheckpoint
}

// eventsEvery is how often a client hears of a job's progress, at most.
const eventsEvery = 200 * time.Millisecond

func (s *server) v1Jobs(api huma.API, m *v1Mux) {
	add(api, m, ScopeRead, huma.Operation{OperationID: "listJobs", Method: "GET", Path: "/v1/jobs", Summary: "List jobs"},
		func(ctx context.Context, _ *InNamespace) (*output[v1.JobList], error) {
			out := &output[v1.JobList]{}
			out.Body.Items = s.jobs.list(namespaceOf(ctx))
			return out, nil
		})
	type id struct {
		InNamespace
		ID string `path:"id"`
	}
	add(api, m, ScopeRead, huma.Operation{OperationID: "getJob", Method: "GET", Path: "/v1/jobs/{id}", Summary: "Tell how far a job is"},
		func(ctx context.Context, in *id) (*output[v1.Job], error) {
			job, err := s.jobs.get(namespaceOf(ctx), in.ID)
			return &output[v1.Job]{job}, err
		})
	add(api, m, ScopeRead, huma.Operation{OperationID: "cancelJob", Method: "POST", Path: "/v1/jobs/{id}/cancel", Summary: "Have a job end; it undoes what it began. It needs the scope that beginning it needed", DefaultStatus: 202},
		func(ctx context.Context, in *id) (*output[v1.Job], error) {
			job, err := s.jobs.get(namespaceOf(ctx), in.ID)
			if err == nil {
				err = s.needs(ctx, scopeOf(job.Kind), "to cancel a "+job.Kind)
			}
			if err != nil {
				return nil, err
			}
			job, err = s.jobs.cancel(namespaceOf(ctx), in.ID)
			return &output[v1.Job]{job}, err
		})
	s.followJob(api, m)
}

// followJob adds the events of a job. sse.Register would begin to answer before it is known
// whether there is such a job, so sse is told only when that is.
func (s *server) followJob(api huma.API, m *v1Mux) {
	type id struct {
		InNamespace
		ID string `path:"id"`
	}
	m.next = route{scope: ScopeRead, namespace: namespaceIn, fail: failProblem, stream: true, before: func(r *http.Request) error {
		_, err := s.jobs.get(namespaceOf(r.Context()), r.PathValue("id"))
		return err
	}}
	sse.Register(api, huma.Operation{OperationID: "followJob", Method: http.MethodGet, Path: "/v1/jobs/{id}/events",
		Summary: "Follow a job as server-sent events, until it has ended", Extensions: map[string]any{"x-scope": ScopeRead}},
		map[string]any{"job": v1.Job{}},
		func(ctx context.Context, in *id, send sse.Sender) {
			changed, stop, err := s.jobs.listen(namespaceOf(ctx), in.ID)
			if err != nil {
				return // it was forgotten just now
			}
			defer stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-changed:
				}
				job, err := s.jobs.get(namespaceOf(ctx), in.ID)
				if err != nil || send.Data(job) != nil || job.State.Ended() {
					return
				}
				select {
				case <-ctx.Done():
					return
				case <-time.After(eventsEvery):
				}
			}
		})
}

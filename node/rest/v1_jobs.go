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
)

// accepted is the answer to a request whose work goes on as a job.
type accepted struct {
	Location string `header:"Location" doc:"the job"`
	Body     Job
}

// JobList is the answer with jobs.
type JobList struct {
	Items []Job `json:"items" doc:"the newest first"`
}

// accept begins a job.
func (s *server) accept(ctx context.Context, kind, of string, do func(context.Context, node.Progress) (any, error)) (*accepted, error) {
	job, err := s.jobs.start(ctx, kind, of, do)
	if err != nil {
		return nil, err
	}
	return &accepted{"/v1/jobs/" + job.ID + "?namespace=" + job.Namespace, job}, nil
}

// needsAdmin refuses a caller without scope admin.
func (s *server) needsAdmin(ctx context.Context, what string) error {
	namespace := namespaceOf(ctx)
	if who := callerIn(ctx); !who.may(ScopeAdmin, namespace) {
		return fault.New(errdefs.ErrPermissionDenied, "%s may not: %s needs scope %s in namespace %s", who.name, what, ScopeAdmin, namespace)
	}
	return nil
}

// eventsEvery is how often a client hears of a job's progress, at most.
const eventsEvery = 200 * time.Millisecond

func (s *server) v1Jobs(api huma.API, m *v1Mux) {
	add(api, m, ScopeRead, huma.Operation{OperationID: "listJobs", Method: "GET", Path: "/v1/jobs", Summary: "List jobs"},
		func(ctx context.Context, _ *InNamespace) (*output[JobList], error) {
			out := &output[JobList]{}
			out.Body.Items = s.jobs.list(namespaceOf(ctx))
			return out, nil
		})
	type id struct {
		InNamespace
		ID string `path:"id"`
	}
	add(api, m, ScopeRead, huma.Operation{OperationID: "getJob", Method: "GET", Path: "/v1/jobs/{id}", Summary: "Tell how far a job is"},
		func(ctx context.Context, in *id) (*output[Job], error) {
			job, err := s.jobs.get(namespaceOf(ctx), in.ID)
			return &output[Job]{job}, err
		})
	add(api, m, ScopeCheckpoint, huma.Operation{OperationID: "cancelJob", Method: "POST", Path: "/v1/jobs/{id}/cancel", Summary: "Have a job end; it undoes what it began", DefaultStatus: 202},
		func(ctx context.Context, in *id) (*output[Job], error) {
			job, err := s.jobs.cancel(namespaceOf(ctx), in.ID)
			return &output[Job]{job}, err
		})
	m.next = route{scope: ScopeRead, namespace: namespaceIn, fail: failProblem, stream: true}
	sse.Register(api, huma.Operation{OperationID: "followJob", Method: http.MethodGet, Path: "/v1/jobs/{id}/events",
		Summary: "Follow a job as server-sent events, until it has ended", Extensions: map[string]any{"x-scope": ScopeRead}},
		map[string]any{"job": Job{}, "problem": Problem{}},
		func(ctx context.Context, in *id, send sse.Sender) {
			changed, stop, err := s.jobs.listen(namespaceOf(ctx), in.ID)
			if err != nil {
				_ = send.Data(problemOf(err))
				return
			}
			defer stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-changed:
				}
				job, err := s.jobs.get(namespaceOf(ctx), in.ID)
				if err != nil || send.Data(job) != nil || job.State.ended() {
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

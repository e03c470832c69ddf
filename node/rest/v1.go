package rest

import (
	"context"
	"net/http"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/node/rest/v1"
)

// The interface of our own, /v1. huma makes its OpenAPI document of the Go types, and
// checks requests by it before a handler sees them.

// encoding/json takes a field in any case, and the last one counts: huma checks another.
func init() { huma.ValidateStrictCasing = true }

// v1Mux has huma's routes go through server.route, which lets callers in.
type v1Mux struct {
	*http.ServeMux
	s    *server
	next route // of the route that is being added
}

// HandleFunc implements humago.Mux.
func (m *v1Mux) HandleFunc(pattern string, serve func(http.ResponseWriter, *http.Request)) {
	m.Handle(pattern, m.s.route(m.next, func(w http.ResponseWriter, r *http.Request) error {
		serve(w, r)
		return nil
	}))
}

// defaultNamespace is containerd's that a request is about which names none.
const defaultNamespace = "default"

// namespaceIn is the namespace that a request names.
func namespaceIn(r *http.Request) string {
	if n := r.URL.Query().Get("namespace"); n != "" {
		return n
	}
	return defaultNamespace
}

// namespaceOf is the namespace that a request was let in to. Only this is used: what huma
// takes for the parameter may be another of two.
func namespaceOf(ctx context.Context) string {
	namespace, _ := namespaces.Namespace(ctx)
	return namespace
}

// InNamespace is in the input of each request that is about containerd's namespace.
type InNamespace struct {
	Namespace string `query:"namespace" default:"default" maxLength:"76" pattern:"^[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*$" doc:"containerd's namespace, k8s.io for Kubernetes"`
}

// output is an answer with a body.
type output[T any] struct{ Body T }

// v1 adds the interface to a mux.
func (s *server) v1(mux *http.ServeMux) huma.API {
	config := huma.DefaultConfig("Stasis", "1")
	config.Info.Description = "Checkpoint and restore of a node's containers. docs/rest-api.md explains it."
	config.DocsPath, config.SchemasPath = "", "" // pages that need other hosts
	config.CreateHooks = nil                     // links to the schemas
	config.Transformers = []huma.Transformer{typeOfProblem}
	m := &v1Mux{ServeMux: mux, s: s, next: route{scope: ScopeRead, fail: failProblem}}
	api := humago.New(m, config)
	s.v1Containers(api, m)
	s.v1Checkpoints(api, m)
	s.v1Streams(api, m)
	s.v1Jobs(api, m)
	s.v1Events(api, m)
	mux.Handle("/v1/", s.route(route{scope: ScopeRead, fail: failProblem}, func(_ http.ResponseWriter, r *http.Request) error {
		return fault.New(errdefs.ErrNotFound, "there is no %s %s", r.Method, r.URL.Path)
	}))
	return api
}

// typeOfProblem gives what huma finds wrong with a request its type. It takes the values
// out, of which one may be a password: each error has where it is.
func typeOfProblem(_ huma.Context, _ string, v any) (any, error) {
	if e, ok := v.(*huma.ErrorModel); ok {
		for _, detail := range e.Errors {
			detail.Value = nil
		}
		if e.Type == "" {
			e.Type = v1.ProblemType(slug(http.StatusText(e.Status)))
		}
	}
	return v, nil
}

// add adds a request. It needs scope in the namespace that it names; one that is not a GET
// changes something.
func add[I, O any](api huma.API, m *v1Mux, scope Scope, op huma.Operation, serve func(context.Context, *I) (*O, error)) {
	m.next = route{scope: scope, namespace: namespaceIn, mutates: op.Method != http.MethodGet, fail: failProblem}
	op.BodyReadTimeout = bodyTime // huma sets its own, in place of Serve's
	op.Errors = []int{400, 401, 403, 404, 409, 422, 503}
	op.Extensions = map[string]any{"x-scope": scope}
	huma.Register(api, op, func(ctx context.Context, in *I) (*O, error) {
		out, err := serve(ctx, in)
		if err != nil {
			p := problemOf(err)
			if p.Status >= http.StatusInternalServerError {
				m.s.o.Log.Warn(op.Method + " " + op.Path + ": " + err.Error())
			}
			return nil, p
		}
		return out, nil
	})
}

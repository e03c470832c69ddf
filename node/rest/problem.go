package rest

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/node"
	"github.com/stasis-run/stasis/node/rest/v1"
)

// slug is a title as a part of a problem's type.
func slug(title string) string { return strings.ToLower(strings.ReplaceAll(title, " ", "-")) }

// problemOf is an error of package node as a problem.
func problemOf(err error) *v1.Problem { return problem(statusOf(err), err) }

// maxDetail bounds Problem.Detail, in bytes. A record of a job has to be read again.
const maxDetail = 16 << 10

// problem is an error as a problem. Its status names it, and what the status does not tell
// the error.
func problem(status int, err error) *v1.Problem {
	p := &v1.Problem{Title: http.StatusText(status), Status: status, Detail: err.Error()}
	if len(p.Detail) > maxDetail {
		p.Detail = strings.ToValidUTF8(p.Detail[:maxDetail], "") + "…"
	}
	p.Type = v1.ProblemType(slug(p.Title))
	switch {
	case errors.Is(err, node.ErrRequest):
		p.Type, p.Title = v1.ProblemWrongRequest, "Wrong Request"
	case errdefs.IsAlreadyExists(err):
		p.Type, p.Title = v1.ProblemType("already-exists"), "Already Exists"
	case errdefs.IsFailedPrecondition(err):
		p.Type, p.Title = v1.ProblemType("failed-precondition"), "Failed Precondition"
	}
	return p
}

// failProblem answers with an error as a problem.
func failProblem(w http.ResponseWriter, status int, err error) {
	p := problem(status, err)
	data, merr := json.Marshal(p)
	if merr != nil {
		failPlain(w, status, err)
		return
	}
	w.Header().Set("Content-Type", p.ContentType(""))
	w.WriteHeader(status)
	_, _ = w.Write(append(data, '\n'))
}

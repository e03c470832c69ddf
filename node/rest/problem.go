package rest

import (
	"encoding/json"
	"net/http"
	"strings"

	"github.com/containerd/errdefs"
)

// Problem is an error as RFC 9457 has it.
type Problem struct {
	Type   string `json:"type" doc:"what kind of problem it is; stable" example:"urn:stasis:problem:not-found"`
	Title  string `json:"title" doc:"the same for people"`
	Status int    `json:"status" doc:"the HTTP status"`
	Detail string `json:"detail" doc:"what went wrong, with what, and what to do"`
}

// Error implements error, and GetStatus is for huma.
func (p *Problem) Error() string  { return p.Detail }
func (p *Problem) GetStatus() int { return p.Status }

// ContentType is for huma.
func (p *Problem) ContentType(string) string { return "application/problem+json" }

// slug is a title as a part of a problem's type.
func slug(title string) string { return strings.ToLower(strings.ReplaceAll(title, " ", "-")) }

func problemType(name string) string { return "urn:stasis:problem:" + name }

// problemOf is an error of package node as a problem.
func problemOf(err error) *Problem {
	p := &Problem{Status: statusOf(err), Detail: err.Error()}
	p.name(err)
	return p
}

// name names a problem by its status, and what the status does not tell by the error.
func (p *Problem) name(err error) {
	p.Title = http.StatusText(p.Status)
	name := slug(p.Title)
	switch {
	case errdefs.IsAlreadyExists(err):
		name, p.Title = "already-exists", "Already Exists"
	case errdefs.IsFailedPrecondition(err):
		name, p.Title = "failed-precondition", "Failed Precondition"
	}
	p.Type = problemType(name)
}

// failProblem answers with an error as a problem.
func failProblem(w http.ResponseWriter, status int, err error) {
	p := &Problem{Status: status, Detail: err.Error()}
	p.name(err)
	data, merr := json.Marshal(p)
	if merr != nil {
		failPlain(w, status, err)
		return
	}
	w.Header().Set("Content-Type", p.ContentType(""))
	w.WriteHeader(status)
	_, _ = w.Write(append(data, '\n'))
}

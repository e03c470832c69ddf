package v1

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/containerd/errdefs"
)

// Problem is an error as RFC 9457 has it. errdefs tells of what class it is.
type Problem struct {
	Type   string `json:"type" doc:"what kind of problem it is; stable" example:"urn:stasis:problem:not-found"`
	Title  string `json:"title" doc:"the same for people"`
	Status int    `json:"status" doc:"the HTTP status"`
	Detail string `json:"detail" doc:"what went wrong, with what, and what to do"`
	// Errors says what fields of a request are not as they have to be.
	Errors []FieldError `json:"errors,omitempty"`
}

// FieldError is what is wrong with a field of a request.
type FieldError struct {
	Message  string `json:"message"`
	Location string `json:"location" doc:"such as body.ref"`
}

// problemContent is the type of a body that is a problem.
const problemContent = "application/problem+json"

const problemPrefix = "urn:stasis:problem:"

// ProblemType is what Problem.Type is of a kind's name.
func ProblemType(name string) string { return problemPrefix + name }

// Error implements error.
func (p *Problem) Error() string {
	text := p.Detail
	for _, f := range p.Errors {
		text += fmt.Sprintf("; %s: %s", f.Location, f.Message)
	}
	return text
}

// GetStatus is for huma.
func (p *Problem) GetStatus() int { return p.Status }

// ContentType is for huma.
func (p *Problem) ContentType(string) string { return problemContent }

// ProblemWrongRequest is the type of a problem with a request in itself: nothing was done.
const ProblemWrongRequest = problemPrefix + "wrong-request"

// WrongRequest tells whether the request was wrong in itself, and nothing was done.
func (p *Problem) WrongRequest() bool {
	return p.Type == ProblemWrongRequest || p.Status == http.StatusUnprocessableEntity
}

// Is implements errors.Is for errdefs' classes.
func (p *Problem) Is(target error) bool {
	switch strings.TrimPrefix(p.Type, problemPrefix) {
	case "not-found":
		return target == errdefs.ErrNotFound
	case "bad-request", "unprocessable-entity", "wrong-request":
		return target == errdefs.ErrInvalidArgument
	case "forbidden":
		return target == errdefs.ErrPermissionDenied
	case "unauthorized":
		return target == errdefs.ErrUnauthenticated
	case "already-exists":
		return target == errdefs.ErrAlreadyExists
	case "failed-precondition":
		return target == errdefs.ErrFailedPrecondition
	case "service-unavailable":
		return target == errdefs.ErrUnavailable
	}
	return false
}

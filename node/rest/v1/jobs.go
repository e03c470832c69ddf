package v1

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"time"

	"github.com/tmaxmax/go-sse"
)

// The operations of this file are jobs: the answer comes when the job has begun. Wait
// waits for its end.

// Checkpoint begins to checkpoint containers. The job's result is a list of
// node.CheckpointResult.
func (c *Client) Checkpoint(ctx context.Context, b CheckpointBody) (*Job, error) {
	return c.begin(ctx, "/v1/checkpoints", b)
}

// Restore begins to start a container from a checkpoint. The job's result is a
// node.RestoreResult.
func (c *Client) Restore(ctx context.Context, b RestoreBody) (*Job, error) {
	return c.begin(ctx, "/v1/restores", b)
}

// Push begins to send a checkpoint to a registry. The job's result is an Image.
func (c *Client) Push(ctx context.Context, ref string, b PushBody) (*Job, error) {
	return c.begin(ctx, image(ref)+"/push", b)
}

// Pull begins to fetch a checkpoint from a registry. The job's result is an Image.
func (c *Client) Pull(ctx context.Context, b PullBody) (*Job, error) {
	return c.begin(ctx, "/v1/pulls", b)
}

// Verify begins to compare a checkpoint with what was signed. The job's result is a
// node.Verification.
func (c *Client) Verify(ctx context.Context, ref string) (*Job, error) {
	return c.begin(ctx, image(ref)+"/verify", nil)
}

func (c *Client) begin(ctx context.Context, path string, body any) (*Job, error) {
	job := &Job{}
	if err := c.call(ctx, "POST", path, nil, body, job); err != nil {
		return nil, err
	}
	return job, nil
}

// Jobs lists jobs, the newest first.
func (c *Client) Jobs(ctx context.Context) ([]Job, error) {
	var list JobList
	err := c.call(ctx, "GET", "/v1/jobs", nil, nil, &list)
	return list.Items, err
}

// Job tells how far a job is.
func (c *Client) Job(ctx context.Context, id string) (*Job, error) {
	job := &Job{}
	if err := c.call(ctx, "GET", jobPath(id), nil, nil, job); err != nil {
		return nil, err
	}
	return job, nil
}

// Cancel has a job end, which it does when it has undone what it began.
func (c *Client) Cancel(ctx context.Context, id string) (*Job, error) {
	job := &Job{}
	if err := c.call(ctx, "POST", jobPath(id)+"/cancel", nil, nil, job); err != nil {
		return nil, err
	}
	return job, nil
}

func jobPath(id string) string { return "/v1/jobs/" + url.PathEscape(id) }

const (
	// waitAgain is how long Wait waits after a connection that broke, before it asks again.
	waitAgain = time.Second
	// waitTime is how long it does so without any answer.
	waitTime = 30 * time.Second
)

// Wait waits for a job's end, also over connections that break, and tells of each step on
// the way. tell may be nil. A job that did not succeed is no error of Wait's; its Error
// says what went wrong. An error that is no *Problem says that the job may go on: the node
// cannot be asked.
func (c *Client) Wait(ctx context.Context, id string, tell func(Job)) (*Job, error) {
	if tell == nil {
		tell = func(Job) {}
	}
	for heard := time.Now(); ; {
		last, err := c.follow(ctx, id, tell)
		if last != nil {
			if last.State.Ended() {
				return last, nil
			}
			heard = time.Now() // the connection was good until now
		}
		var p *Problem
		if errors.As(err, &p) && p.Status < 500 || ctx.Err() != nil || time.Since(heard) > waitTime {
			return last, errors.Join(err, context.Cause(ctx))
		}
		select {
		case <-ctx.Done():
		case <-time.After(waitAgain):
		}
	}
}

// follow follows a job over one connection, and returns what it heard last; nil: nothing.
func (c *Client) follow(ctx context.Context, id string, tell func(Job)) (last *Job, err error) {
	err = c.events(ctx, jobPath(id)+"/events", func(data []byte) error {
		job := &Job{}
		if err := json.Unmarshal(data, job); err != nil {
			return err
		}
		last = job
		tell(*job)
		return nil
	})
	return last, err
}

// Follow tells what happens to containers, until ctx ends or the connection does. The first
// event has the type EventWatching.
func (c *Client) Follow(ctx context.Context, tell func(Event)) error {
	return c.events(ctx, "/v1/events", func(data []byte) error {
		e := Event{}
		if err := json.Unmarshal(data, &e); err != nil {
			return err
		}
		tell(e)
		return nil
	})
}

// maxEvent bounds one event, in bytes: the end of a job, with its result.
const maxEvent = 16 << 20

// events reads a stream of server-sent events.
func (c *Client) events(ctx context.Context, path string, each func(data []byte) error) error {
	answer, err := c.do(ctx, "GET", path, nil, nil, "")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	for e, err := range sse.Read(answer.Body, &sse.ReadConfig{MaxEventSize: maxEvent}) {
		if err == nil {
			err = each([]byte(e.Data))
		}
		if err != nil {
			return c.failed("GET", path, err)
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return c.failed("GET", path, fmt.Errorf("the stream of events has ended: %w", io.ErrUnexpectedEOF))
}

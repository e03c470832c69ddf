package rest

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/node"
	"github.com/stasis-run/stasis/node/rest/v1"
)

const (
	jobsFolder = "jobs"
	// maxJobs bounds how many jobs are at work at a time; others wait.
	maxJobs = 16
	// maxQueued bounds how many wait, maxQueuedEach how many of one client.
	maxQueued     = 1000
	maxQueuedEach = 250
	// maxRecords bounds how many ended jobs are known; the oldest go first.
	maxRecords = 1000
	// maxRecord bounds what is read of one, in bytes.
	maxRecord = 8 << 20
)

// jobs are those at work and the records of those that have ended, which are files in
// dir, so that a later process knows them.
type jobs struct {
	dir string
	log *slog.Logger
	// observe notes a job that was at work.
	observe func(kind string, started time.Time, err error)
	slots   chan struct{}
	base    context.Context
	abort   context.CancelCauseFunc
	work    sync.WaitGroup

	mu     sync.Mutex
	ending bool
	all    map[string]*job
}

type job struct {
	v1.Job
	cancel    context.CancelCauseFunc
	listeners map[chan struct{}]struct{}
}

// Causes of the end of a job's context.
var (
	errCanceled = errors.New("canceled")
	errEnding   = errors.New("stasisd ended before it was done; what it had begun is undone")
)

// newJobs reads the records in a folder, which it makes. Those of jobs that were at work
// when the process ended say so from now on.
func newJobs(dir string, log *slog.Logger, observe func(string, time.Time, error)) (*jobs, error) {
	j := &jobs{dir: dir, log: log, observe: observe, slots: make(chan struct{}, maxJobs), all: map[string]*job{}}
	j.base, j.abort = context.WithCancelCause(context.Background())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder of jobs: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read the records of jobs: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		id, isRecord := strings.CutSuffix(e.Name(), ".json")
		if !isRecord {
			_ = os.Remove(path) // of a record that was not written to its end
			continue
		}
		data, err := capture.ReadSmall(path, maxRecord)
		one := &job{}
		if err == nil {
			err = json.Unmarshal(data, &one.Job)
		}
		if err == nil && one.ID != id {
			err = fmt.Errorf("it is of job %q", one.ID)
		}
		if err != nil {
			log.Warn(fmt.Sprintf("the record of a job, %s, is of no use, and is removed: %v", path, errors.Join(err, os.Remove(path))))
			continue
		}
		if !one.State.Ended() {
			one.State, one.Ended = v1.StateInterrupted, time.Now().UTC()
			one.Error = &v1.Problem{Type: v1.ProblemType("interrupted"), Title: "Interrupted", Status: 500,
				Detail: "stasisd ended while it was at work; what it had begun is undone, or complete: look at the containers and the checkpoints"}
			if err := j.write(&one.Job); err != nil {
				return nil, err
			}
		}
		j.all[id] = one
	}
	j.forget()
	return j, nil
}

// start begins a job in the namespace of ctx, which do does. It reports the progress by
// tell.
func (j *jobs) start(ctx context.Context, kind, of string, do func(ctx context.Context, tell node.Progress) (any, error)) (v1.Job, error) {
	// What the request's context holds, but not its end.
	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(j.base, func() { cancel(context.Cause(j.base)) })
	one := &job{cancel: cancel, listeners: map[chan struct{}]struct{}{}, Job: v1.Job{
		ID: rand.Text(), Kind: kind, Of: of, Namespace: namespaceOf(ctx), Who: callerIn(ctx).name, State: v1.StateQueued, Created: time.Now().UTC(),
	}}
	j.mu.Lock()
	queued, own := 0, 0
	for _, other := range j.all {
		if other.State == v1.StateQueued {
			queued++
			if other.Who == one.Who {
				own++
			}
		}
	}
	switch {
	case j.ending:
		j.mu.Unlock()
		stop()
		return v1.Job{}, fault.New(errdefs.ErrUnavailable, "stasisd is ending")
	case queued >= maxQueued:
		j.mu.Unlock()
		stop()
		return v1.Job{}, fault.New(errdefs.ErrUnavailable, "%d jobs are waiting already", queued)
	case own >= maxQueuedEach:
		j.mu.Unlock()
		stop()
		return v1.Job{}, fault.New(errdefs.ErrUnavailable, "%d jobs of %s are waiting already", own, one.Who)
	}
	j.all[one.ID] = one
	j.work.Add(1)
	snapshot := one.Job
	j.mu.Unlock()
	if err := j.write(&snapshot); err != nil {
		j.mu.Lock()
		delete(j.all, one.ID)
		j.mu.Unlock()
		j.work.Done()
		stop()
		return v1.Job{}, err
	}
	go func() {
		defer j.work.Done()
		defer cancel(nil)
		defer stop()
		j.run(work, one, do)
	}()
	return snapshot, nil
}

// run does a job.
func (j *jobs) run(ctx context.Context, one *job, do func(context.Context, node.Progress) (any, error)) {
	var result any
	var err error
	select {
	case j.slots <- struct{}{}:
		defer func() { <-j.slots }()
		j.change(one, func(r *v1.Job) { r.State = v1.StateRunning })
		started := time.Now()
		result, err = j.guarded(ctx, one, do)
		j.observe(one.Kind, started, err)
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	var data json.RawMessage
	if result != nil {
		var merr error
		data, merr = json.Marshal(result)
		err = errors.Join(err, merr)
	}
	var ended v1.Job
	j.change(one, func(r *v1.Job) {
		r.Progress, r.Ended, r.Result = nil, time.Now().UTC(), data
		switch cause := context.Cause(ctx); {
		case err == nil:
			r.State = v1.StateDone // also if it was canceled too late
		case errors.Is(cause, errCanceled):
			r.State = v1.StateCanceled
		case errors.Is(cause, errEnding):
			r.State = v1.StateInterrupted
		default:
			r.State = v1.StateFailed
		}
		if err != nil {
			r.Error = problemOf(err)
		}
		ended = *r
	})
	if werr := j.write(&ended); werr != nil {
		j.log.Error("the record of a job: " + werr.Error())
	}
	j.log.Info("audit", "who", ended.Who, "job", ended.ID, "kind", ended.Kind, "of", ended.Of, "namespace", ended.Namespace,
		"state", string(ended.State), "took", ended.Ended.Sub(ended.Created).Round(time.Millisecond).String())
	j.mu.Lock()
	defer j.mu.Unlock()
	j.forget()
}

// guarded is do for a fault in our own code, which would end the process.
func (j *jobs) guarded(ctx context.Context, one *job, do func(context.Context, node.Progress) (any, error)) (result any, err error) {
	defer func() {
		if failed := recover(); failed != nil {
			j.log.Error(fmt.Sprintf("job %s: %v", one.ID, failed))
			err = errors.New("a fault in stasisd, which its log describes")
		}
	}()
	return do(ctx, func(u node.Update) {
		j.change(one, func(r *v1.Job) {
			r.Progress = &v1.Progress{Of: u.Of, Stage: u.Stage, Done: u.Done, Total: u.Total}
			if u.Stage == "" {
				r.Progress = nil
			}
		})
	})
}

// change changes a job and tells its listeners.
func (j *jobs) change(one *job, fn func(*v1.Job)) {
	j.mu.Lock()
	defer j.mu.Unlock()
	fn(&one.Job)
	for c := range one.listeners {
		select {
		case c <- struct{}{}:
		default: // it has a change to look at
		}
	}
}

// write writes the record of a job.
func (j *jobs) write(r *v1.Job) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := filepath.Join(j.dir, r.ID+".json")
	err = node.WriteFile(context.Background(), path, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
	if err != nil {
		return fmt.Errorf("write the record of a job: %w", err)
	}
	return nil
}

// forget forgets the oldest jobs that have ended, if there are too many. It is called
// with mu held.
func (j *jobs) forget() {
	var ended []*job
	for _, one := range j.all {
		if one.State.Ended() {
			ended = append(ended, one)
		}
	}
	slices.SortFunc(ended, func(a, b *job) int { return a.Ended.Compare(b.Ended) })
	for _, one := range ended[:max(0, len(ended)-maxRecords)] {
		if err := os.Remove(filepath.Join(j.dir, one.ID+".json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
			j.log.Warn(err.Error())
		}
		delete(j.all, one.ID)
	}
}

// list lists the jobs in a namespace, the newest first.
func (j *jobs) list(namespace string) []v1.Job {
	j.mu.Lock()
	defer j.mu.Unlock()
	all := []v1.Job{}
	for _, one := range j.all {
		if one.Namespace == namespace {
			all = append(all, one.Job)
		}
	}
	slices.SortFunc(all, func(a, b v1.Job) int {
		if n := b.Created.Compare(a.Created); n != 0 {
			return n
		}
		return strings.Compare(a.ID, b.ID)
	})
	return all
}

// get returns a job in a namespace.
func (j *jobs) get(namespace, id string) (v1.Job, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	one, err := j.find(namespace, id)
	if err != nil {
		return v1.Job{}, err
	}
	return one.Job, nil
}

func (j *jobs) find(namespace, id string) (*job, error) {
	if one := j.all[id]; one != nil && one.Namespace == namespace {
		return one, nil
	}
	return nil, fault.New(errdefs.ErrNotFound, "no job %q in namespace %s", id, namespace)
}

// cancel has a job end, which it does when it has undone what it began.
func (j *jobs) cancel(namespace, id string) (v1.Job, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	one, err := j.find(namespace, id)
	if err != nil {
		return v1.Job{}, err
	}
	if one.State.Ended() {
		return v1.Job{}, fault.New(errdefs.ErrFailedPrecondition, "job %s has ended: %s", id, one.State)
	}
	one.cancel(errCanceled)
	return one.Job, nil
}

// listen tells of changes of a job until stop is called. There is one to look at at first.
func (j *jobs) listen(namespace, id string) (changed <-chan struct{}, stop func(), err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	one, err := j.find(namespace, id)
	if err != nil {
		return nil, nil, err
	}
	c := make(chan struct{}, 1)
	c <- struct{}{}
	if one.listeners == nil {
		one.listeners = map[chan struct{}]struct{}{}
	}
	one.listeners[c] = struct{}{}
	return c, func() {
		j.mu.Lock()
		defer j.mu.Unlock()
		delete(one.listeners, c)
	}, nil
}

// end takes no more jobs, waits for those at work, and aborts those that are not done in
// time.
func (j *jobs) end(grace time.Duration) {
	j.mu.Lock()
	j.ending = true
	j.mu.Unlock()
	timer := time.AfterFunc(grace, func() { j.abort(errEnding) })
	defer timer.Stop()
	j.work.Wait()
}

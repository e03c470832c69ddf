package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/oci"
	"github.com/stasis-run/stasis/node"
	"github.com/stasis-run/stasis/node/rest/v1"
)

// remote has the operations of the node of --host. Its methods take the requests of
// package node, and refuse what a stasisd does not do for others.
type remote struct{ c *v1.Client }

// notThere refuses what --host cannot do.
func notThere(what string) error {
	return fault.New(node.ErrRequest, "%s does not go with --host", what)
}

// explained is an error of the node's as commands know it.
func explained(err error) error {
	p := (*v1.Problem)(nil)
	if !errors.As(err, &p) {
		return err
	}
	text := node.Printable(p.Error()) // whatever node that is
	if p.WrongRequest() {
		return fault.New(node.ErrRequest, "%s", text)
	}
	return fault.New(p, "%s", text)
}

// mayGoOn is an error of a job that may go on: the node cannot be asked.
type mayGoOn struct{ error }

func (m mayGoOn) Unwrap() error { return m.error }

// undoTime bounds how long the node is waited for when it undoes what was given up.
const undoTime = time.Minute

// run has the node do a job, and reads its result into out. What a signal gives up, the
// node undoes.
func (r *remote) run(ctx context.Context, tell node.Progress, begin func(context.Context) (*v1.Job, error), out any) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	// Given up in the middle of the request, nobody would know whether it has begun.
	whole, giveUp := context.WithCancel(context.WithoutCancel(ctx))
	defer giveUp()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(undoTime, giveUp) })()
	job, err := begin(whole)
	if op := (*net.OpError)(nil); errors.As(err, &op) && op.Op == "dial" {
		return err
	}
	if p := (*v1.Problem)(nil); errors.As(err, &p) {
		return explained(err)
	}
	if err != nil {
		return mayGoOn{fmt.Errorf("%w (the node may have begun all the same: its GET /v1/jobs tells)", err)}
	}
	of := job.Of
	show := func(j v1.Job) {
		if tell == nil {
			return
		}
		u := node.Update{Of: of}
		if p := j.Progress; p != nil {
			u = node.Update{Of: p.Of, Stage: p.Stage, Done: p.Done, Total: p.Total}
		}
		tell(u)
	}
	id := job.ID
	job, err = r.c.Wait(ctx, id, show)
	if ctx.Err() != nil {
		job, err = r.cancel(whole, id)
	}
	show(v1.Job{})
	if err != nil {
		return mayGoOn{fmt.Errorf("job %s on the node may go on: %w", id, explained(err))}
	}
	if job.Result != nil {
		if err := json.Unmarshal(job.Result, out); err != nil {
			return fmt.Errorf("the result of job %s: %w", id, err)
		}
	}
	if job.Error != nil {
		err = explained(job.Error)
	}
	if ctx.Err() != nil && job.State != v1.StateDone {
		err = errors.Join(context.Cause(ctx), err)
	}
	return err
}

// cancel has a job end, and waits for that. It may have ended just now, which is no error.
func (r *remote) cancel(ctx context.Context, id string) (*v1.Job, error) {
	for {
		_, err := r.c.Cancel(ctx, id)
		if p := (*v1.Problem)(nil); err == nil || errors.As(err, &p) && p.Status < 500 {
			return r.c.Wait(ctx, id, nil)
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(time.Second):
		}
	}
}

// image refuses a path, which on the node would be the name of an image.
func image(arg string) error {
	if strings.HasPrefix(arg, "/") || strings.HasPrefix(arg, ".") {
		return fault.New(node.ErrRequest, "%s is a path: with --host a checkpoint is an image on the node; `stasis import` makes one of a file", arg)
	}
	return nil
}

// Checkpoint implements operations. An archive is made of an image there, under a name that
// no other has, which is then removed. It is in the format that needs no base image.
func (r *remote) Checkpoint(ctx context.Context, q node.CheckpointRequest) ([]node.CheckpointResult, error) {
	if q.From != "" {
		return nil, notThere("--from")
	}
	if err := q.Check(); err != nil {
		return nil, err
	}
	o := q.Options
	b := v1.CheckpointBody{Containers: q.Containers, Pod: q.Pod, Ref: q.Ref, Format: q.Format, Compression: q.Compression,
		Exit: q.Exit, PreDumps: q.PreDumps, Push: q.Push, Registry: registryOf(q.Registry),
		FileLocks: o.FileLocks, UnixSockets: o.ExternalUnixSockets, Terminal: o.Terminal, LinkRemap: o.LinkRemap, GhostLimit: o.GhostLimit}
	switch {
	case o.OpenTCP:
		b.TCP = "keep"
	case o.TCPClose:
		b.TCP = "close"
	}
	archive := q.Archive.Path != ""
	if archive {
		b.Format, b.Ref = node.FormatPodman, "localhost/stasis-output/"+strings.ToLower(rand.Text())+":1"
	}
	results := []node.CheckpointResult{}
	err := r.run(ctx, q.Progress, func(ctx context.Context) (*v1.Job, error) { return r.c.Checkpoint(ctx, b) }, &results)
	switch {
	case !archive:
		return results, err
	case err != nil:
		if m := (mayGoOn{}); errors.As(err, &m) {
			err = fmt.Errorf("%w (the checkpoint will be %s there)", err, b.Ref)
		}
		return nil, err
	case len(results) != 1:
		return nil, fmt.Errorf("the node has made %d checkpoints, not one, as %s", len(results), b.Ref)
	}
	one := &results[0]
	err = r.Export(ctx, node.ExportRequest{Checkpoint: one.Ref, Output: q.Archive, Compression: q.Compression, Progress: q.Progress})
	if err != nil && q.Exit {
		return nil, fmt.Errorf("%w (the container has ended, and its checkpoint is on the node as %s)", err, one.Ref)
	}
	rerr := r.c.Remove(context.WithoutCancel(ctx), one.Ref)
	if rerr != nil {
		rerr = fmt.Errorf("remove %s from the node: %w", one.Ref, rerr)
	}
	if err = errors.Join(err, rerr); err != nil {
		return nil, err
	}
	one.Ref, one.Digest, one.File = "", "", q.Archive.Path
	return results, nil
}

// Restore implements operations. A file is imported first.
func (r *remote) Restore(ctx context.Context, q node.RestoreRequest) (result *node.RestoreResult, err error) {
	switch {
	case q.IO != nil:
		return nil, notThere("--attach")
	case q.Runtime != "" && q.Runtime != node.RuntimeName:
		return nil, notThere("--runtime")
	case q.RuncBinary != "":
		return nil, notThere("--runc-binary")
	case q.MaxSize != 0:
		return nil, notThere("--max-size")
	case q.LogURI != "":
		return nil, notThere("--log-uri")
	}
	g := q.Grants
	b := v1.RestoreBody{Checkpoint: q.Checkpoint, Name: q.Name, TCPClose: q.TCPClose, Network: g.Network, Registry: registryOf(q.Registry),
		Privileged: g.Privileged, Snapshotter: q.Snapshotter, WaitHealthy: q.Healthy}
	if q.Healthy != "" {
		b.WaitSeconds = max(1, int(q.HealthyTimeout.Round(time.Second)/time.Second))
	}
	grants := &v1.Grants{Mounts: g.Mounts, Devices: g.Devices, Namespaces: g.Namespaces, Capabilities: g.Capabilities, Seccomp: g.Seccomp,
		NewPrivileges: g.NewPrivileges, Unmask: g.Unmask, Sysctls: g.Sysctls, Ulimits: g.Ulimits, Labels: g.Labels, Priorities: g.Priorities,
		CgroupParent: g.CgroupParent}
	if data, err := json.Marshal(grants); err != nil {
		return nil, err
	} else if string(data) != "{}" {
		b.Grants = grants
	}
	info, serr := os.Stat(q.Checkpoint)
	if serr != nil || info.IsDir() {
		if err := image(q.Checkpoint); err != nil {
			return nil, err
		}
	} else {
		var remove func() error
		if b.Checkpoint, remove, err = r.importFor(ctx, q); err != nil {
			return nil, err
		}
		defer func() {
			switch m := (mayGoOn{}); {
			case errors.As(err, &m):
				err = fmt.Errorf("%w (its image is %s there)", err, b.Checkpoint)
			case err != nil && result == nil:
				err = errors.Join(err, remove())
			}
		}()
	}
	result = &node.RestoreResult{}
	err = r.run(ctx, q.Progress, func(ctx context.Context) (*v1.Job, error) { return r.c.Restore(ctx, b) }, result)
	if result.Container == "" {
		result = nil
	}
	return result, err
}

// importFor imports the file that is to be restored. remove removes again what was not
// there before.
func (r *remote) importFor(ctx context.Context, q node.RestoreRequest) (ref string, remove func() error, err error) {
	before, err := r.c.Checkpoints(ctx, v1.ListQuery{})
	if err != nil {
		return "", nil, explained(err)
	}
	made, err := r.Import(ctx, node.ImportRequest{File: q.Checkpoint, Progress: q.Progress})
	if err != nil {
		return "", nil, err
	}
	remove = func() (err error) {
		ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
		defer stop()
		for _, img := range made.Images {
			if !slices.ContainsFunc(before, func(c v1.Checkpoint) bool { return c.Ref == img.Ref }) {
				if rerr := r.c.Remove(ctx, img.Ref); rerr != nil {
					err = errors.Join(err, fmt.Errorf("remove %s from the node: %w", img.Ref, rerr))
				}
			}
		}
		return err
	}
	if len(made.Images) != 1 {
		return "", nil, errors.Join(fault.New(node.ErrRequest, "%s has %d images: import it, and restore one of them", q.Checkpoint, len(made.Images)), remove())
	}
	return made.Images[0].Ref, remove, nil
}

// List implements operations. What it tells is what a table shows.
func (r *remote) List(ctx context.Context, q node.ListRequest) ([]node.Listed, error) {
	all, err := r.c.Checkpoints(ctx, v1.ListQuery{Container: q.Container, Format: q.Format})
	if err != nil {
		return nil, explained(err)
	}
	list := []node.Listed{}
	for _, c := range all {
		l := node.Listed{Ref: c.Ref, Digest: c.Digest, Created: c.Created, KeyTrusted: c.KeyTrusted, Broken: c.Broken,
			Summary: oci.Summary{Format: oci.Format(c.Format), SignedBy: c.SignedBy, Checkpoint: c.Bytes,
				Info: capture.Info{ContainerName: c.Container, ContainerID: c.ContainerID, Base: capture.Base{Name: c.Base}}}}
		if c.Pod != nil {
			l.Info.Pod = &capture.Pod{Namespace: c.Pod.Namespace, Name: c.Pod.Name, UID: c.Pod.UID}
		}
		list = append(list, l)
	}
	return list, nil
}

// Inspect implements operations.
func (r *remote) Inspect(ctx context.Context, q node.InspectRequest) (*node.Inspection, error) {
	if q.MaxSize != 0 {
		return nil, notThere("--max-size")
	}
	if err := image(q.Checkpoint); err != nil {
		return nil, err
	}
	in := &node.Inspection{}
	data, err := r.c.Inspect(ctx, q.Checkpoint, q.Secrets)
	if err := read(data, err, in); err != nil {
		return nil, err
	}
	if in.Report == nil {
		return nil, errors.New("the node's answer tells nothing of the checkpoint")
	}
	return in, nil
}

// Diff implements operations.
func (r *remote) Diff(ctx context.Context, q node.DiffRequest) (*node.Difference, error) {
	if q.MaxSize != 0 {
		return nil, notThere("--max-size")
	}
	if err := cmp.Or(image(q.First), image(q.Second)); err != nil {
		return nil, err
	}
	d := &node.Difference{}
	data, err := r.c.Diff(ctx, q.First, q.Second)
	return d, read(data, err, d)
}

// read reads an answer into out.
func read(data []byte, err error, out any) error {
	if err != nil {
		return explained(err)
	}
	return json.Unmarshal(data, out)
}

// Verify implements operations.
func (r *remote) Verify(ctx context.Context, ref string) (*node.Verification, error) {
	if err := image(ref); err != nil {
		return nil, err
	}
	v := &node.Verification{}
	err := r.run(ctx, nil, func(ctx context.Context) (*v1.Job, error) { return r.c.Verify(ctx, ref) }, v)
	if v.Checkpoint == "" {
		v = nil
	}
	return v, err
}

// Remove implements operations.
func (r *remote) Remove(ctx context.Context, refs ...string) ([]string, error) {
	removed := []string{}
	var failed []error
	for _, ref := range refs {
		if err := r.c.Remove(ctx, ref); err != nil {
			failed = append(failed, fmt.Errorf("remove %s: %w", ref, explained(err)))
			continue
		}
		removed = append(removed, ref)
	}
	return removed, errors.Join(failed...)
}

// Push implements operations. Credentials are those of the node.
func (r *remote) Push(ctx context.Context, q node.PushRequest) (*node.Image, error) {
	img := &node.Image{}
	err := r.run(ctx, q.Progress, func(ctx context.Context) (*v1.Job, error) {
		return r.c.Push(ctx, q.Ref, v1.PushBody{Target: q.Target, Registry: registryOf(q.Registry)})
	}, img)
	return img, err
}

// Pull implements operations.
func (r *remote) Pull(ctx context.Context, q node.PullRequest) (*node.Image, error) {
	img := &node.Image{}
	err := r.run(ctx, q.Progress, func(ctx context.Context) (*v1.Job, error) {
		return r.c.Pull(ctx, v1.PullBody{Ref: q.Ref, Registry: registryOf(q.Registry)})
	}, img)
	return img, err
}

// Export implements operations.
func (r *remote) Export(ctx context.Context, q node.ExportRequest) error {
	if q.MaxSize != 0 {
		return notThere("--max-size")
	}
	return q.Output.Write(ctx, func(w io.Writer) error {
		passing := &passing{tell: q.Progress, update: node.Update{Of: q.Checkpoint, Stage: "export"}, w: w}
		defer passing.end()
		return explained(r.c.Export(ctx, q.Checkpoint, q.Format, q.Compression, passing))
	})
}

// Import implements operations.
func (r *remote) Import(ctx context.Context, q node.ImportRequest) (*node.ImportResult, error) {
	switch {
	case q.MaxSize != 0:
		return nil, notThere("--max-size")
	case cmp.Or(q.Format, node.FormatRunnable) != node.FormatRunnable:
		return nil, notThere("--format " + q.Format)
	case cmp.Or(q.Compression, "zstd") != "zstd":
		return nil, notThere("--compress " + q.Compression)
	}
	passing := &passing{tell: q.Progress, update: node.Update{Of: q.File, Stage: "import"}, r: q.Reader}
	defer passing.end()
	if q.Reader == nil {
		f, err := os.Open(q.File)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if info, err := f.Stat(); err == nil {
			passing.update.Total = info.Size()
		}
		passing.r = f
	}
	list, err := r.c.Import(ctx, q.Ref, passing)
	if err != nil {
		return nil, explained(err)
	}
	result := &node.ImportResult{OCI: list.OCI}
	for _, img := range list.Items {
		result.Images = append(result.Images, node.Image(img))
	}
	if len(result.Images) == 0 {
		return nil, errors.New("the node has made no image")
	}
	return result, nil
}

// Check implements operations.
func (r *remote) Check(ctx context.Context) []node.Finding {
	all, err := r.c.Check(ctx)
	if err != nil {
		return []node.Finding{{Name: "stasisd", State: "missing", Detail: err.Error(), Fix: "start it on the node, and look at --host and --token-file"}}
	}
	found := []node.Finding{}
	for _, f := range all {
		found = append(found, node.Finding(f))
	}
	return found
}

// passing tells how much passes through it, until it ends.
type passing struct {
	tell node.Progress
	w    io.Writer
	r    io.Reader

	mu     sync.Mutex
	update node.Update
	ended  bool
}

func (p *passing) Write(data []byte) (int, error) {
	n, err := p.w.Write(data)
	p.add(n)
	return n, err
}

// Read is for net/http, which may go on reading when it has returned the answer.
func (p *passing) Read(data []byte) (int, error) {
	p.mu.Lock()
	ended := p.ended
	p.mu.Unlock()
	if ended {
		return 0, io.ErrClosedPipe
	}
	n, err := p.r.Read(data)
	p.add(n)
	return n, err
}

func (p *passing) add(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.update.Done += int64(n)
	if p.tell != nil && !p.ended {
		p.tell(p.update)
	}
}

func (p *passing) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
	if p.tell != nil {
		p.tell(node.Update{Of: p.update.Of})
	}
}

func registryOf(r node.Registry) v1.Registry {
	out := v1.Registry{PlainHTTP: r.PlainHTTP}
	if l := r.Login; l != nil {
		out.Login = &v1.Login{Registry: l.Registry, Username: l.Username, Password: l.Password}
	}
	return out
}

package node

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// unattached is where the output of a container goes that nobody is attached to:
// a URI that the shim opens, or nowhere.
type unattached cio.Config

func (u unattached) Config() cio.Config { return cio.Config(u) }
func (unattached) Cancel()              {}
func (unattached) Wait()                {}
func (unattached) Close() error         { return nil }

// unattachedIO makes a container's IO; uri may be empty.
func unattachedIO(uri string, terminal bool) cio.Creator {
	return func(string) (cio.IO, error) {
		if uri != "" {
			u, err := url.Parse(uri)
			if err != nil || u.Scheme == "" {
				return nil, fmt.Errorf("--log-uri %s: it is a URI, such as file:///var/log/db.log", uri)
			}
		}
		io := unattached{Terminal: terminal, Stdout: uri}
		if !terminal {
			io.Stderr = uri
		}
		return io, nil
	}
}

// waitHealthy runs a command in the container until it succeeds.
func (op *restoring) waitHealthy(ctx context.Context, task client.Task, spec *specs.Spec) error {
	ctx, cancel := context.WithTimeout(ctx, op.HealthyTimeout)
	defer cancel()
	process := *spec.Process
	process.Terminal = false
	process.Args = []string{"/bin/sh", "-c", op.Healthy}
	var last error
	for try := 0; ; try++ {
		out := &lastBytes{}
		code, err := runIn(ctx, task, fmt.Sprintf("stasis-healthy-%d", try), &process, out)
		if err == nil && code == 0 {
			return nil
		}
		if ctx.Err() == nil {
			last = err
			if err == nil {
				last = fmt.Errorf("exit code %d: %s", code, strings.TrimSpace(Printable(out.String())))
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("--wait-healthy %q did not succeed within %s: %w", op.Healthy, op.HealthyTimeout, last)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// runIn runs a process in a container and returns its exit code.
func runIn(ctx context.Context, task client.Task, id string, process *specs.Process, out io.Writer) (uint32, error) {
	p, err := task.Exec(ctx, id, process, cio.NewCreator(cio.WithStreams(nil, out, out)))
	if err != nil {
		return 0, err
	}
	defer p.Delete(context.WithoutCancel(ctx), client.WithProcessKill)
	exited, err := p.Wait(ctx)
	if err != nil {
		return 0, err
	}
	if err := p.Start(ctx); err != nil {
		return 0, err
	}
	select {
	case status := <-exited:
		// A process of its own that it has left may have its output, and keep it.
		drained := make(chan struct{})
		go func() {
			defer close(drained)
			p.IO().Wait()
		}()
		select {
		case <-drained:
		case <-time.After(drainTime):
		case <-ctx.Done():
		}
		return status.ExitCode(), status.Error()
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// drainTime bounds how long the output of a process that has ended is waited for.
const drainTime = 2 * time.Second

// lastBytes keeps the end of what is written to it: the program that writes is the
// container's.
type lastBytes struct {
	mu   sync.Mutex
	data []byte
}

// maxLastBytes is in bytes.
const maxLastBytes = 4 << 10

func (l *lastBytes) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.data = append(l.data, p[max(0, len(p)-maxLastBytes):]...)
	if over := len(l.data) - maxLastBytes; over > 0 {
		l.data = append(l.data[:0], l.data[over:]...)
	}
	return len(p), nil
}

func (l *lastBytes) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.data)
}

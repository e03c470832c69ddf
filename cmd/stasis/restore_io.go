package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/signal"

	"github.com/containerd/console"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"golang.org/x/sys/unix"
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

// catchSignals keeps the signals that would end us.
func catchSignals() chan os.Signal {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	return signals
}

// forwardSignals sends on to a container what catchSignals has kept and keeps.
func forwardSignals(ctx context.Context, task client.Task, signals chan os.Signal) (stop func()) {
	go func() {
		for s := range signals {
			_ = task.Kill(ctx, s.(unix.Signal)) // it may have ended
		}
	}()
	return func() {
		signal.Stop(signals)
		close(signals)
	}
}

// followSize keeps a container's terminal as large as ours.
func followSize(ctx context.Context, task client.Task, con console.Console) (stop func()) {
	resize := func() {
		if size, err := con.Size(); err == nil {
			_ = task.Resize(ctx, uint32(size.Width), uint32(size.Height))
		}
	}
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, unix.SIGWINCH)
	go func() {
		resize()
		for range changed {
			resize()
		}
	}()
	return func() {
		signal.Stop(changed)
		close(changed)
	}
}

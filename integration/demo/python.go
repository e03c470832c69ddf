package main

import (
	"bufio"
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"net"

	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/stasis-run/stasis/integration/stack"
)

//go:embed server.py
var pythonServer string

const pythonPort = "7000"

// python is a process with state of many kinds in its memory only; see
// server.py.
type python struct {
	conn   net.Conn // made before the checkpoint
	r      *bufio.Reader
	before pythonState
}

// pythonState is what server.py answers.
type pythonState struct {
	PID       int    `json:"pid"`
	Token     string `json:"token"`     // made at start, random
	Digest    string `json:"digest"`    // of a dictionary of random values
	Entries   int    `json:"entries"`   // in it
	Generated int    `json:"generated"` // how far a generator is
	Ticks     int    `json:"ticks"`     // of a thread
	Offset    int    `json:"offset"`    // in an open file
}

func (p *python) spec() (string, []oci.SpecOpts) {
	return stack.Python, []oci.SpecOpts{stack.Args("python3", "-c", pythonServer)}
}

func (p *python) connect(ctx context.Context, addr string) error {
	return poll(ctx, "connect to the Python process", func() (err error) {
		p.conn, err = net.Dial("tcp", net.JoinHostPort(addr, pythonPort))
		if err == nil {
			p.r = bufio.NewReader(p.conn)
		}
		return err
	})
}

func (p *python) close() {
	if p.conn != nil {
		p.conn.Close()
	}
}

// ask has the server fill its dictionary up ("fill") or only answer ("state").
func (p *python) ask(conn net.Conn, r *bufio.Reader, request string) (s pythonState, err error) {
	if _, err := fmt.Fprintln(conn, request); err != nil {
		return s, err
	}
	line, err := r.ReadBytes('\n')
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(line, &s)
}

func (p *python) load() (_ string, err error) {
	p.before, err = p.ask(p.conn, p.r, "fill")
	return fmt.Sprintf("a dictionary of %d random entries, a generator at step %d, a thread, an open file",
		p.before.Entries, p.before.Generated), err
}

func (p *python) verify(addr string) ([]string, error) {
	now, err := p.ask(p.conn, p.r, "state")
	if err != nil {
		return nil, fmt.Errorf("the connection made before the checkpoint: %w", err)
	}
	fresh, err := net.Dial("tcp", net.JoinHostPort(addr, pythonPort))
	if err != nil {
		return nil, err
	}
	defer fresh.Close()
	again, err := p.ask(fresh, bufio.NewReader(fresh), "state")
	if err != nil {
		return nil, fmt.Errorf("a new connection: %w", err)
	}
	was := p.before
	switch {
	case now.PID != was.PID || now.Token != was.Token || again.Token != was.Token:
		return nil, fmt.Errorf("another process answers: %+v, want %+v", now, was)
	case now.Digest != was.Digest || now.Entries != was.Entries:
		return nil, fmt.Errorf("its dictionary has changed: %+v, want %+v", now, was)
	case now.Generated != was.Generated+1 || again.Generated != was.Generated+2:
		return nil, fmt.Errorf("its generator went from %d to %d and %d", was.Generated, now.Generated, again.Generated)
	case now.Offset != was.Offset:
		return nil, fmt.Errorf("its file is at offset %d, want %d", now.Offset, was.Offset)
	case again.Ticks < was.Ticks:
		return nil, fmt.Errorf("its thread's ticks went from %d to %d", was.Ticks, again.Ticks)
	}
	return []string{
		"the connection made before the checkpoint answers, and a new one",
		fmt.Sprintf("the same process: pid %d, token %s", now.PID, now.Token),
		fmt.Sprintf("its %d entries are as they were: digest %.16s…", now.Entries, now.Digest),
		fmt.Sprintf("its generator went on: step %d, then %d and %d", was.Generated, now.Generated, again.Generated),
		fmt.Sprintf("its thread went on: %d ticks, then %d", was.Ticks, again.Ticks),
	}, nil
}

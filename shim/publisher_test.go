package shim

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func newEventLog(t *testing.T) *eventLog {
	return &eventLog{t: t, path: filepath.Join(newNode(t).dir, "ttrpc")}
}

func publishN(p *Publisher, from, to int) (want []string) {
	for i := from; i < to; i++ {
		topic := fmt.Sprintf("/test/%d", i)
		p.Publish(topic, wrapperspb.Int64(int64(i)))
		want = append(want, topic)
	}
	return want
}

func drain(t *testing.T, p *Publisher, timeout time.Duration) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	return p.Drain(ctx)
}

// containerd goes away and comes back, over and over, while events come.
func TestPublisherRestart(t *testing.T) {
	e := newEventLog(t)
	p := NewPublisher("unix://"+e.path, "ns")
	const rounds, events = 6, 50
	var want []string
	before := time.Now()
	for i := range rounds {
		// Down.
		want = append(want, publishN(p, 2*i*events, (2*i+1)*events)...)
		e.start()
		// Up, until some event is through.
		want = append(want, publishN(p, (2*i+1)*events, (2*i+2)*events)...)
		eventually(t, "an event arrives", func() bool { return e.count() > 2*i*events+events/2 })
		e.stop()
	}
	e.start()
	defer e.stop()
	if err := drain(t, p, patience); err != nil {
		t.Fatal(err)
	}
	// An event whose answer was lost with its connection comes twice.
	got := slices.Compact(e.topics())
	if !slices.Equal(got, want) {
		t.Errorf("events lost or out of order:\ngot  %v\nwant %v", got, want)
	}
	if n := e.count() - len(want); n > rounds {
		t.Errorf("%d duplicates in %d restarts", n, rounds)
	}
	var last time.Time
	for _, ev := range e.events {
		if ev.Namespace != "ns" {
			t.Fatalf("namespace %q", ev.Namespace)
		}
		at := ev.Timestamp.AsTime()
		if at.Before(last) || at.Before(before) || at.After(time.Now()) {
			t.Fatalf("event %s has time %v, after one of %v", ev.Topic, at, last)
		}
		last = at
	}
	if url := e.events[0].Event.TypeUrl; url != "google.protobuf.Int64Value" {
		t.Errorf("type URL %q: containerd's have no prefix", url)
	}
}

// The time of an event is when it happened, not when it was sent.
func TestPublisherTimestamp(t *testing.T) {
	e := newEventLog(t)
	p := NewPublisher(e.path, "ns")
	p.Publish("/test", wrapperspb.Bool(true))
	after := time.Now()
	time.Sleep(20 * time.Millisecond)
	e.start()
	defer e.stop()
	if err := drain(t, p, patience); err != nil {
		t.Fatal(err)
	}
	if at := e.events[0].Timestamp.AsTime(); at.After(after) {
		t.Errorf("event of %v has time %v", after, at)
	}
}

// Publish must not block when containerd does not answer.
func TestPublisherNeverBlocks(t *testing.T) {
	e := newEventLog(t)
	e.hold = make(chan struct{})
	e.start()
	defer e.stop()
	p := NewPublisher(e.path, "ns")
	want := publishN(p, 0, 1)
	eventually(t, "the first event is taken", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.queue) == 0
	})
	publishN(p, 1, 11) // the oldest, to be dropped
	want = append(want, publishN(p, 11, 11+maxEvents)...)
	close(e.hold)
	if err := drain(t, p, patience); err != nil {
		t.Fatal(err)
	}
	if got := e.topics(); !slices.Equal(got, want) {
		t.Errorf("got %d events from %s to %s, want %d", len(got), got[0], got[len(got)-1], len(want))
	}
}

// An event that containerd refuses must not hold up the others for ever.
func TestPublisherRejected(t *testing.T) {
	e := newEventLog(t)
	e.refuse = status.Error(codes.InvalidArgument, "topic must start with '/'")
	e.start()
	defer e.stop()
	p := NewPublisher(e.path, "ns")
	p.Publish("bad", wrapperspb.Bool(true))
	eventually(t, "event is given up", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.refused == maxRejections
	})
	e.mu.Lock()
	e.refuse = nil
	e.mu.Unlock()
	p.Publish("/good", wrapperspb.Bool(true))
	if err := drain(t, p, patience); err != nil {
		t.Fatal(err)
	}
	if got := e.topics(); !slices.Equal(got, []string{"/good"}) {
		t.Errorf("got %v", got)
	}
}

func TestPublisherDrain(t *testing.T) {
	t.Run("nothing was published", func(t *testing.T) {
		p := NewPublisher("/nowhere", "ns")
		if err := drain(t, p, patience); err != nil {
			t.Error(err)
		}
		p.Publish("/late", wrapperspb.Bool(true)) // neither panics nor blocks
		if err := drain(t, p, patience); err != nil {
			t.Errorf("second drain: %v", err)
		}
	})
	t.Run("containerd is down", func(t *testing.T) {
		p := NewPublisher("/nowhere", "ns")
		publishN(p, 0, 3)
		err := drain(t, p, 50*time.Millisecond)
		if err == nil || !strings.Contains(err.Error(), "3 events") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("containerd does not answer", func(t *testing.T) {
		e := newEventLog(t)
		e.hold = make(chan struct{})
		e.start()
		defer e.stop()
		defer close(e.hold)
		p := NewPublisher(e.path, "ns")
		publishN(p, 0, 2)
		if err := drain(t, p, 50*time.Millisecond); err == nil {
			t.Error("no error")
		}
	})
}

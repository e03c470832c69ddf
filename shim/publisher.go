package shim

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// maxEvents is how many events wait while containerd is away. It is far
	// beyond what one pod produces; it keeps a shim from growing forever.
	maxEvents = 16384
	// maxRejections is how often an event is sent that containerd refuses.
	// Until then it may not be up yet; after that it never takes the event.
	maxRejections = 5
	minBackoff    = 20 * time.Millisecond
	maxBackoff    = time.Second
	// forwardTimeout is for a reply that never comes. A containerd that is
	// only slow or stopped must be given time: to send the event again, it
	// would have it twice.
	forwardTimeout = time.Minute
)

// Publisher sends events to containerd in the order in which they were
// published. None is lost or overtaken while containerd is down. An event may
// arrive twice if the connection breaks after containerd took it.
type Publisher struct {
	namespace string
	address   string

	mu      sync.Mutex
	queue   []*types.Envelope // waiting, oldest first; without the one that run sends
	dropped int               // since it was last logged
	drained bool              // Drain ended: nobody sends any more

	wake     chan struct{} // of capacity 1: the queue has events
	draining chan struct{} // closed by Drain: end when the queue is empty
	drain    sync.Once
	done     chan struct{} // closed by run
	cancel   context.CancelFunc

	client *ttrpc.Client // owned by run; nil while not connected
}

// NewPublisher returns a publisher to containerd's ttrpc socket. It connects
// when there is something to send. Drain ends it.
func NewPublisher(address, namespace string) *Publisher {
	ctx, cancel := context.WithCancel(context.Background())
	p := &Publisher{
		namespace: namespace,
		address:   strings.TrimPrefix(address, "unix://"),
		wake:      make(chan struct{}, 1),
		draining:  make(chan struct{}),
		done:      make(chan struct{}),
		cancel:    cancel,
	}
	go p.run(ctx)
	return p
}

// Publish queues an event, with the time of the call. It never blocks.
func (p *Publisher) Publish(topic string, event any) {
	data, err := typeurl.MarshalAnyToProto(event)
	if err != nil {
		log.L.WithError(err).WithField("topic", topic).Error("event cannot be encoded and is lost")
		return
	}
	p.mu.Lock()
	if p.drained {
		p.mu.Unlock()
		log.L.WithField("topic", topic).Warn("event came after the shim's end and is lost")
		return
	}
	if len(p.queue) == maxEvents {
		p.queue[0] = nil
		p.queue = p.queue[1:]
		p.dropped++
	}
	p.queue = append(p.queue, &types.Envelope{
		// Within the lock, so that time has the order of the queue.
		Timestamp: timestamppb.Now(),
		Namespace: p.namespace,
		Topic:     topic,
		Event:     data,
	})
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Drain waits until all events are sent, but no longer than ctx, and ends the
// publisher. It reports how many events are lost.
func (p *Publisher) Drain(ctx context.Context) error {
	p.drain.Do(func() { close(p.draining) })
	select {
	case <-p.done:
	case <-ctx.Done():
		p.cancel()
		<-p.done
	}
	p.cancel()
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.queue); n > 0 {
		p.queue = nil
		return fmt.Errorf("containerd at %s did not take %d events in time: %w", p.address, n, ctx.Err())
	}
	return nil
}

// run sends one event at a time.
func (p *Publisher) run(ctx context.Context) {
	defer close(p.done)
	defer func() {
		if p.client != nil {
			p.client.Close()
		}
	}()
	for {
		e := p.next()
		if e == nil {
			return
		}
		if !p.send(ctx, e) {
			// Not sent: to be counted with the others.
			p.mu.Lock()
			p.queue = append([]*types.Envelope{e}, p.queue...)
			p.drained = true
			p.mu.Unlock()
			return
		}
	}
}

// next takes the oldest event, or waits for one. It is nil when drained.
func (p *Publisher) next() *types.Envelope {
	for {
		draining := false
		select {
		case <-p.draining:
			draining = true
		default:
		}
		p.mu.Lock()
		dropped := p.dropped
		p.dropped = 0
		var e *types.Envelope
		if len(p.queue) > 0 {
			e = p.queue[0]
			p.queue[0] = nil
			p.queue = p.queue[1:]
		} else {
			p.queue = nil // and with it the array
			p.drained = draining
		}
		p.mu.Unlock()
		if dropped > 0 {
			log.L.WithField("events", dropped).Error("containerd was away for too long, the oldest events are lost")
		}
		if e != nil || draining {
			return e
		}
		select {
		case <-p.wake:
		case <-p.draining:
		}
	}
}

// send sends the event until containerd took or refused it. It is false if ctx
// ended first.
func (p *Publisher) send(ctx context.Context, e *types.Envelope) bool {
	backoff := minBackoff
	for rejections := 0; ; {
		err := p.forward(ctx, e)
		if err == nil {
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		if rejected(err) {
			rejections++
			if rejections == maxRejections {
				log.L.WithError(err).WithField("topic", e.Topic).Error("containerd refuses an event, which is lost")
				return true
			}
		} else if p.client != nil {
			p.client.Close()
			p.client = nil
		}
		if backoff == minBackoff {
			log.L.WithError(err).WithField("topic", e.Topic).Debug("event not sent yet")
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

// forward makes one attempt.
func (p *Publisher) forward(ctx context.Context, e *types.Envelope) error {
	if p.client == nil {
		d := net.Dialer{Timeout: forwardTimeout}
		conn, err := d.DialContext(ctx, "unix", p.address)
		if err != nil {
			return err
		}
		p.client = ttrpc.NewClient(conn)
	}
	ctx, cancel := context.WithTimeout(ctx, forwardTimeout)
	defer cancel()
	_, err := eventsapi.NewTTRPCEventsClient(p.client).Forward(ctx, &eventsapi.ForwardRequest{Envelope: e})
	return err
}

// rejected tells an answer of containerd's from a failure to reach it.
func rejected(err error) bool {
	s, ok := status.FromError(err)
	if !ok {
		return false
	}
	switch s.Code() {
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
		return false
	}
	return true
}

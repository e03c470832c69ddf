package rest

import (
	"context"
	"net/http"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/sse"

	"github.com/stasis-run/stasis/node"
	"github.com/stasis-run/stasis/node/rest/v1"
)

// v1Events adds what happens to containers.
func (s *server) v1Events(api huma.API, m *v1Mux) {
	m.next = route{scope: ScopeRead, namespace: namespaceIn, fail: failProblem, stream: true}
	sse.Register(api, huma.Operation{OperationID: "followEvents", Method: http.MethodGet, Path: "/v1/events",
		Summary:    "Follow what happens to containers as server-sent events, until the client goes away, or the connection to containerd fails",
		Extensions: map[string]any{"x-scope": ScopeRead}},
		map[string]any{"event": v1.Event{}},
		func(ctx context.Context, _ *InNamespace, send sse.Sender) {
			ctx, stop := s.events.untilClosed(ctx)
			defer stop()
			// containerd would keep for a slow client what that has not read.
			happened := make(chan v1.Event, maxBehind)
			tell := func(e v1.Event) {
				select {
				case happened <- e:
				default:
					stop()
				}
			}
			go func() {
				defer close(happened)
				err := s.o.Node.Watch(ctx,
					func() { tell(v1.Event{Type: v1.EventWatching, Time: time.Now().UTC()}) },
					func(e node.Event) { tell(v1.Event(e)) })
				if ctx.Err() == nil {
					s.o.Log.Warn("GET /v1/events: " + err.Error())
				}
			}()
			for e := range happened {
				if send.Data(e) != nil {
					stop() // the client has gone away
				}
			}
		})
}

package rest

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// metrics are what GET /metrics tells.
type metrics struct {
	registry   *prometheus.Registry
	requests   *prometheus.HistogramVec
	checkpoint prometheus.Histogram
	frozen     prometheus.Histogram
	restore    prometheus.Histogram
}

func newMetrics() *metrics {
	seconds := []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800}
	histogram := func(name, help string) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: seconds})
	}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "stasis_http_request_duration_seconds",
			Help: "How long requests took, by route and status.", Buckets: seconds}, []string{"route", "status"}),
		checkpoint: histogram("stasis_checkpoint_duration_seconds", "How long checkpoints took that succeeded."),
		frozen:     histogram("stasis_checkpoint_frozen_seconds", "How long containers stood still while they were checkpointed."),
		restore:    histogram("stasis_restore_duration_seconds", "How long restores took that succeeded."),
	}
	m.registry.MustRegister(m.requests, m.checkpoint, m.frozen, m.restore,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

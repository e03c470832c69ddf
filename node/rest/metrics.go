package rest

import (
	"context"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/node"
	"github.com/stasis-run/stasis/node/rest/v1"
)

// metrics are what GET /metrics tells.
type metrics struct {
	registry   *prometheus.Registry
	requests   *prometheus.HistogramVec
	operations *prometheus.HistogramVec
	errors     *prometheus.CounterVec
	frozen     prometheus.Histogram
	bytes      *prometheus.CounterVec
}

func newMetrics(o Options) *metrics {
	seconds := []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "stasis_http_request_duration_seconds",
			Help: "How long requests took, by route and status.", Buckets: seconds}, []string{"route", "status"}),
		operations: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "stasis_operation_duration_seconds",
			Help: "How long operations took that succeeded: checkpoint, restore, push, pull, verify.", Buckets: seconds}, []string{"operation"}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "stasis_operation_errors_total",
			Help: "Operations that failed, by the class of the error."}, []string{"operation", "class"}),
		frozen: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "stasis_checkpoint_frozen_seconds",
			Help: "How long containers stood still while they were checkpointed.", Buckets: seconds}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "stasis_checkpoint_written_bytes_total",
			Help: "What checkpoints consisted of: memory and other images of CRIU, and changed files."}, []string{"of"}),
	}
	m.registry.MustRegister(m.requests, m.operations, m.errors, m.frozen, m.bytes, &nodeCollector{o},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// observe notes an operation.
func (m *metrics) observe(operation string, started time.Time, err error) {
	if err == nil {
		m.operations.WithLabelValues(operation).Observe(time.Since(started).Seconds())
		return
	}
	m.errors.WithLabelValues(operation, strings.TrimPrefix(problemOf(err).Type, v1.ProblemType(""))).Inc()
}

// checkpointed notes what checkpoints consist of.
func (m *metrics) checkpointed(results []node.CheckpointResult) {
	for _, r := range results {
		m.frozen.Observe(r.Frozen.Seconds())
		m.bytes.WithLabelValues("memory").Add(float64(r.ImageBytes))
		m.bytes.WithLabelValues("files").Add(float64(r.LayerBytes))
	}
}

// nodeCollector tells what there is on the node, when it is asked.
type nodeCollector struct{ o Options }

var (
	containersDesc  = prometheus.NewDesc("stasis_containers", "Containers in containerd, by status.", []string{"namespace", "status"}, nil)
	checkpointsDesc = prometheus.NewDesc("stasis_checkpoints", "Checkpoints in containerd's image store.", []string{"namespace"}, nil)
	sizeDesc        = prometheus.NewDesc("stasis_checkpoints_bytes", "What they take besides their base images.", []string{"namespace"}, nil)
	freeDesc        = prometheus.NewDesc("stasis_state_free_bytes", "Free space where the state folder is.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c *nodeCollector) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{containersDesc, checkpointsDesc, sizeDesc, freeDesc} {
		descs <- d
	}
}

// collectTime bounds how long a containerd that hangs holds up the rest.
const collectTime = 10 * time.Second

// Collect implements prometheus.Collector. What cannot be found out is left out.
func (c *nodeCollector) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	var st unix.Statfs_t
	if unix.Statfs(c.o.State, &st) == nil {
		gauge(freeDesc, float64(st.Bavail)*float64(st.Bsize))
	}
	ctx, cancel := context.WithTimeout(context.Background(), collectTime)
	defer cancel()
	client, err := c.o.Node.Client(ctx)
	if err != nil {
		return
	}
	all, err := client.NamespaceService().List(ctx)
	if err != nil {
		return
	}
	for _, namespace := range all {
		ctx := namespaces.WithNamespace(ctx, namespace)
		if found, err := c.o.Node.Containers(ctx); err == nil {
			count := map[string]int{}
			for _, one := range found {
				if one.Status == "" {
					one.Status = "no task"
				}
				count[one.Status]++
			}
			for status, n := range count {
				gauge(containersDesc, float64(n), namespace, status)
			}
		}
		if found, err := c.o.Node.List(ctx, node.ListRequest{}); err == nil {
			size := int64(0)
			for _, one := range found {
				size += one.Bytes()
			}
			gauge(checkpointsDesc, float64(len(found)), namespace)
			gauge(sizeDesc, float64(size), namespace)
		}
	}
}

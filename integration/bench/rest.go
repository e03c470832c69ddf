package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/stasis-run/stasis/integration/stack"
	"github.com/stasis-run/stasis/node/rest/v1"
)

// rest measures stasisd: its memory when idle, how fast it tells of many containers, and
// what a checkpoint by it costs more than one by the command line.
func (b *bench) rest(size size, containers int) {
	d := b.s.StartStasisd("--allow-path", b.s.BundleDir())
	b.logf("idle stasisd: %.0f s of silence", settle.Seconds())
	select {
	case <-time.After(settle):
	case <-b.ctx.Done():
		b.tb.Fatalf("interrupted")
	}
	resident := &row{Name: "idle stasisd: resident", Unit: "MiB", Target: target{max: 40}}
	usage, err := readSmaps(d.Pid())
	if err != nil {
		b.tb.Fatalf("memory of stasisd: %v", err)
	}
	resident.add(stasis, usage["Rss"]/1024)
	b.report.Rows = append(b.report.Rows, resident)

	c := b.startProbe(stasis, gap(size.mib, "-every", "20ms"))
	client, err := v1.New("unix://"+d.Socket, v1.Options{Namespace: b.s.Namespace})
	if err != nil {
		b.tb.Fatalf("%v", err)
	}
	defer client.Close()
	b.logf("a checkpoint by stasisd, %v: %d times each", size, size.rounds)
	b.rounds(size.rounds, []*row{{
		Name: fmt.Sprintf("checkpoint by stasisd %v", size), Unit: "ms", Target: target{cli, 1.05},
	}}, contender{stasis, func() []float64 {
		return b.toImage(c, size, func(id, ref string) {
			job, err := client.Checkpoint(b.ctx, v1.CheckpointBody{Containers: []string{id}, Ref: ref, Compression: "none"})
			if err == nil {
				job, err = client.Wait(b.ctx, job.ID, nil)
			}
			if err == nil && job.Error != nil {
				err = job.Error
			}
			if err != nil {
				b.tb.Fatalf("checkpoint by stasisd: %v", err)
			}
		})[:1]
	}}, contender{cli, func() []float64 {
		return b.toImage(c, size, func(id, ref string) { b.s.Stasis("checkpoint", id, ref, "--compress", "none") })[:1]
	}})
	b.kill(c)

	http := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", d.Socket)
	}}}
	defer http.CloseIdleConnections()
	call := func(method, path, body string) string {
		r, err := newRequest(b.ctx, method, "http://node"+path, body)
		if err != nil {
			b.tb.Fatalf("%v", err)
		}
		answer, err := http.Do(r)
		if err != nil {
			b.tb.Fatalf("%s %s: %v", method, path, err)
		}
		defer answer.Body.Close()
		data, err := io.ReadAll(answer.Body)
		if err != nil || answer.StatusCode >= 300 {
			b.tb.Fatalf("%s %s: %s %s: %v", method, path, answer.Status, data, err)
		}
		return string(data)
	}
	b.logf("GET /state with %d containers: 50 times", containers)
	for i := range containers {
		name := fmt.Sprintf("state-%d", i)
		call("POST", "/containers/"+name, fmt.Sprintf(`{"bundlePath":%q}`, b.s.Bundle(name, "busybox", stack.Args("sleep", "100000"))))
	}
	b.rounds(50, []*row{{Name: fmt.Sprintf("GET /state, %d containers", containers), Unit: "ms"}}, contender{stasis, func() []float64 {
		start := time.Now()
		call("GET", "/state", "")
		return since(start)
	}})
	for i := range containers {
		call("PATCH", fmt.Sprintf("/containers/state-%d", i), `{"signal":9}`)
	}
	b.s.Poll(b.ctx, "all to end", func() bool { return strings.Contains(call("GET", "/state", ""), `"containers":[]`) })
}

func newRequest(ctx context.Context, method, url, body string) (*http.Request, error) {
	return http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
}

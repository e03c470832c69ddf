package kubernetes

import (
	"strconv"
	"strings"
	"testing"
)

const redisPod = `apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec:
  runtimeClassName: stasis
  nodeSelector: {kubernetes.io/hostname: NODE}
  terminationGracePeriodSeconds: 1
  containers:
  - name: redis
    image: IMAGE
    imagePullPolicy: IfNotPresent
    command: [redis-server, --save, "", --dir, /tmp, --protected-mode, "no"]
    readinessProbe: {tcpSocket: {port: 6379}, periodSeconds: 1}
`

const nginxPod = `apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec:
  runtimeClassName: stasis
  nodeSelector: {kubernetes.io/hostname: NODE}
  terminationGracePeriodSeconds: 1
  containers:
  - name: nginx
    image: IMAGE
    imagePullPolicy: IfNotPresent
    command:
    - sh
    - -c
    - |
      mkdir -p /srv && echo hello >/srv/index.html
      cat >/etc/nginx/nginx.conf <<END
      daemon off; worker_processes 2; user root; error_log stderr; pid /run/nginx.pid;
      events {}
      http { access_log /dev/stdout; server { listen 80; root /srv; location /status { stub_status; } } }
      END
      exec nginx
    readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1}
`

// testWorkloads moves Redis and nginx to another node.
func (e *env) testWorkloads(t *testing.T) {
	t.Run("Redis", func(t *testing.T) {
		redis := func(pod string, args ...string) string {
			t.Helper()
			return e.Kubectl(t, append([]string{"exec", pod, "--", "redis-cli"}, args...)...)
		}
		e.Apply(t, render(redisPod, "NAME", "redis-a", "NODE", e.here.Name, "IMAGE", "stasis.test/redis:latest"))
		e.WaitReady(t, "redis-a")
		redis("redis-a", "debug", "populate", "10000", "key", "100")
		redis("redis-a", "set", "here", "there")
		run := field(redis("redis-a", "info", "server"), "run_id:")
		digest := redis("redis-a", "debug", "digest")
		ref := e.checkpoint(t, e.here, "redis-a", "redis")[0]
		redis("redis-a", "set", "here", "later")

		e.Apply(t, render(redisPod, "NAME", "redis-b", "NODE", e.there.Name, "IMAGE", ref))
		e.WaitReady(t, "redis-b")
		if now := field(redis("redis-b", "info", "server"), "run_id:"); now != run || run == "" {
			t.Errorf("it runs as %q, the one in the checkpoint as %q", now, run)
		}
		if now := redis("redis-b", "debug", "digest"); now != digest {
			t.Errorf("the digest of its data is %q, at the checkpoint %q", now, digest)
		}
		if value := redis("redis-b", "get", "here"); value != "there\n" {
			t.Errorf("a value is %q, at the checkpoint it was there", value)
		}
		if out := redis("redis-b", "incr", "n"); out != "1\n" {
			t.Errorf("incr printed %q", out)
		}
	})
	t.Run("Nginx", func(t *testing.T) {
		e.Apply(t, render(nginxPod, "NAME", "nginx-a", "NODE", e.here.Name, "IMAGE", "stasis.test/nginx:latest"))
		e.WaitReady(t, "nginx-a")
		get := e.forward(t, "nginx-a", 80)
		requests := func(status string) int {
			t.Helper()
			lines := strings.Split(status, "\n")
			if len(lines) < 3 || len(strings.Fields(lines[2])) != 3 {
				t.Fatalf("nginx's status is %q", status)
			}
			n, err := strconv.Atoi(strings.Fields(lines[2])[2])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		for range 100 {
			get("/")
		}
		before := requests(get("/status"))
		ref := e.checkpoint(t, e.here, "nginx-a", "nginx")[0]
		e.Apply(t, render(nginxPod, "NAME", "nginx-b", "NODE", e.there.Name, "IMAGE", ref))
		e.WaitReady(t, "nginx-b")
		there := e.forward(t, "nginx-b", 80)
		if page := there("/"); page != "hello\n" {
			t.Errorf("the page is %q", page)
		}
		if now := requests(there("/status")); now < before {
			t.Errorf("it has counted %d requests, %d before the checkpoint", now, before)
		}
		if _, err := e.KubectlErr(t.Context(), "exec", "nginx-b", "--", "nginx", "-s", "reload"); err != nil {
			t.Error(err)
		}
		if page := there("/"); page != "hello\n" {
			t.Errorf("after a reload the page is %q", page)
		}
	})
}

// field is what follows a key on a line of its own.
func field(text, key string) string {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), key); ok {
			return value
		}
	}
	return ""
}

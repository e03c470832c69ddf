package kubernetes

import (
	"strings"
	"testing"
)

const togetherPod = `apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec:
  runtimeClassName: stasis
  nodeSelector: {kubernetes.io/hostname: NODE}
  terminationGracePeriodSeconds: 1
  initContainers:
  - name: init
    image: stasis.test/busybox:latest
    imagePullPolicy: IfNotPresent
    command: [sh, -c, "echo NAME >/shared/from-init"]
    volumeMounts: [{name: shared, mountPath: /shared}]
  - name: sidecar
    image: stasis.test/busybox:latest
    imagePullPolicy: IfNotPresent
    restartPolicy: Always
    command: [sh, -c, "until [ -e /shared/end ]; do date +%s >/shared/now; sleep 0.2; done"]
    volumeMounts: [{name: shared, mountPath: /shared}]
  containers:
  - name: one
    image: IMAGE1
    imagePullPolicy: IfNotPresent
    command: [python3, /app.py]
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
    volumeMounts: [{name: shared, mountPath: /shared}]
  - name: two
    image: IMAGE2
    imagePullPolicy: IfNotPresent
    command: [python3, /app.py]
    env: [{name: PORT, value: "8081"}]
    readinessProbe: {httpGet: {path: /healthz, port: 8081}, periodSeconds: 1}
    volumeMounts: [{name: shared, mountPath: /shared}]
  volumes:
  - {name: shared, emptyDir: {}}
`

// testTogether restores both containers of a pod that has an init container and a
// sidecar too, which start as ever.
func (e *env) testTogether(t *testing.T) {
	e.Apply(t, render(togetherPod, "NAME", "together-a", "NODE", e.here.Name, "IMAGE1", App, "IMAGE2", App))
	e.WaitReady(t, "together-a")
	one, two := e.forward(t, "together-a", 8080)("/born"), e.forward(t, "together-a", 8081)("/born")
	refs := e.checkpoint(t, e.here, "together-a", "one", "two")
	e.Apply(t, render(togetherPod, "NAME", "together-b", "NODE", e.there.Name, "IMAGE1", refs[0], "IMAGE2", refs[1]))
	e.WaitReady(t, "together-b")
	get := e.forward(t, "together-b", 8080)
	if now := get("/born"); now != one {
		t.Errorf("container one was born at %s, the one in the checkpoint at %s", now, one)
	}
	if now := e.forward(t, "together-b", 8081)("/born"); now != two {
		t.Errorf("container two was born at %s, the one in the checkpoint at %s", now, two)
	}
	if text := get("/read/shared/from-init"); text != "together-b\n" {
		t.Errorf("the init container of this pod has not written what one reads: %q", text)
	}
	if now := get("/read/shared/now"); len(strings.TrimSpace(now)) == 0 {
		t.Errorf("the sidecar has written %q", now)
	}
	for _, name := range []string{"one", "two", "sidecar"} {
		if out := e.Kubectl(t, "exec", "together-b", "-c", name, "--", "hostname"); out != "together-b\n" {
			t.Errorf("the host name in container %s is %q", name, out)
		}
		// Each sees the network of the pod.
		if out := e.Kubectl(t, "exec", "together-b", "-c", name, "--", "wget", "-q", "-O", "-", "http://127.0.0.1:8080/born"); out != one {
			t.Errorf("container %s gets %q from one", name, out)
		}
	}
}

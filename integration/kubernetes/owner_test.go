package kubernetes

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/stasis-run/stasis/integration/kubernetes/cluster"
)

// owned is a Deployment or a StatefulSet of two apps, on any nodes.
const owned = `apiVersion: apps/v1
kind: KIND
metadata: {name: NAME}
spec:
  replicas: 2
  SERVICE
  selector: {matchLabels: {app: NAME}}
  template:
    metadata: {labels: {app: NAME}}
    spec:
      runtimeClassName: stasis
      terminationGracePeriodSeconds: 1
      containers:
      - name: app
        image: IMAGE
        imagePullPolicy: IfNotPresent
        command: [python3, /app.py]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
`

const job = `apiVersion: batch/v1
kind: Job
metadata: {name: NAME}
spec:
  template:
    metadata: {labels: {app: NAME}}
    spec:
      runtimeClassName: stasis
      nodeSelector: {kubernetes.io/hostname: NODE}
      restartPolicy: Never
      terminationGracePeriodSeconds: 1
      containers:
      - name: job
        image: IMAGE
        imagePullPolicy: IfNotPresent
        command:
        - python3
        - -c
        - |
          import os, time
          n = 0
          while not os.path.exists("/tmp/last"):
              n += 1
              print("step", n, flush=True)
              time.sleep(0.05)
          print("last step", n + 1, flush=True)
`

// testOwners restores in pods that controllers make.
func (e *env) testOwners(t *testing.T) {
	t.Run("Replicas", func(t *testing.T) {
		e.Apply(t, render(appPod, "NAME", "origin", "CLASS", "stasis", "NODE", e.here.Name, "IMAGE", App, "    volumeMounts: [{name: host, mountPath: /host}]\n", ""))
		e.WaitReady(t, "origin")
		born := e.forward(t, "origin", 8080)("/born")
		ref := e.checkpoint(t, e.here, "origin", "app")[0]
		for kind, service := range map[string]string{"Deployment": "", "StatefulSet": "serviceName: none"} {
			t.Run(kind, func(t *testing.T) {
				name := "of-" + strings.ToLower(kind)
				e.Apply(t, render(owned, "KIND", kind, "NAME", name, "SERVICE", service, "IMAGE", ref))
				old := e.waitReplicas(t, name)
				for _, p := range old {
					if now := e.forward(t, p, 8080)("/born"); now != born {
						t.Errorf("pod %s was born at %s, the one in the checkpoint at %s", p, now, born)
					}
				}
				// In the place of a pod that is gone comes another one that was restored.
				e.Kubectl(t, "delete", "pod", old[0])
				for _, p := range e.waitReplicas(t, name) {
					if now := e.forward(t, p, 8080)("/born"); now != born {
						t.Errorf("pod %s was born at %s, the one in the checkpoint at %s", p, now, born)
					}
				}
				e.Kubectl(t, "rollout", "restart", kind+"/"+name)
				e.Kubectl(t, "rollout", "status", "--timeout=150s", kind+"/"+name)
			})
		}
	})
	t.Run("Job", func(t *testing.T) {
		e.Apply(t, render(job, "NAME", "job-a", "NODE", e.here.Name, "IMAGE", App))
		one := e.jobPod(t, "job-a")
		e.WaitLog(t, one, "", "step 5\n")
		ref := e.checkpoint(t, e.here, one, "job")[0]
		e.Apply(t, render(job, "NAME", "job-b", "NODE", e.there.Name, "IMAGE", ref))
		two := e.jobPod(t, "job-b")
		e.WaitLog(t, two, "", "step ")
		e.Kubectl(t, "exec", two, "--", "touch", "/tmp/last")
		e.Kubectl(t, "wait", "--for=condition=complete", "--timeout=150s", "job/job-b")
		steps := strings.Fields(strings.ReplaceAll(e.Kubectl(t, "logs", two), "last ", ""))
		first := 0
		for i := 1; i < len(steps); i += 2 {
			n := number(t, steps[i])
			if first == 0 {
				first = n
			}
			if n != first+i/2 {
				t.Fatalf("step %d, after %d others from step %d on", n, i/2, first)
			}
		}
		if first < 5 {
			t.Errorf("the first step is %d", first)
		}
	})
}

func (e *env) jobPod(t *testing.T, name string) string {
	t.Helper()
	var pod string
	e.Wait(t, "the pod of job "+name, func() error {
		pods, err := e.Pods(t.Context(), "app="+name)
		if err == nil && (len(pods) != 1 || pods[0].Container("job").State.Running == nil) {
			err = fmt.Errorf("its pods are %+v", pods)
		}
		if err == nil {
			pod = pods[0].Metadata.Name
		}
		return err
	})
	return pod
}

// waitReplicas waits until two pods are ready and are not about to end, and
// returns their names.
func (e *env) waitReplicas(t *testing.T, name string) (names []string) {
	t.Helper()
	e.Wait(t, "the pods of "+name, func() error {
		pods, err := e.Pods(t.Context(), "app="+name)
		pods = slices.DeleteFunc(pods, func(p cluster.Pod) bool { return !p.Ready() || p.Metadata.DeletionTimestamp != "" })
		if err == nil && len(pods) != 2 {
			err = fmt.Errorf("%d are ready", len(pods))
		}
		names = nil
		for _, p := range pods {
			names = append(names, p.Metadata.Name)
		}
		return err
	})
	return names
}

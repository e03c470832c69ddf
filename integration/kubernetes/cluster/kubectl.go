package cluster

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// Command is a kubectl that was not started yet, as the cluster's administrator.
func (c *Cluster) Command(ctx context.Context, args ...string) *exec.Cmd {
	kubectl, err := program("kubectl")
	if err != nil {
		c.tb.Fatalf("%v", err)
	}
	cmd := exec.CommandContext(ctx, kubectl, append([]string{"--kubeconfig", c.path("kubeconfig"), "--cache-dir", c.path("kubectl")}, args...)...)
	cmd.Env = c.first.Env()
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// KubectlErr runs kubectl and returns what it printed on stdout. The error has what
// it printed on stderr.
func (c *Cluster) KubectlErr(ctx context.Context, args ...string) (string, error) {
	return c.run(c.Command(ctx, args...))
}

func (c *Cluster) run(cmd *exec.Cmd) (string, error) {
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("kubectl %s: %w\n%s", strings.Join(cmd.Args[5:], " "), err, stderr.String())
	}
	return string(out), err
}

// Kubectl is KubectlErr for a command that must succeed.
func (c *Cluster) Kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := c.KubectlErr(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Clean is Kubectl for functions given to Cleanup, when the test's own context has
// ended.
func (c *Cluster) Clean(t *testing.T, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitTimeout)
	defer cancel()
	if _, err := c.KubectlErr(ctx, args...); err != nil {
		t.Error(err)
	}
}

// Apply makes what manifests say, and deletes it when the test is over.
func (c *Cluster) Apply(t *testing.T, manifests string) {
	t.Helper()
	cmd := c.Command(t.Context(), "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(manifests)
	_, err := c.run(cmd)
	t.Cleanup(func() {
		if t.Failed() {
			c.report(context.Background())
		}
		c.Delete(t, manifests)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Delete deletes what manifests say, and waits until it is gone.
func (c *Cluster) Delete(t *testing.T, manifests string) {
	t.Helper()
	// Also after the test's own context has ended.
	ctx, cancel := context.WithTimeout(context.Background(), waitTimeout)
	defer cancel()
	cmd := c.Command(ctx, "delete", "--ignore-not-found", "--cascade=foreground", "--timeout=150s", "-f", "-")
	cmd.Stdin = strings.NewReader(manifests)
	if _, err := c.run(cmd); err != nil {
		t.Errorf("%v", err)
	}
}

// Wait asks cond until it returns nil, and fails the test with the last error if it
// never does.
func (c *Cluster) Wait(t *testing.T, what string, cond func() error) {
	t.Helper()
	if err := c.wait(t.Context(), what, cond); err != nil {
		t.Fatal(err)
	}
}

// Pod returns a pod as it is, NAME or NAMESPACE/NAME.
func (c *Cluster) Pod(ctx context.Context, name string) (*Pod, error) {
	namespace, pod, ok := strings.Cut(name, "/")
	if !ok {
		namespace, pod = "default", name
	}
	p := &Pod{}
	return p, c.api.get(ctx, "/api/v1/namespaces/"+namespace+"/pods/"+pod, p)
}

// Pods returns the pods with a label, KEY=VALUE, of namespace default.
func (c *Cluster) Pods(ctx context.Context, label string) ([]Pod, error) {
	var list struct{ Items []Pod }
	return list.Items, c.api.get(ctx, "/api/v1/namespaces/default/pods?labelSelector="+strings.ReplaceAll(label, "=", "%3D"), &list)
}

// WaitPod waits until cond is true of a pod, and returns it then.
func (c *Cluster) WaitPod(t *testing.T, name, what string, cond func(*Pod) bool) (pod *Pod) {
	t.Helper()
	c.Wait(t, "pod "+name+": "+what, func() (err error) {
		if pod, err = c.Pod(t.Context(), name); err == nil && !cond(pod) {
			err = fmt.Errorf("its status is %+v", pod.Status)
		}
		return err
	})
	return pod
}

// WaitReady waits until a pod is ready.
func (c *Cluster) WaitReady(t *testing.T, name string) *Pod {
	t.Helper()
	return c.WaitPod(t, name, "ready", (*Pod).Ready)
}

// WaitLog waits until a pod's log has a text, and returns the log. container may be
// empty.
func (c *Cluster) WaitLog(t *testing.T, pod, container, text string) (log string) {
	t.Helper()
	args := []string{"logs", pod}
	if container != "" {
		args = append(args, "-c", container)
	}
	c.Wait(t, fmt.Sprintf("%q in the log of %s", text, pod), func() (err error) {
		if log, err = c.KubectlErr(t.Context(), args...); err == nil && !strings.Contains(log, text) {
			err = errors.New(tail(log, 5))
		}
		return err
	})
	return log
}

// Checkpoint calls the kubelet's endpoint, and returns the path of the archive on
// the node.
func (c *Cluster) Checkpoint(ctx context.Context, pod, container string) (string, error) {
	p, err := c.Pod(ctx, pod)
	if err != nil {
		return "", err
	}
	var answer struct{ Items []string }
	url := fmt.Sprintf("%s/api/v1/nodes/%s/proxy/checkpoint/%s/%s/%s", c.server, p.Spec.NodeName, p.Metadata.Namespace, p.Metadata.Name, container)
	if err := c.api.do(ctx, "POST", url, &answer); err != nil {
		return "", err
	}
	if len(answer.Items) != 1 {
		return "", fmt.Errorf("POST %s: %d archives, want one", url, len(answer.Items))
	}
	return answer.Items[0], nil
}

// WaitAccount waits until pods can be made in namespace default: until it has its
// service account, and the certificate that is mounted with its token.
func (c *Cluster) WaitAccount(t *testing.T) {
	t.Helper()
	for _, path := range []string{"serviceaccounts/default", "configmaps/kube-root-ca.crt"} {
		c.Wait(t, path, func() error { return c.api.get(t.Context(), "/api/v1/namespaces/default/"+path, nil) })
	}
}

// Kubeconfig is the path of a kubectl's configuration.
func (c *Cluster) Kubeconfig() string { return c.path("kubeconfig") }

// Summary is what the kubelet of a node knows of a container's use of memory: what
// `kubectl top` shows.
func (c *Cluster) Summary(ctx context.Context, pod, container string) (memory uint64, err error) {
	p, err := c.Pod(ctx, pod)
	if err != nil {
		return 0, err
	}
	var summary struct {
		Pods []struct {
			PodRef     struct{ Name, Namespace string }
			Containers []struct {
				Name   string
				Memory struct{ WorkingSetBytes uint64 }
			}
		}
	}
	if err := c.api.get(ctx, "/api/v1/nodes/"+p.Spec.NodeName+"/proxy/stats/summary", &summary); err != nil {
		return 0, err
	}
	for _, of := range summary.Pods {
		for _, c := range of.Containers {
			if of.PodRef.Name == p.Metadata.Name && of.PodRef.Namespace == p.Metadata.Namespace && c.Name == container {
				return c.Memory.WorkingSetBytes, nil
			}
		}
	}
	return 0, fmt.Errorf("the kubelet of %s has no figures of %s in pod %s", p.Spec.NodeName, container, pod)
}

package kubernetes

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/stasis-run/stasis/integration/kubernetes/cluster"
)

// checkpoint makes images of a pod's containers and sends them to the registry. It
// returns the images' names there, in the order of the containers' names.
func (e *env) checkpoint(t *testing.T, n *cluster.Node, pod string, containers ...string) []string {
	t.Helper()
	p, err := e.Pod(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	out, err := n.Run(t.Context(), "stasis", "checkpoint", "--quiet", "--namespace", "k8s.io", "--pod", p.Metadata.Namespace+"/"+p.Metadata.Name)
	if err != nil {
		t.Fatal(err)
	}
	local := strings.Fields(out)
	if len(local) != len(p.Status.ContainerStatuses)+running(p.Status.InitContainerStatuses) {
		t.Fatalf("stasis checkpoint of pod %s printed %q", pod, out)
	}
	var refs []string
	for _, name := range containers {
		_, id, _ := strings.Cut(p.Container(name).ContainerID, "://")
		for _, ref := range local {
			if id == "" || !strings.Contains(ref, id) {
				continue
			}
			// A name of its own: images of one name are one image to the kubelet.
			e.pushed++
			to := fmt.Sprintf("%s/%s/%s:%d", e.registry, pod, name, e.pushed)
			if _, err := n.Run(t.Context(), "stasis", "push", "--quiet", "--plain-http", "--namespace", "k8s.io", ref, to); err != nil {
				t.Fatal(err)
			}
			refs = append(refs, to)
		}
	}
	if len(refs) != len(containers) {
		t.Fatalf("stasis checkpoint of pod %s printed %q, which has not all of %v", pod, out, containers)
	}
	for _, ref := range local {
		if _, err := n.Run(t.Context(), "stasis", "rm", "--namespace", "k8s.io", ref); err != nil {
			t.Error(err)
		}
	}
	return refs
}

func running(containers []cluster.ContainerStatus) (n int) {
	for _, c := range containers {
		if c.State.Running != nil {
			n++
		}
	}
	return n
}

// ticks are the numbers of the ticks in an app's log.
func ticks(log string) (all []int) {
	for line := range strings.Lines(log) {
		if n, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(line, "tick "))); err == nil {
			all = append(all, n)
		}
	}
	return all
}

// testRestore restores a pod by its image on the same node and on another one, under
// other names; and the image once more, in pods that have no RuntimeClass.
func (e *env) testRestore(t *testing.T) {
	for _, class := range classes {
		t.Run(class, func(t *testing.T) {
			e.Apply(t, render(appPod, "NAME", "origin", "CLASS", class, "NODE", e.here.Name, "IMAGE", App))
			origin := e.WaitReady(t, "origin")
			e.WaitLog(t, "origin", "", "tick 5\n")
			get := e.forward(t, "origin", 8080)
			born := get("/born")
			for range 5 {
				get("/count")
			}
			ref := e.checkpoint(t, e.here, "origin", "app")[0]
			// It runs on.
			if n := number(t, get("/count")); n != 6 {
				t.Errorf("after the checkpoint the count is %d, want 6", n)
			}
			for name, n := range map[string]*cluster.Node{"same-node": e.here, "other-node": e.there} {
				t.Run(name, func(t *testing.T) {
					pod := "again-" + name
					e.Apply(t, render(appPod, "NAME", pod, "CLASS", class, "NODE", n.Name, "IMAGE", ref))
					p := e.WaitReady(t, pod)
					get := e.forward(t, pod, 8080)
					if now := get("/born"); now != born {
						t.Errorf("it was born at %s, the one in the checkpoint at %s", now, born)
					}
					if n := number(t, get("/count")); n != 6 {
						t.Errorf("the count is %d, want 6", n)
					}
					log := e.Kubectl(t, "logs", pod)
					if all := ticks(log); strings.Contains(log, "started") || len(all) == 0 || all[0] < 5 {
						t.Errorf("the log does not begin where the checkpoint was made:\n%s", log)
					}
					if p.Metadata.UID == origin.Metadata.UID || p.Status.PodIP == origin.Status.PodIP {
						t.Errorf("the pod has the UID %s and the address %s, as the one before", p.Metadata.UID, p.Status.PodIP)
					}
					hosts := e.Kubectl(t, "exec", pod, "--", "cat", "/etc/hosts")
					if !strings.Contains(hosts, p.Status.PodIP+"\t"+pod) {
						t.Errorf("/etc/hosts has not the new address %s:\n%s", p.Status.PodIP, hosts)
					}
					if name := e.Kubectl(t, "exec", pod, "--", "hostname"); name != pod+"\n" {
						t.Errorf("the host name is %q", name)
					}
					e.checkPod(t, pod, n)
				})
			}
		})
	}
}

// testFresh starts the same image without the RuntimeClass.
func (e *env) testFresh(t *testing.T) {
	e.Apply(t, render(appPod, "NAME", "origin", "CLASS", "stasis", "NODE", e.here.Name, "IMAGE", App))
	e.WaitReady(t, "origin")
	e.Kubectl(t, "exec", "origin", "--", "sh", "-c", "echo written >/file")
	ref := e.checkpoint(t, e.here, "origin", "app")[0]
	e.Apply(t, render(appPod, "NAME", "fresh", "  runtimeClassName: CLASS\n", "", "NODE", e.there.Name, "IMAGE", ref))
	e.WaitReady(t, "fresh")
	if log := e.Kubectl(t, "logs", "fresh"); !strings.HasPrefix(log, "started\n") && !strings.HasPrefix(log, "tick 1\n") {
		t.Errorf("the log is not that of a fresh start:\n%s", log)
	}
	// On the files of then.
	if out := e.Kubectl(t, "exec", "fresh", "--", "cat", "/file"); out != "written\n" {
		t.Errorf("the file that was written before the checkpoint is %q", out)
	}
}

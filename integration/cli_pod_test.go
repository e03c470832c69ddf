package integration

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestCLIPod checkpoints all containers of a pod of Kubernetes, which runs on. Its
// sandbox is none of them.
func TestCLIPod(t *testing.T) {
	t.Parallel()
	for name, handler := range map[string]string{"stasis": stack.HandlerStasis, "drop-in": stack.HandlerDropIn, "upstream": stack.HandlerRunc} {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, stack.Options{CRI: true})
			ctx := s.Ctx()
			k8s := namespaces.WithNamespace(ctx, stack.CRINamespace)
			// What the kubelet labels containers with.
			pod := func(labels map[string]string, container string) {
				labels["io.kubernetes.pod.name"] = "web-0"
				labels["io.kubernetes.pod.namespace"] = "default"
				labels["io.kubernetes.pod.uid"] = "uid-of-web-0"
				if container != "" {
					labels["io.kubernetes.container.name"] = container
				}
			}
			p := s.RunPod(ctx, "web-0", handler, func(c *runtimeapi.PodSandboxConfig) { pod(c.Labels, "") })
			ids := map[string]string{}
			for _, name := range []string{"one", "two"} {
				ids[p.RunContainer(ctx, name, stack.Busybox,
					[]string{"sh", "-c", "trap '' TERM; i=0; while sleep 0.01; do i=$((i+1)); echo line $i; done"},
					func(c *runtimeapi.ContainerConfig) { pod(c.Labels, name) })] = name
			}
			other := s.RunPod(ctx, "other", handler)
			other.RunContainer(ctx, "other", stack.Busybox, []string{"sleep", "1000"})
			logs := func(name string) int { return strings.Count(p.Log(name), "line ") }
			for _, name := range ids {
				s.Poll(ctx, "the log of "+name, func() bool { return logs(name) > 0 })
			}

			stasis := func(args ...string) (string, error) {
				return s.StasisErr(append([]string{"--namespace", stack.CRINamespace}, args...)...)
			}
			for _, unknown := range []string{"web", "kube-system/web-0"} {
				if _, err := stasis("checkpoint", "--pod", unknown); err == nil || !strings.Contains(err.Error(), "no running container") {
					t.Errorf("--pod %s: %v", unknown, err)
				}
			}
			for _, name := range []string{"web-0", "default/web-0"} {
				out, err := stasis("checkpoint", "--pod", name)
				must(t, err)
				refs := strings.Fields(out)
				if len(refs) != len(ids) {
					t.Fatalf("checkpoint printed %q, want an image of each of %d containers", out, len(ids))
				}
				found, targets := map[string]bool{}, map[digest.Digest]bool{}
				for _, ref := range refs {
					img, err := s.Client().ImageService().Get(k8s, ref)
					must(t, err)
					targets[img.Target.Digest] = true
					report, err := stasis("inspect", img.Name, "-o", "json")
					must(t, err)
					var of struct {
						Info struct {
							ContainerID   string `json:"container_id"`
							ContainerName string `json:"container_name"`
							Pod           struct{ Name, Namespace string }
						}
					}
					must(t, json.Unmarshal([]byte(report), &of))
					i := of.Info
					found[fmt.Sprintf("%s %s %s/%s", i.ContainerID, i.ContainerName, i.Pod.Namespace, i.Pod.Name)] = true
				}
				if list, err := stasis("ls"); err != nil || strings.Count(list, "\n") != 1+len(refs) {
					t.Errorf("ls lists not just %v: %v\n%s", refs, err, list)
				}
				for id, name := range ids {
					if want := fmt.Sprintf("%s %s default/web-0", id, name); !found[want] {
						t.Errorf("no checkpoint of %s among %v", want, found)
					}
				}
				for _, name := range ids {
					n := logs(name)
					s.Poll(ctx, "the log of "+name+" to go on", func() bool { return logs(name) > n })
				}
				for id := range ids {
					if out := p.Exec(ctx, id, "echo", "alive"); out != "alive\n" {
						t.Errorf("exec printed %q", out)
					}
				}
				for _, ref := range refs {
					_, err := stasis("rm", ref)
					must(t, err)
				}
				// The CRI names each image a second time, by its ID.
				images, err := s.Client().ImageService().List(k8s)
				must(t, err)
				for _, img := range images {
					if targets[img.Target.Digest] {
						t.Errorf("%s is left of a checkpoint that was removed", img.Name)
					}
				}
			}
			for _, name := range ids {
				checkLines(t, p.Log(name))
			}
			// The CRI has a lease for each sandbox.
			leases, err := s.Client().LeasesService().List(k8s)
			must(t, err)
			for _, l := range leases {
				if l.ID != p.ID && l.ID != other.ID {
					t.Errorf("a lease is left: %v", l)
				}
			}
			checkTidy(t, s)
			p.Remove(ctx)
			other.Remove(ctx)
		})
	}
}

// checkLines looks for lines that a log lost: they are "line 1", "line 2", and so
// on, each at the end of one of the CRI's.
func checkLines(t *testing.T, log string) {
	t.Helper()
	n := 0
	for line := range strings.Lines(log) {
		_, number, ok := strings.Cut(line, "line ")
		if !ok || !strings.HasSuffix(line, "\n") {
			continue
		}
		if n++; count(t, number) != n {
			t.Errorf("the log's line %d is %q", n, line)
			return
		}
	}
}

package kubernetes

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stasis-run/stasis/integration/kubernetes/cluster"
)

// annotated is appPod with annotations, which keeps its normal image.
func annotated(name string, n *cluster.Node, annotations ...string) string {
	pod := render(appPod, "NAME", name, "CLASS", "stasis", "NODE", n.Name, "IMAGE", App)
	var list []string
	for i := 0; i < len(annotations); i += 2 {
		list = append(list, fmt.Sprintf("%s: %q", annotations[i], annotations[i+1]))
	}
	return strings.Replace(pod, "metadata: {", "metadata: {annotations: {"+strings.Join(list, ", ")+"}, ", 1)
}

// testAnnotations restores pods by annotation: from the kubelet's archive, and from
// an image on the node; and looks at what a restart does then, and at what is refused.
func (e *env) testAnnotations(t *testing.T) {
	e.Apply(t, render(appPod, "NAME", "origin", "CLASS", "stasis", "NODE", e.here.Name, "IMAGE", App))
	e.WaitReady(t, "origin")
	e.WaitLog(t, "origin", "", "tick 5\n")
	born := e.forward(t, "origin", 8080)("/born")
	archive, err := e.Checkpoint(t.Context(), "origin", "app")
	if err != nil {
		t.Fatal(err)
	}
	out, err := e.here.Run(t.Context(), "stasis", "checkpoint", "--quiet", "--namespace", "k8s.io", "--pod", "default/origin")
	if err != nil {
		t.Fatal(err)
	}
	ref := strings.TrimSpace(out)

	for name, from := range map[string][]string{
		"archive": {"stasis.run/restore-from", archive},
		"image":   {"stasis.run/restore-from", ref},
		"named":   {"stasis.run/restore-from.app", ref},
	} {
		t.Run(name, func(t *testing.T) {
			pod := "from-" + name
			e.Apply(t, annotated(pod, e.here, from...))
			e.WaitReady(t, pod)
			if now := e.forward(t, pod, 8080)("/born"); now != born {
				t.Errorf("it was born at %s, the one in the checkpoint at %s", now, born)
			}
			if all := ticks(e.Kubectl(t, "logs", pod)); len(all) == 0 || all[0] < 5 {
				t.Errorf("the log begins with tick %v", all)
			}
			// With a restart it starts afresh, which is the default.
			e.checkPod(t, pod, e.here)
		})
	}
	t.Run("restart", func(t *testing.T) {
		e.Apply(t, annotated("again", e.here, "stasis.run/restore-from", ref, "stasis.run/restart", "restore"))
		before := e.WaitReady(t, "again").Container("app")
		e.Kubectl(t, "exec", "again", "--", "sh", "-c", "echo 3 >/tmp/exit")
		e.WaitPod(t, "again", "restored once more", restarted(before))
		if now := e.forward(t, "again", 8080)("/born"); now != born {
			t.Errorf("it was born at %s, the one in the checkpoint at %s", now, born)
		}
	})

	t.Run("refused", func(t *testing.T) {
		if _, err := e.here.Run(t.Context(), "cp", archive, "/var/lib/archive.tar"); err != nil {
			t.Fatal(err)
		}
		link := "/var/lib/kubelet/checkpoints/link.tar"
		if _, err := e.here.Run(t.Context(), "ln", "-s", "/var/lib/archive.tar", link); err != nil {
			t.Fatal(err)
		}
		for name, of := range map[string]struct {
			annotations []string
			want        []string
		}{
			"outside": {[]string{"stasis.run/restore-from", "/var/lib/archive.tar"}, []string{"/var/lib/archive.tar"}},
			"link":    {[]string{"stasis.run/restore-from", link}, []string{link}},
			"missing": {[]string{"stasis.run/restore-from", "localhost/none:1"}, []string{"localhost/none:1"}},
			"unknown": {[]string{"stasis.run/restored-from", ref}, []string{"stasis.run/restored-from"}},
			"value":   {[]string{"stasis.run/restore-from", ref, "stasis.run/restart", "maybe"}, []string{"stasis.run/restart"}},
		} {
			t.Run(name, func(t *testing.T) {
				pod := "refused-" + name
				e.Apply(t, annotated(pod, e.here, of.annotations...))
				e.waitFailure(t, pod, of.want...)
				e.Kubectl(t, "delete", "pod", pod, "--timeout=60s")
			})
		}
	})

	t.Run("namespaces", func(t *testing.T) {
		const other = "apiVersion: v1\nkind: Namespace\nmetadata: {name: other}\n"
		e.Apply(t, other)
		e.Wait(t, "the service account of namespace other", func() error {
			_, err := e.KubectlErr(t.Context(), "-n", "other", "get", "serviceaccount/default", "configmap/kube-root-ca.crt")
			return err
		})
		pod := strings.Replace(annotated("stranger", e.here, "stasis.run/restore-from", ref), "metadata: {", "metadata: {namespace: other, ", 1)
		e.Apply(t, pod)
		e.waitFailure(t, "other/stranger", "namespace", "default", "other")
		// The kubelet tries again, and the node's configuration is read each time.
		e.here.Configure(t, "[restore.namespaces]\nother = [\"default\"]\n")
		t.Cleanup(func() { e.here.Configure(t, "") })
		e.WaitReady(t, "other/stranger")
	})
}

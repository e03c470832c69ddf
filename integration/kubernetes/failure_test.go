package kubernetes

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// testFailures makes restores fail. Each says why in one line of kubectl describe,
// and the pod can be deleted at once. What is left on the nodes, their stacks tell
// when they are stopped.
func (e *env) testFailures(t *testing.T) {
	e.Apply(t, render(volumePod, "NAME", "failure", "NODE", e.here.Name, "IMAGE", App, "MEMORY", "512Mi"))
	e.WaitReady(t, "failure")
	e.forward(t, "failure", 8080)("/eat/200")
	ref := e.checkpoint(t, e.here, "failure", "app")[0]
	for name, of := range map[string]struct {
		change [2]string
		memory string
		want   []string
	}{
		"no-mount":    {[2]string{"    - {name: host, mountPath: /host}\n", ""}, "512Mi", []string{"/host"}},
		"more-mounts": {[2]string{"    - {name: info, mountPath: /info}\n", "    - {name: info, mountPath: /info}\n    - {name: info, mountPath: /further}\n"}, "512Mi", []string{"/further"}},
		"no-folder":   {[2]string{"mountPath: /one/file, subPath: value", "mountPath: /one/file"}, "512Mi", []string{"/one/file"}},
		"no-memory":   {[2]string{}, "64Mi", []string{"memory"}},
	} {
		t.Run(name, func(t *testing.T) {
			pod := render(volumePod, "NAME", name, "NODE", e.there.Name, "IMAGE", ref, "MEMORY", of.memory)
			if of.change[0] != "" {
				changed := strings.Replace(pod, of.change[0], of.change[1], 1)
				if changed == pod {
					t.Fatalf("the pod has no %q", of.change[0])
				}
				pod = changed
			}
			e.Apply(t, pod)
			e.waitFailure(t, name, of.want...)
			e.Kubectl(t, "delete", "pod", name, "--timeout=60s")
		})
	}
	// It is not harmed by any of it.
	e.WaitReady(t, "failure")
}

// waitFailure waits until kubectl describe has a line of a failure with all of the
// words.
func (e *env) waitFailure(t *testing.T, pod string, words ...string) {
	t.Helper()
	namespace, name, ok := strings.Cut(pod, "/")
	if !ok {
		namespace, name = "default", pod
	}
	e.Wait(t, "an event that says why", func() error {
		described, err := e.KubectlErr(t.Context(), "describe", "pod", name, "-n", namespace)
		if err != nil {
			return err
		}
		var failures []string
		for line := range strings.Lines(described) {
			if strings.Contains(line, "Warning") && strings.Contains(line, "Failed") {
				failures = append(failures, line)
			}
		}
		if !slices.ContainsFunc(failures, func(line string) bool { return containsAll(line, words) }) {
			return fmt.Errorf("no line of kubectl describe has %q: %q", words, failures)
		}
		return nil
	})
}

func containsAll(text string, words []string) bool {
	for _, w := range words {
		if !strings.Contains(text, w) {
			return false
		}
	}
	return true
}

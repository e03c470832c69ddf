package kubernetes

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stasis-run/stasis/checkpoint/sign"
	"github.com/stasis-run/stasis/integration/stack"
)

// installerImage is the image that contrib/kubernetes names.
const installerImage = "localhost/stasis-node:latest"

const plainPod = `apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec:
  runtimeClassName: stasis
  terminationGracePeriodSeconds: 1
  containers:
  - {name: NAME, image: "stasis.test/busybox:latest", imagePullPolicy: IfNotPresent, command: [sleep, "1000"]}
`

// testInstaller installs Stasis with the manifests of contrib/kubernetes on a node
// that has none, uses it, and removes it again.
func (e *env) testInstaller(t *testing.T) {
	n := e.here
	root := repository(t)
	n.CRIImage(n.Ctx(), stack.Busybox)
	n.CRIRootfs(n.Ctx(), installerImage, stack.Rootfs("busybox"), installerLayer(t, root))
	before, err := n.MachineFiles()
	if err != nil {
		t.Fatal(err)
	}

	manifests := filepath.Join(root, "contrib/kubernetes")
	e.Kubectl(t, "apply", "-f", manifests)
	private, public := clusterKey(t)
	e.Kubectl(t, "-n", "stasis", "create", "secret", "generic", "stasis-keys", "--from-file=sign.key="+private, "--from-file=other.pub="+public)
	remove := filepath.Join(manifests, "remove")
	t.Cleanup(func() {
		if !t.Failed() {
			return // they are gone
		}
		for _, name := range []string{"stasis", "stasis-remove"} {
			out, err := e.KubectlErr(e.here.Ctx(), "-n", "stasis", "logs", "--tail=50", "daemonset/"+name)
			t.Logf("the log of %s: %s, %v", name, out, err)
		}
		e.Clean(t, "delete", "--ignore-not-found", "--timeout=150s", "-f", manifests, "-f", remove)
	})
	// No node has the label yet.
	e.Apply(t, render(plainPod, "NAME", "waits"))
	e.WaitAccount(t)
	// What somebody else has installed stays.
	n.WriteFile(t, "/usr/local/bin/stasis", "another")
	e.Kubectl(t, "label", "node", n.Name, "stasis.run/node=true")
	e.Wait(t, "the installer to refuse", func() error {
		out, err := e.KubectlErr(t.Context(), "-n", "stasis", "logs", "daemonset/stasis")
		if err == nil && !strings.Contains(out, "/usr/local/bin/stasis is on the node already") {
			err = fmt.Errorf("its log is %q", out)
		}
		return err
	})
	if out, err := n.Run(t.Context(), "cat", "/usr/local/bin/stasis"); err != nil || out != "another" {
		t.Errorf("what was on the node is %q now, %v", out, err)
	}
	if _, err := n.Run(t.Context(), "rm", "/usr/local/bin/stasis"); err != nil {
		t.Fatal(err)
	}
	e.waitDaemonSet(t, "stasis")
	e.WaitReady(t, "waits")
	if out, err := n.Run(t.Context(), "sh", "-c", "cat /run/containerd/io.containerd.runtime.v2.task/k8s.io/*/shim-binary-path"); err != nil ||
		!strings.Contains(out, "/usr/local/bin/containerd-shim-stasis-v1") {
		t.Errorf("the pod does not run under Stasis: %q, %v", out, err)
	}
	if out, err := n.Run(t.Context(), "sh", "-c", "stat -c %a /etc/stasis/keys/sign.key; stasis key list | wc -l"); err != nil || out != "600\n3\n" {
		t.Errorf("the cluster's keys on the node: %q, %v", out, err)
	}
	e.checkStasisd(t, filepath.Join(manifests, "stasisd"), "waits")
	// Once more it changes nothing, and so does not restart containerd.
	pid := n.Containerd()
	e.Kubectl(t, "-n", "stasis", "delete", "pod", "--all", "--grace-period=1")
	e.waitDaemonSet(t, "stasis")
	if now := n.Containerd(); now != pid {
		t.Errorf("containerd was restarted for nothing: process %d, then %d", pid, now)
	}

	e.Kubectl(t, "delete", "-f", manifests, "--timeout=150s")
	e.Kubectl(t, "apply", "-f", remove)
	// As long as there are containers, it waits.
	e.Wait(t, "the removal to wait for a container", func() error {
		out, err := e.KubectlErr(t.Context(), "-n", "stasis", "logs", "daemonset/stasis-remove")
		if err == nil && !strings.Contains(out, "waiting for containers that run under Stasis") {
			err = fmt.Errorf("its log is %q", out)
		}
		return err
	})
	if out, err := n.Run(t.Context(), "stasis", "version"); err != nil {
		t.Errorf("it does not wait: %q, %v", out, err)
	}
	e.Kubectl(t, "delete", "pod", "waits")
	e.waitDaemonSet(t, "stasis-remove")
	e.Kubectl(t, "delete", "-f", remove, "--timeout=150s")
	e.Kubectl(t, "label", "node", n.Name, "stasis.run/node-")

	after, err := n.MachineFiles()
	if err != nil {
		t.Fatal(err)
	}
	if only := without(after, before); len(only) > 0 {
		t.Errorf("left on the node: %q", only)
	}
	if only := without(before, after); len(only) > 0 {
		t.Errorf("missing on the node: %q", only)
	}
	if _, err := n.Run(t.Context(), "ls", "-d", "/var/lib/stasis"); err == nil {
		t.Error("left on the node: /var/lib/stasis")
	}
}

// checkStasisd has stasisd run on the node, and checkpoints a pod by it.
func (e *env) checkStasisd(t *testing.T, manifests, pod string) {
	t.Helper()
	n := e.here
	e.Kubectl(t, "apply", "-f", manifests)
	e.waitDaemonSet(t, "stasisd")
	at := []string{"stasis", "--host", "unix:///run/stasis/stasisd.sock", "--namespace", "k8s.io"}
	do := func(args ...string) string {
		t.Helper()
		out, err := n.Run(t.Context(), append(slices.Clone(at), args...)...)
		if err != nil {
			t.Errorf("%q: %v, %s", args, err, out)
		}
		return out
	}
	do("check")
	ref := strings.TrimSpace(do("checkpoint", "--pod", pod))
	if list := do("ls"); ref == "" || !strings.Contains(list, ref) {
		t.Errorf("the checkpoint %q is not in %s", ref, list)
	}
	e.Kubectl(t, "exec", pod, "--", "true")
	do("verify", ref)
	do("rm", ref)
	e.Kubectl(t, "delete", "-f", manifests, "--timeout=150s")
	if out, err := n.Run(t.Context(), "rm", "-r", "/var/lib/stasis", "/run/stasisd-config"); err != nil {
		t.Errorf("its state: %v, %s", err, out)
	}
}

// clusterKey makes the key of a cluster, and the public one of another.
func clusterKey(t *testing.T) (private, public string) {
	t.Helper()
	own, other := sign.Dir(filepath.Join(t.TempDir(), "own")), sign.Dir(filepath.Join(t.TempDir(), "other"))
	if _, err := own.Key(); err != nil {
		t.Fatal(err)
	}
	key, err := other.Key()
	if err != nil {
		t.Fatal(err)
	}
	data, err := key.Public()
	if err != nil {
		t.Fatal(err)
	}
	public = filepath.Join(string(other), "other.pub")
	if err := os.WriteFile(public, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return own.KeyPath(), public
}

// without is what is in all and not in others.
func without(all, others []string) []string {
	known := map[string]bool{}
	for _, o := range others {
		known[o] = true
	}
	return slices.DeleteFunc(slices.Clone(all), func(a string) bool { return known[a] })
}

// installerLayer is what image/Dockerfile adds to busybox.
func installerLayer(t *testing.T, root string) string {
	t.Helper()
	shim, err := stack.Shim()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Dir(shim)
	file, err := os.ReadFile(filepath.Join(root, "contrib/kubernetes/image/Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "stasis"), 0o755); err != nil {
		t.Fatal(err)
	}
	copied := 0
	for line := range strings.Lines(string(file)) {
		fields := strings.Fields(line)
		if len(fields) < 3 || fields[0] != "COPY" || fields[len(fields)-1] != "/stasis/" {
			continue
		}
		for _, name := range fields[1 : len(fields)-1] {
			from := filepath.Join(root, name)
			if program, ok := strings.CutPrefix(name, "bin/"); ok {
				from = filepath.Join(bin, program)
			}
			data, err := os.ReadFile(from)
			if err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(from)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "stasis", filepath.Base(name)), data, info.Mode().Perm()); err != nil {
				t.Fatal(err)
			}
			copied++
		}
	}
	if copied == 0 {
		t.Fatal("the Dockerfile copies nothing to /stasis/")
	}
	return dir
}

// waitDaemonSet waits until the one pod of a DaemonSet is ready.
func (e *env) waitDaemonSet(t *testing.T, name string) {
	t.Helper()
	e.Wait(t, "daemonset "+name, func() error {
		ready, err := e.KubectlErr(t.Context(), "-n", "stasis", "get", "daemonset", name,
			"-o", "jsonpath={.status.desiredNumberScheduled} {.status.numberReady}")
		if err == nil && ready != "1 1" {
			err = fmt.Errorf("nodes that should have it, and where it is ready: %s", ready)
		}
		return err
	})
}

// testDocument runs what docs/kubernetes.md tells to run, as it stands there, on a
// node that has nothing of Stasis.
func (e *env) testDocument(t *testing.T) {
	n := e.here
	root := repository(t)
	doc, err := os.ReadFile(filepath.Join(root, "docs/kubernetes.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(doc), "\n## Quick start\n")
	section, _, _ = strings.Cut(section, "\n## ")
	if !ok {
		t.Fatal("docs/kubernetes.md has no such section")
	}
	script := ""
	commands := 0
	for line := range strings.Lines(section) {
		command, ok := strings.CutPrefix(line, "    ")
		if !ok && script != "" {
			break
		} else if !ok {
			continue
		}
		script += command
		if !strings.HasSuffix(command, "\\\n") {
			commands++
		}
	}
	if commands != 10 {
		t.Errorf("these are %d commands:\n%s", commands, script)
	}
	// The image that it names, as if it were pulled.
	n.CRIRootfs(n.Ctx(), "docker.io/library/busybox:1.37", stack.Rootfs("busybox"))
	e.WaitAccount(t)
	cmd := n.Command(t.Context(), "sh", "-eux", "-c", "cd '"+root+"'\n"+script)
	cmd.Env = append(cmd.Env, "KUBECONFIG="+e.Kubeconfig())
	t.Cleanup(func() {
		e.Clean(t, "delete", "pod", "counter", "again", "--ignore-not-found", "--grace-period=1")
		e.Clean(t, "delete", "--ignore-not-found", "-f", filepath.Join(root, "contrib/kubernetes/runtimeclass.yaml"))
	})
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	first, _, _ := strings.Cut(e.Kubectl(t, "logs", "again"), "\n")
	if number(t, first) < 10 {
		t.Errorf("the restored pod has not gone on, but printed %q first:\n%s", first, out)
	}
}

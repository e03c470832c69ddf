package kubernetes

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/console"

	"github.com/stasis-run/stasis/integration/kubernetes/cluster"
)

// patience is how long a test waits, at most, for what takes seconds on an idle machine.
const patience = 3 * time.Minute

// appPod is a pod with one container, app, which runs app/app.py.
const appPod = `apiVersion: v1
kind: Pod
metadata: {name: NAME, labels: {app: NAME}}
spec:
  runtimeClassName: CLASS
  nodeSelector: {kubernetes.io/hostname: NODE}
  terminationGracePeriodSeconds: 20
  containers:
  - name: app
    image: IMAGE
    imagePullPolicy: IfNotPresent
    command: [python3, /app.py]
    env: [{name: NAME, value: app}]
    startupProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 120} # a start takes a while
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1, timeoutSeconds: 10}
    livenessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 5}
    volumeMounts: [{name: host, mountPath: /host}]
  volumes:
  - {name: host, hostPath: {path: /var/lib/host-NAME, type: DirectoryOrCreate}}
`

// testPod does with pods under Stasis what users do with pods.
func (e *env) testPod(t *testing.T) {
	for _, class := range classes {
		t.Run(class, func(t *testing.T) {
			e.Apply(t, render(appPod, "NAME", "pod-"+class, "CLASS", class, "NODE", e.here.Name, "IMAGE", App))
			e.WaitReady(t, "pod-"+class)
			e.WaitLog(t, "pod-"+class, "", "started\n")
			e.checkPod(t, "pod-"+class, e.here)
		})
	}
}

// checkPod checks what users can do with a pod made from appPod, up to its end.
func (e *env) checkPod(t *testing.T, pod string, n *cluster.Node) {
	ctx := t.Context()
	e.checkExec(t, pod)
	e.checkAttach(t, pod)

	get := e.forward(t, pod, 8080)
	one := number(t, get("/count"))
	if two := number(t, get("/count")); two != one+1 {
		t.Errorf("port-forward: the count is %d, then %d", one, two)
	}
	e.Wait(t, "kubectl top", func() error {
		memory, err := e.Summary(ctx, pod, "app")
		if err == nil && memory < 1<<20 {
			err = fmt.Errorf("%d bytes", memory)
		}
		return err
	})

	// An exit code, and a restart; then a probe that fails, and another one.
	before := e.WaitReady(t, pod).Container("app")
	e.Kubectl(t, "exec", pod, "--", "sh", "-c", "echo 42 >/tmp/exit")
	p := e.WaitPod(t, pod, "restarted after it exited", restarted(before))
	if end := p.Container("app").LastState.Terminated; end == nil || end.ExitCode != 42 {
		t.Errorf("after exit code 42, the last state is %+v", end)
	}
	before = p.Container("app")
	e.Kubectl(t, "exec", pod, "--", "touch", "/tmp/sick")
	e.WaitPod(t, pod, "restarted for its probe", restarted(before))
	if log := e.Kubectl(t, "logs", pod, "--previous"); !strings.Contains(log, "asked to end\n") {
		t.Errorf("the log before the restart has no %q:\n%s", "asked to end", log)
	}

	// Graceful termination.
	file := "/var/lib/host-" + pod + "/end-app"
	if _, err := n.Run(ctx, "rm", "-f", file); err != nil {
		t.Fatal(err)
	}
	e.Kubectl(t, "delete", "pod", pod, "--timeout=150s")
	if out, err := n.Run(ctx, "cat", file); err != nil || out != "in good order" {
		t.Errorf("the pod did not end in good order: %q, %v", out, err)
	}
}

func restarted(before cluster.ContainerStatus) func(*cluster.Pod) bool {
	return func(p *cluster.Pod) bool {
		now := p.Container(before.Name)
		return now.RestartCount > before.RestartCount && now.Ready && p.Ready()
	}
}

func (e *env) checkExec(t *testing.T, pod string) {
	t.Helper()
	if out := e.Kubectl(t, "exec", pod, "--", "cat", "/proc/1/cmdline"); !strings.HasPrefix(out, "python3\x00/app.py") {
		t.Errorf("exec: process 1 is %q", out)
	}
	_, err := e.KubectlErr(t.Context(), "exec", pod, "--", "sh", "-c", "exit 7")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("exec of exit 7: %v", err)
	}
	echo := e.Command(t.Context(), "exec", "-i", pod, "--", "sh", "-c", "read line; echo got $line")
	echo.Stdin = strings.NewReader("hello\n")
	if out, err := echo.Output(); err != nil || string(out) != "got hello\n" {
		t.Errorf("exec with stdin: %q, %v", out, err)
	}

	terminal, path, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	if err := terminal.Resize(console.WinSize{Height: 33, Width: 99}); err != nil {
		t.Fatal(err)
	}
	// As in a user's terminal: setsid, so that it is the controlling one.
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	// The size comes after the start.
	const script = `tty; until [ "$(stty size 2>/dev/null)" = "33 99" ]; do sleep 0.05; done; stty size; read line; echo got $line`
	kubectl := e.Command(ctx, "exec", "-it", pod, "--", "sh", "-c", script)
	cmd := exec.CommandContext(ctx, "setsid", append([]string{"--wait", "sh", "-c", `exec "$@" <"$0" >"$0" 2>&1`, path}, kubectl.Args...)...)
	cmd.Env = kubectl.Env
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	io.WriteString(terminal, "hello\n")
	var out strings.Builder
	for r := bufio.NewReader(terminal); !strings.Contains(out.String(), "got hello"); {
		line, err := r.ReadString('\n')
		out.WriteString(line)
		if err != nil {
			t.Errorf("exec -it: %v", err)
			break
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("exec -it: %v", err)
	}
	if !strings.Contains(out.String(), "/dev/pts/0") || !strings.Contains(out.String(), "33 99") {
		t.Errorf("exec -it printed %q, want a terminal of 33 lines, 99 columns", out.String())
	}
}

// checkAttach looks for new lines of the container's in kubectl attach.
func (e *env) checkAttach(t *testing.T, pod string) {
	t.Helper()
	e.follow(t, "attach", pod)
	e.follow(t, "logs", "--follow", "--tail=1", pod)
}

// follow runs a kubectl that prints ticks of the app until it has printed three, one
// after the other.
func (e *env) follow(t *testing.T, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := e.Command(ctx, args...)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cancel()
	last, seen := 0, 0
	for lines := bufio.NewScanner(stdout); seen < 3 && lines.Scan(); {
		text, ok := strings.CutPrefix(lines.Text(), "tick ")
		n, err := strconv.Atoi(text)
		if !ok || err != nil {
			continue
		}
		if last != 0 && n != last+1 {
			t.Errorf("kubectl %v: tick %d after %d", args, n, last)
		}
		last = n
		seen++
	}
	if seen < 3 {
		t.Errorf("kubectl %v printed %d ticks", args, seen)
	}
}

// forward runs kubectl port-forward until the test is over, and returns what asks
// the app through it.
func (e *env) forward(t *testing.T, pod string, port int) func(path string) string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cmd := e.Command(ctx, "port-forward", "pod/"+pod, ":"+strconv.Itoa(port))
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		cmd.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	address, _, ok := strings.Cut(strings.TrimPrefix(line, "Forwarding from "), " ")
	if err != nil || !ok {
		t.Fatalf("kubectl port-forward printed %q, %v", line, err)
	}
	client := &http.Client{Timeout: patience}
	return func(path string) string {
		t.Helper()
		r, err := client.Get("http://" + address + path)
		if err != nil {
			t.Fatalf("through port-forward to %s: %v", pod, err)
		}
		defer r.Body.Close()
		body, err := io.ReadAll(r.Body)
		if err != nil || r.StatusCode != http.StatusOK {
			t.Fatalf("through port-forward to %s: %s: %s: %q, %v", pod, path, r.Status, body, err)
		}
		return string(body)
	}
}

func number(t *testing.T, text string) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

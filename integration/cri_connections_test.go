package integration

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-run/stasis/integration/stack"
)

// TestPodConnections checkpoints a container of a pod while a client has one
// connection to it and waits for another to be accepted, as the kubelet's probes do
// at any moment. Neither is in the checkpoint, and neither is harmed by it.
func TestPodConnections(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{CRI: true})
	ctx := s.Ctx()
	runtime, _ := s.CRI()
	for _, handler := range []string{stack.HandlerStasis, stack.HandlerDropIn} {
		t.Run(handler, func(t *testing.T) {
			p := s.RunPod(ctx, handler, handler)
			id := p.RunContainer(ctx, "server", stack.Python, []string{"python3", "-u", "-c", `
import os, socket, time
server = socket.create_server(("", 9000))
print("ready")
one, _ = server.accept()
print("accepted")
while not os.path.exists("/tmp/go"):
    time.sleep(0.01)
two, _ = server.accept()
for c in one, two:
    c.sendall(b"hello\n")
time.sleep(1000)
`})
			s.Poll(ctx, "the server", func() bool { return strings.Contains(p.Log("server"), "ready") })
			var conns []net.Conn
			for _, after := range []string{"accepted", ""} {
				conn, err := net.Dial("tcp", net.JoinHostPort(p.IP(ctx), "9000"))
				must(t, err)
				defer conn.Close()
				must(t, conn.SetDeadline(time.Now().Add(stack.WaitTimeout())))
				conns = append(conns, conn)
				s.Poll(ctx, "the connection", func() bool { return strings.Contains(p.Log("server"), after) })
			}
			file := filepath.Join(s.Dir, handler+".tar")
			_, err := runtime.CheckpointContainer(ctx, &runtimeapi.CheckpointContainerRequest{ContainerId: id, Location: file})
			must(t, err)
			_, err = s.StasisErr("--namespace", stack.CRINamespace, "checkpoint", id)
			must(t, err)
			p.Exec(ctx, id, "touch", "/tmp/go")
			for i, conn := range conns {
				buf := make([]byte, 16)
				if n, err := conn.Read(buf); err != nil || string(buf[:n]) != "hello\n" {
					t.Errorf("connection %d after the checkpoints: %q, %v", i, buf[:n], err)
				}
			}
			p.Remove(ctx)
		})
	}
	checkTidy(t, s)
}

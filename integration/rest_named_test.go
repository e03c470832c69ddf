package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/client"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/integration/stack"
)

// TestRESTNamed saves containers by the names that Kubernetes has for them, and one without
// a pod by its ID. They run on, unless they are to end, and what is made is of use. One
// under another shim is refused, and runs on.
func TestRESTNamed(t *testing.T) {
	t.Parallel()
	s := stack.Start(t, stack.Options{CRI: true})
	ctx := s.Ctx()
	folders := filepath.Join(s.Dir, "checkpoints")
	must(t, os.Mkdir(folders, 0o700))
	d := s.StartStasisd("--allow-path", folders)
	const root = "/run/containerd/runc/" + stack.CRINamespace

	if status, body := d.Curl("GET", "/list/default", `{"root":"`+root+`"}`); status != 204 || body != "" {
		t.Errorf("list of nothing: %d %s", status, body)
	}
	for _, handler := range []string{stack.HandlerStasis, stack.HandlerRunc} {
		p := s.RunPod(ctx, handler+"-pod", handler)
		id := p.RunContainer(ctx, "app", stack.Busybox, []string{"sh", "-c", "i=0; while :; do i=$((i+1)); echo $i >/n.tmp; mv /n.tmp /n; sleep .1; done"})
		var list []map[string]string
		answer := want(t, d, 200, "GET", "/list/default", `{"root":"`+root+`"}`)
		if err := json.Unmarshal([]byte(answer), &list); err != nil || len(list) != 1 {
			t.Fatalf("list: %s", answer)
		}
		if l := list[0]; l["container_name"] != "app" || l["sandbox_name"] != handler+"-pod" || l["namespace"] != "default" || l["root"] != root ||
			l["container_id"] != id || l["status"] != "running" || !strings.Contains(l["image_ref"], "busybox") {
			t.Errorf("list: %v", l)
		}
		if again := want(t, d, 200, "GET", "/list/default?root="+root, ""); again != answer {
			t.Errorf("list by a parameter: %s, by a body: %s", again, answer)
		}
		dir := filepath.Join(folders, handler)
		list[0]["checkpoint_path"] = dir
		data, err := json.Marshal(map[string]any{"checkpoint_data": list[0]})
		must(t, err)
		if handler == stack.HandlerRunc {
			want(t, d, 501, "POST", "/checkpoint", string(data))
			before := p.Exec(ctx, id, "cat", "/n")
			s.Poll(ctx, "the container to go on", func() bool { return p.Exec(ctx, id, "cat", "/n") != before })
			if left, _ := filepath.Glob(dir + "*"); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
			p.Remove(ctx)
			continue
		}
		answer = want(t, d, 200, "POST", "/checkpoint", string(data))
		if !strings.Contains(answer, fmt.Sprintf(`"container_id":%q`, id)) {
			t.Errorf("checkpoint: %s", answer)
		}
		if _, err := os.Stat(filepath.Join(dir, layout.Inventory)); err != nil {
			t.Error(err)
		}
		if answer := want(t, d, 409, "POST", "/checkpoint", string(data)); !strings.Contains(answer, "is there") {
			t.Errorf("into the same folder: %s", answer)
		}
		// Its files alone, and both of one moment.
		p.Exec(ctx, id, "sh", "-c", "echo kept >/file")
		names := fmt.Sprintf(`"container_name":"app","sandbox_name":%q,"namespace":"default"`, handler+"-pod")
		files, both := "stasis.test/"+handler+"-files:1", "stasis.test/"+handler+"-both:1"
		filesBody := fmt.Sprintf(`{%s,"image_ref":%q,"root":%q,"address":%q}`, names, files, root, s.Address())
		bothBody := func(ref string, leave bool) string {
			return fmt.Sprintf(`{"checkpoint_data":{%s,"checkpoint_path":%q},"rootfs_checkpoint_data":{%s,"image_ref":%q},"leave_running":%t}`,
				names, dir+"-"+strings.ReplaceAll(ref, "/", "-"), names, ref, leave)
		}
		images := []string{both, files}
		if answer := want(t, d, 200, "POST", "/checkpoint/rootfs", filesBody); !strings.Contains(answer, `"image_ref":"`+files+`"`) {
			t.Errorf("files: %s", answer)
		}
		want(t, d, 200, "POST", "/checkpoint/rootfs", filesBody) // in its place
		want(t, d, 400, "POST", "/checkpoint/rootfs", strings.Replace(filesBody, files, files+"@sha256:"+strings.Repeat("0", 64), 1))
		want(t, d, 200, "POST", "/containerd/checkpoint", bothBody(both, true))
		if answer := want(t, d, 409, "POST", "/containerd/checkpoint", bothBody(stack.Busybox, true)); !strings.Contains(answer, "choose another name") {
			t.Errorf("in place of another image: %s", answer)
		}
		if left, _ := filepath.Glob(dir + "-*"); len(left) != 1 {
			t.Errorf("folders %q", left)
		}
		for _, image := range images {
			fresh := s.RunPod(ctx, "fresh", handler)
			app := fresh.RunContainer(ctx, "app", image, []string{"sleep", "1000"})
			if out := fresh.Exec(ctx, app, "sh", "-c", "cat /file; test -s /n && ls /etc/passwd"); out != "kept\n/etc/passwd\n" {
				t.Errorf("%s has %q", image, out)
			}
			if image == files {
				// What it writes is relative to the image that it was made from, which
				// only CRI's name is left of by then.
				names := `"container_name":"app","sandbox_name":"fresh","namespace":"default"`
				want(t, d, 200, "POST", "/checkpoint/rootfs", fmt.Sprintf(`{%s,"image_ref":%q}`, names, files))
				want(t, d, 200, "POST", "/checkpoint/rootfs", fmt.Sprintf(`{%s,"image_ref":%q}`, names, files))
			}
			fresh.Remove(ctx)
		}
		before := p.Exec(ctx, id, "cat", "/n")
		s.Poll(ctx, "the container to go on", func() bool { return p.Exec(ctx, id, "cat", "/n") != before })
		want(t, d, 200, "POST", "/containerd/checkpoint", bothBody("stasis.test/"+handler+"-end:1", false))
		s.Poll(ctx, "the container to end", func() bool { return p.Status(ctx, id).State == runtimeapi.ContainerState_CONTAINER_EXITED })
		p.Remove(ctx)
	}

	// Without a pod, and its checkpoint comes back.
	c := s.NewContainer(ctx, "c", stack.Busybox, stack.Args("sh", "-c", "echo ready; while :; do sleep 1000 & wait; done"))
	c.Start(ctx)
	c.Stdout.WaitFor(ctx, "ready")
	dir := filepath.Join(folders, "c")
	body := fmt.Sprintf(`{"checkpoint_data":{"container_name":"c","checkpoint_path":%q,"root":"/run/containerd/runc/%s"}}`, dir, s.Namespace)
	want(t, d, 200, "POST", "/checkpoint", body)
	if status := c.Status(ctx); status != client.Running {
		t.Errorf("the container is %s", status)
	}
	c.Kill(ctx, syscall.SIGKILL)
	c.DeleteTask(ctx)
	if status, answer := d.Curl("POST", "/checkpoint", strings.Replace(body, "/c\"", "/e\"", 1)); status != 404 || !strings.Contains(answer, `{"message":"`) {
		t.Errorf("of a container that has ended: %d %s", status, answer)
	}
	c.Restore(ctx, dir)
	c.Kill(ctx, syscall.SIGKILL)
	c.Delete(ctx)
	for _, refused := range []struct {
		status int
		body   string
	}{
		{403, `{"checkpoint_data":{"container_name":"c","checkpoint_path":"/etc/x"}}`},
		{403, fmt.Sprintf(`{"checkpoint_data":{"container_name":"c","checkpoint_path":%q}}`, folders+"/../x")},
		{404, fmt.Sprintf(`{"checkpoint_data":{"container_name":"none","sandbox_name":"p","namespace":"default","checkpoint_path":%q}}`, folders+"/x")},
	} {
		want(t, d, refused.status, "POST", "/checkpoint", refused.body)
	}
}

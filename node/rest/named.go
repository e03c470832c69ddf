package rest

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/node"
)

// The node interface of Cedana 0.9, as far as it is served: it calls containers by the
// names that Kubernetes gives them, and says where they are by the state folder of runc.
// Errors are {"message"}.

// namedRoutes adds it to mux.
func (s *server) namedRoutes(mux *http.ServeMux) {
	handle := func(pattern string, scope Scope, mutates bool, serve func(http.ResponseWriter, *http.Request) error) {
		mux.Handle(pattern, s.route(route{scope: scope, mutates: mutates, fail: failMessage}, serve))
	}
	handle("GET /list/{namespace}", ScopeRead, false, s.listNamed)
	handle("POST /checkpoint", ScopeCheckpoint, true, s.checkpointNamed)
	handle("POST /checkpoint/rootfs", ScopeCheckpoint, true, s.rootfsNamed)
	handle("POST /containerd/checkpoint", ScopeCheckpoint, true, s.bothNamed)
}

// failMessage answers with an error as this interface has it.
func failMessage(w http.ResponseWriter, status int, err error) {
	data, merr := json.Marshal(map[string]string{"message": err.Error()})
	if merr != nil {
		failPlain(w, status, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(data, '\n'))
}

// checkpointData names a container, and where its checkpoint is.
type checkpointData struct {
	CheckpointPath string `json:"checkpoint_path"`
	ContainerName  string `json:"container_name"`
	Namespace      string `json:"namespace"`
	Root           string `json:"root"`
	SandboxName    string `json:"sandbox_name"`
}

// runcRoot is where containerd's shims have runc keep its state, a folder for each
// namespace of containerd's.
const runcRoot = "/run/containerd/runc"

// inRoot returns the context for the containers of a state folder of runc, if the caller
// may do that with them.
func (s *server) inRoot(ctx context.Context, root string, scope Scope) (context.Context, error) {
	if root == "" {
		root = runcRoot + "/k8s.io"
	}
	dir, namespace := path.Split(path.Clean(root))
	if path.Clean(dir) != runcRoot || identifiers.Validate(namespace) != nil {
		return nil, badRequest{fmt.Errorf("root %q: it is %s/NAMESPACE, of a container that containerd runs", root, runcRoot)}
	}
	if who := callerIn(ctx); !who.may(scope, namespace) {
		return nil, fault.New(errdefs.ErrPermissionDenied, "%s may not: it needs scope %s in namespace %s", who.name, scope, namespace)
	}
	return namespaces.WithNamespace(ctx, namespace), nil
}

// listedContainer is a container that can be checkpointed: with a path it is a
// checkpointData.
type listedContainer struct {
	ContainerName string `json:"container_name"`
	SandboxName   string `json:"sandbox_name"`
	Namespace     string `json:"namespace"`
	Root          string `json:"root"`
	ContainerID   string `json:"container_id"`
	ImageRef      string `json:"image_ref"`
	Status        string `json:"status"`
}

func (s *server) listNamed(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Root string `json:"root"`
	}
	if err := decode(r, &body, true); err != nil {
		return err
	}
	if root := r.URL.Query().Get("root"); root != "" {
		body.Root = root
	}
	ctx, err := s.inRoot(r.Context(), body.Root, ScopeRead)
	if err != nil {
		return err
	}
	all, err := s.o.Node.Running(ctx)
	if err != nil {
		return err
	}
	namespace := r.PathValue("namespace")
	found := []listedContainer{}
	for _, c := range all {
		l := listedContainer{ContainerName: c.Name, Namespace: namespace, Root: path.Join(runcRoot, namespaceOf(ctx)),
			ContainerID: c.ID, ImageRef: c.Image, Status: c.Status}
		switch {
		case c.Pod != nil && c.Pod.Namespace == namespace:
			l.SandboxName = c.Pod.Name
		case c.Pod != nil || namespace != namespaceOf(ctx):
			continue // without a pod, it is in containerd's namespace only
		}
		found = append(found, l)
	}
	if len(found) == 0 {
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	return answerJSON(w, found)
}

func (s *server) checkpointNamed(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Data checkpointData `json:"checkpoint_data"`
	}
	if err := decode(r, &body, false); err != nil {
		return err
	}
	if body.Data.CheckpointPath == "" {
		return badRequest{errors.New("checkpoint_data needs a checkpoint_path")}
	}
	return s.saveNamed(w, r, body.Data, "", false)
}

// rootfsData names a container, and the image that its root filesystem becomes.
type rootfsData struct {
	Address       string `json:"address"`
	ContainerName string `json:"container_name"`
	ImageRef      string `json:"image_ref"`
	Namespace     string `json:"namespace"`
	Root          string `json:"root"`
	SandboxName   string `json:"sandbox_name"`
}

// check refuses another containerd than ours, and no image.
func (d rootfsData) check(address string) error {
	if d.ImageRef == "" {
		return badRequest{errors.New("image_ref is empty")}
	}
	if d.Address != "" && strings.TrimPrefix(d.Address, "unix://") != strings.TrimPrefix(address, "unix://") {
		return fault.New(errdefs.ErrPermissionDenied, "address %q is not the containerd that stasisd is configured to use", d.Address)
	}
	return nil
}

func (s *server) rootfsNamed(w http.ResponseWriter, r *http.Request) error {
	var d rootfsData
	if err := decode(r, &d, false); err != nil {
		return err
	}
	if err := d.check(s.o.Address); err != nil {
		return err
	}
	return s.saveNamed(w, r, checkpointData{ContainerName: d.ContainerName, Namespace: d.Namespace, Root: d.Root, SandboxName: d.SandboxName}, d.ImageRef, false)
}

func (s *server) bothNamed(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		Data         checkpointData `json:"checkpoint_data"`
		Rootfs       rootfsData     `json:"rootfs_checkpoint_data"`
		LeaveRunning bool           `json:"leave_running"`
		Root         string         `json:"root"`
	}
	if err := decode(r, &body, false); err != nil {
		return err
	}
	d := body.Data
	for _, same := range []struct {
		field  string
		to     *string
		others []string
	}{
		{"container_name", &d.ContainerName, []string{body.Rootfs.ContainerName}},
		{"sandbox_name", &d.SandboxName, []string{body.Rootfs.SandboxName}},
		{"namespace", &d.Namespace, []string{body.Rootfs.Namespace}},
		{"root", &d.Root, []string{body.Rootfs.Root, body.Root}},
	} {
		for _, other := range same.others {
			if other != "" && *same.to != "" && other != *same.to {
				return badRequest{fmt.Errorf("%s is %q in one place, and %q in another", same.field, *same.to, other)}
			}
			*same.to = cmp.Or(*same.to, other)
		}
	}
	if d.CheckpointPath == "" {
		return badRequest{errors.New("checkpoint_data needs a checkpoint_path")}
	}
	if err := body.Rootfs.check(s.o.Address); err != nil {
		return err
	}
	return s.saveNamed(w, r, d, body.Rootfs.ImageRef, !body.LeaveRunning)
}

// saveNamed saves a container: its processes in a folder, if there is a path, its files as
// an image, if that has a name.
func (s *server) saveNamed(w http.ResponseWriter, r *http.Request, d checkpointData, image string, exit bool) error {
	if d.ContainerName == "" {
		return badRequest{errors.New("container_name is empty")}
	}
	ctx, err := s.inRoot(r.Context(), d.Root, ScopeCheckpoint)
	if err != nil {
		return err
	}
	request := node.FolderRequest{Rootfs: image, Exit: exit}
	// It can be what pods run, as what is imported.
	if who := callerIn(ctx); image != "" && !who.may(ScopeRestore, namespaceOf(ctx)) {
		return fault.New(errdefs.ErrPermissionDenied, "%s may not: to make an image needs scope %s in namespace %s, too", who.name, ScopeRestore, namespaceOf(ctx))
	}
	if d.CheckpointPath != "" {
		if request.Dir, err = s.paths.folder("checkpoint_path", d.CheckpointPath); err != nil {
			return err
		}
	}
	if request.Container, err = s.o.Node.Find(ctx, node.Named{Namespace: d.Namespace, Pod: d.SandboxName, Container: d.ContainerName}); err != nil {
		return err
	}
	started := time.Now()
	result, err := s.o.Node.CheckpointFolder(ctx, request)
	s.metrics.observe("checkpoint", started, err)
	s.o.Log.Info("audit", "who", callerIn(ctx).name, "checkpoint", request.Container, "namespace", namespaceOf(ctx), "folder", request.Dir, "image", image, "exit", exit, "succeeded", err == nil)
	if err != nil {
		return err
	}
	s.metrics.checkpointed([]node.CheckpointResult{{Frozen: result.Frozen, ImageBytes: result.ImageBytes, LayerBytes: result.LayerBytes}})
	answer := savedNamed{Message: cmp.Or(result.Note, "checkpointed"), CheckpointPath: d.CheckpointPath, ContainerID: request.Container}
	if result.Rootfs != nil {
		answer.ImageRef, answer.Digest = result.Rootfs.Ref, result.Rootfs.Digest
	}
	return answerJSON(w, answer)
}

// savedNamed is the answer to what saves a container.
type savedNamed struct {
	Message        string `json:"message"`
	CheckpointPath string `json:"checkpoint_path,omitempty"`
	ContainerID    string `json:"container_id"`
	ImageRef       string `json:"image_ref,omitempty"`
	Digest         string `json:"digest,omitempty"`
}

package rest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path"
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
	d := body.Data
	if d.ContainerName == "" || d.CheckpointPath == "" {
		return badRequest{errors.New("checkpoint_data needs container_name and checkpoint_path")}
	}
	ctx, err := s.inRoot(r.Context(), d.Root, ScopeCheckpoint)
	if err != nil {
		return err
	}
	dir, err := s.paths.folder("checkpoint_path", d.CheckpointPath)
	if err != nil {
		return err
	}
	id, err := s.o.Node.Find(ctx, node.Named{Namespace: d.Namespace, Pod: d.SandboxName, Container: d.ContainerName})
	if err != nil {
		return err
	}
	started := time.Now()
	result, err := s.o.Node.CheckpointFolder(ctx, node.FolderRequest{Container: id, Dir: dir})
	s.metrics.observe("checkpoint", started, err)
	if err != nil {
		return err
	}
	s.metrics.checkpointed([]node.CheckpointResult{*result})
	return answerJSON(w, struct {
		Message        string `json:"message"`
		CheckpointPath string `json:"checkpoint_path"`
		ContainerID    string `json:"container_id"`
	}{"checkpointed", d.CheckpointPath, id})
}

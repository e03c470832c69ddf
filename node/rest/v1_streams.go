package rest

import (
	"errors"
	"io"
	"net/http"
	"reflect"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/stasis-run/stasis/node"
	"github.com/stasis-run/stasis/node/rest/v1"
)

// v1Streams adds what sends or takes a checkpoint as a file. huma describes them, and does
// not handle them: it would read all of a body first.
func (s *server) v1Streams(api huma.API, m *v1Mux) {
	query := func(name, doc string, enum ...any) *huma.Param {
		return &huma.Param{Name: name, In: "query", Description: doc, Schema: &huma.Schema{Type: "string", Enum: enum}}
	}
	namespace := query("namespace", "containerd's namespace, default without it")
	file := map[string]*huma.MediaType{"application/octet-stream": {Schema: &huma.Schema{Type: "string", Format: "binary"}}}
	add := func(op *huma.Operation, scope Scope, mutates bool, serve func(http.ResponseWriter, *http.Request) error) {
		op.Parameters = append(op.Parameters, namespace)
		op.Extensions = map[string]any{"x-scope": scope}
		api.OpenAPI().AddOperation(op)
		m.Handle(op.Method+" "+op.Path, s.route(route{scope: scope, namespace: namespaceIn, mutates: mutates, fail: failProblem, stream: true}, serve))
	}
	add(&huma.Operation{OperationID: "exportCheckpoint", Method: "GET", Path: "/v1/checkpoints/{ref}/export",
		Summary: "Read a checkpoint as a file",
		Parameters: []*huma.Param{
			{Name: "ref", In: "path", Required: true, Description: "the image, with %2F for each slash", Schema: &huma.Schema{Type: "string"}},
			query("format", "archive, that of Podman, CRI-O and the kubelet, is the default; oci is the image as it is", node.FormatArchive, node.FormatOCI),
			query("compression", "of an archive; zstd is the default", "zstd", "gzip", "none"),
		},
		Responses: map[string]*huma.Response{"200": {Description: "The file. A connection that ends before the last chunk says that it is not whole.", Content: file}},
	}, ScopeCheckpoint, false, s.export)
	add(&huma.Operation{OperationID: "importCheckpoint", Method: "POST", Path: "/v1/imports",
		Summary:     "Make images of a file: an archive of Podman, CRI-O or the kubelet, or an OCI image, compressed or not",
		Parameters:  []*huma.Param{query("ref", "the image's name, which replaces a checkpoint of that name; without it, the name in the file, or one of its own")},
		RequestBody: &huma.RequestBody{Required: true, Content: file},
		Responses: map[string]*huma.Response{"201": {Description: "The images", Content: map[string]*huma.MediaType{
			"application/json": {Schema: huma.SchemaFromType(api.OpenAPI().Components.Schemas, reflect.TypeFor[v1.ImageList]())}}}},
	}, ScopeRestore, true, s.importFile)
}

func (s *server) export(w http.ResponseWriter, r *http.Request) error {
	q := r.URL.Query()
	out := &begun{Writer: w}
	w.Header().Set("Content-Type", "application/octet-stream")
	err := s.o.Node.Export(r.Context(), node.ExportRequest{
		Checkpoint: r.PathValue("ref"), Format: q.Get("format"), Compression: q.Get("compression"),
		Output: node.Output{Path: "the answer", Writer: out},
	})
	if err == nil || !out.yes {
		return err
	}
	s.o.Log.Warn(r.Method + " " + r.URL.Path + ": " + err.Error())
	panic(http.ErrAbortHandler) // else the client takes it for whole
}

// begun notes that something was written.
type begun struct {
	io.Writer
	yes bool
}

func (b *begun) Write(p []byte) (int, error) {
	b.yes = true
	return b.Writer.Write(p)
}

func (s *server) importFile(w http.ResponseWriter, r *http.Request) error {
	rc := http.NewResponseController(w)
	// What reads the body is done when Import returns, so the deadline is of no use then.
	defer func() { _ = rc.SetReadDeadline(time.Time{}) }()
	got, err := s.o.Node.Import(r.Context(), node.ImportRequest{Reader: &deadlineReader{r.Body, rc}, Ref: r.URL.Query().Get("ref")})
	if err != nil {
		// What is left of the body is nobody's any more.
		w.Header().Set("Connection", "close")
		return err
	}
	list := v1.ImageList{Items: []v1.Image{}, OCI: got.OCI}
	for _, img := range got.Images {
		list.Items = append(list.Items, v1.Image(img))
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	return answerJSON(w, list)
}

// deadlineReader gives the client some time for each part.
type deadlineReader struct {
	r  io.Reader
	rc *http.ResponseController
}

func (d *deadlineReader) Read(p []byte) (int, error) {
	if err := d.rc.SetReadDeadline(time.Now().Add(streamTime)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return 0, err
	}
	return d.r.Read(p)
}

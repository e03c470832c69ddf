// Package kubernetes tests Stasis under a real Kubernetes: unmodified API server,
// scheduler, controllers, kubelets and containerd. One cluster serves all of it.
package kubernetes

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stasis-run/stasis/integration/kubernetes/cluster"
	"github.com/stasis-run/stasis/integration/stack"
)

// An env is what the tests share.
type env struct {
	*cluster.Cluster
	registry string        // host and port
	here     *cluster.Node // where pods are checkpointed
	there    *cluster.Node
	pushed   int // checkpoints in the registry
}

// App is the image with app/app.py.
const App = "stasis.test/app:latest"

// classes are the RuntimeClasses of the two kinds of runtime entry.
var classes = []string{"stasis", "stasis-own"}

// TestKubernetes runs the tests of all files here. What they make in the cluster,
// they delete.
func TestKubernetes(t *testing.T) {
	e := &env{Cluster: cluster.Start(t)}
	e.here = e.Nodes[0]

	t.Run("Installer", e.testInstaller)
	t.Run("Document", e.testDocument)

	e.there = e.AddNode(t)
	e.registry = e.StartRegistry(t)
	for _, n := range e.Nodes {
		e.prepare(t, n)
	}
	e.trustEachOther(t)
	for _, class := range classes {
		e.Apply(t, "apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: "+class+"}\nhandler: "+class+"\n")
	}
	e.WaitAccount(t)
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"Pod", e.testPod},
		{"Archive", e.testArchive},
		{"Restore", e.testRestore},
		{"Fresh", e.testFresh},
		{"Workloads", e.testWorkloads},
		{"Owners", e.testOwners},
		{"Together", e.testTogether},
		{"Volumes", e.testVolumes},
		{"Failures", e.testFailures},
		{"Annotations", e.testAnnotations},
	} {
		t.Run(test.name, test.run)
	}
}

// prepare installs Stasis on a node, under both kinds of runtime entry, and what
// pods run.
func (e *env) prepare(t *testing.T, n *cluster.Node) {
	t.Helper()
	n.Install(t)
	for _, name := range []string{stack.Busybox, stack.Redis, stack.Nginx} {
		n.CRIImage(n.Ctx(), name)
	}
	app, err := filepath.Abs("app")
	if err != nil {
		t.Fatal(err)
	}
	n.CRIRootfs(n.Ctx(), App, stack.Rootfs("python"), app)
}

// trustEachOther has each node trust what the others sign, so that pods restore on any
// of them.
func (e *env) trustEachOther(t *testing.T) {
	t.Helper()
	for _, n := range e.Nodes {
		for _, command := range []string{"init", "show"} {
			public, err := n.Run(t.Context(), "stasis", "key", command)
			if err != nil {
				t.Fatal(err)
			}
			for _, other := range e.Nodes {
				if command == "show" && other != n {
					other.WriteFile(t, "/etc/stasis/trusted/"+n.Name+".pub", public)
				}
			}
		}
	}
}

// render puts values in the place of names: "NAME", value, and so on.
func render(manifest string, pairs ...string) string {
	return strings.NewReplacer(pairs...).Replace(manifest)
}

// repository is the checkout that the tests are in.
func repository(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err == nil {
		_, err = os.Stat(filepath.Join(dir, "contrib/kubernetes"))
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

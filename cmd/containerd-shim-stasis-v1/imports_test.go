package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/stasis-run/stasis/"

// layers are our packages from the top down. A package may import those below
// it, and no other.
var layers = []string{
	"cmd/containerd-shim-stasis-v1", "cmd/stasis", "cmd/stasisd", "node/rest", "node/rest/v1", "node", "shim", "task",
	"checkpoint/oci", "checkpoint/contentstore", "checkpoint/archive", "checkpoint/inspect", "checkpoint/policy", "checkpoint/policy/allow", "checkpoint/policy/seccomp", "checkpoint/criu", "checkpoint", "checkpoint/criu/img",
	"checkpoint/rootfs", "checkpoint/sign", "checkpoint/sum", "checkpoint/tarcheck", "checkpoint/capture", "checkpoint/fault", "checkpoint/layout", "checkpoint/api", "checkpoint/criu/standin", "process",
}

// heavy must not come into the shim, of which one runs for every pod. Each
// reason is what we would have to do without.
var heavy = map[string]string{
	"google.golang.org/grpc/internal/transport":    "a gRPC server or client; api/runtime/task/v3 brings it",
	"github.com/containerd/containerd/v2/client":   "containerd's client belongs to the command line",
	"github.com/containerd/containerd/v2/cmd":      "another shim's code is not ours to build on",
	"github.com/containerd/containerd/v2/pkg/shim": "it starts under containerd 2.3 and later only",
	"k8s.io":   "Kubernetes belongs to the tests",
	"net/http": "nothing in the shim speaks HTTP",
}

func list(t *testing.T, args ...string) []string {
	t.Helper()
	out, err := exec.Command("go", append([]string{"list"}, args...)...).Output()
	if err != nil {
		t.Fatalf("go list %v: %v", args, err)
	}
	return strings.Fields(string(out))
}

func TestImportsPointDown(t *testing.T) {
	for i, pkg := range layers {
		for _, imported := range list(t, "-f", "{{join .Imports \"\\n\"}}", module+pkg) {
			name, ours := strings.CutPrefix(imported, module)
			if !ours {
				continue
			}
			if below := slices.Index(layers, name); below <= i {
				t.Errorf("%s imports %s, which is not below it", pkg, name)
			}
		}
	}
}

// TestCheckpointIsALibrary: each package of a checkpoint has its place in layers, and
// knows nothing of a shim, a node or a program.
func TestCheckpointIsALibrary(t *testing.T) {
	above := map[string]string{}
	for _, pkg := range []string{"cmd", "node", "shim", "task"} {
		above[module+pkg] = "it uses checkpoints"
	}
	for _, pkg := range list(t, module+"checkpoint/...") {
		refuse(t, pkg, above)
		if name := strings.TrimPrefix(pkg, module); !slices.Contains(layers, name) && !strings.HasSuffix(name, "test") {
			t.Errorf("%s is in no layer", name)
		}
	}
}

func TestTheShimIsLight(t *testing.T) { refuse(t, module+"cmd/containerd-shim-stasis-v1", heavy) }

// TestTheStandInIsEarly: what the stand-in for CRIU imports is initialized before it, and
// the runtime waits for that.
func TestTheStandInIsEarly(t *testing.T) {
	imports := list(t, "-f", "{{join .Imports \"\\n\"}}", module+"checkpoint/criu/standin")
	if want := []string{"errors", "fmt", "os", "path", "strconv", "strings", "syscall"}; !slices.Equal(imports, want) {
		t.Errorf("it imports %q, want %q; look with GODEBUG=inittrace=1 what others cost", imports, want)
	}
}

// TestNodeIsALibrary: a daemon, a controller or a test may use package node, and what
// serves it by HTTP.
func TestNodeIsALibrary(t *testing.T) {
	for _, pkg := range []string{"node", "node/rest"} {
		refuse(t, module+pkg, map[string]string{
			"github.com/spf13/cobra":    "command lines belong to cmd",
			"github.com/vbauerster/mpb": "progress is a callback",
			"golang.org/x/term":         "terminals belong to cmd",
			module + "shim":             "node speaks to a shim by its API",
			module + "task":             "node speaks to a shim by its API",
		})
		// containerd's client has these itself.
		imports := list(t, "-f", "{{join .Imports \"\\n\"}}", module+pkg)
		for _, imported := range []string{"os/signal", "github.com/containerd/console"} {
			if slices.Contains(imports, imported) {
				t.Errorf("%s imports %s, which belongs to cmd", pkg, imported)
			}
		}
	}
}

// TestTheClientIsLight: a client of stasisd needs neither containerd's client nor the
// server's libraries.
func TestTheClientIsLight(t *testing.T) {
	refuse(t, module+"node/rest/v1", map[string]string{
		"github.com/containerd/containerd/v2": "a client needs no containerd",
		"github.com/danielgtaylor/huma":       "it serves",
		module + "checkpoint":                 "a client needs no checkpoints",
		"github.com/prometheus/client_golang": "it serves",
		"google.golang.org/grpc":              "a client speaks HTTP",
	})
}

// refuse checks that a package does not depend on what has one of these prefixes, for the
// reason that comes with each.
func refuse(t *testing.T, pkg string, prefixes map[string]string) {
	t.Helper()
	for _, dep := range list(t, "-deps", pkg) {
		for prefix, why := range prefixes {
			if dep == prefix || strings.HasPrefix(dep, prefix+"/") {
				t.Errorf("%s imports %s: %s", pkg, dep, why)
			}
		}
	}
}

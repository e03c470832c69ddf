package shim

import (
	"fmt"
	"path/filepath"
	"strings"

	bootstrapapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// bootstrap is what containerd says when it starts a shim, whichever way it
// says so.
//
//	containerd    asks by                            is answered by
//	1.6, 1.7,     flags and environment; runtime     the bare address
//	2.0 to 2.2    options (or nothing) on stdin
//	2.3 and on    BootstrapParams on stdin           BootstrapResult
//
// Before 2.3 nothing tells the versions apart but MAX_SHIM_VERSION: absent in
// 1.6, and 2 in all others, also in those that know version 3 of the Task API,
// while 1.7 refuses a shim that answers 3. All of them, and CRI-O's VM
// runtime, take a bare address for version 2 over ttrpc. The JSON that 1.7
// added can say no more than that, and 1.6 would take it for the address.
type bootstrap struct {
	// protobuf is how to answer.
	protobuf bool
	// address is containerd's gRPC socket. Only the group's socket address is
	// derived from it.
	address string
	// ttrpcAddress is where containerd takes events.
	ttrpcAddress string
	// socketDir is where the shims' sockets are.
	socketDir string
	debug     bool
	// options are the runtime options, or nil.
	options *anypb.Any
}

const defaultSocketDir = "/run/containerd/s"

// parseBootstrap reads containerd's request. Its inputs are all that a start
// may depend on.
func parseBootstrap(f flags, stdin []byte, getenv func(string) string) (bootstrap, error) {
	b := bootstrap{
		address:      f.address,
		ttrpcAddress: getenv("TTRPC_ADDRESS"),
		socketDir:    defaultSocketDir,
		debug:        f.debug,
	}
	if b.address == "" {
		b.address = getenv("GRPC_ADDRESS")
	}

	params := &bootstrapapi.BootstrapParams{}
	// Options in an Any can decode as BootstrapParams, whose first two fields
	// have the same types: only the names tell them apart.
	if len(stdin) > 0 && proto.Unmarshal(stdin, params) == nil &&
		params.GetInstanceID() == f.id && params.GetNamespace() == f.namespace {
		b.protobuf = true
		if a := params.GetContainerdGrpcAddress(); a != "" {
			b.address = a
		}
		if a := params.GetContainerdTtrpcAddress(); a != "" {
			b.ttrpcAddress = a
		}
		if d := params.GetSocketDir(); d != "" {
			b.socketDir = d
		}
		b.debug = b.debug || params.GetLogLevel() <= bootstrapapi.LogLevel_LOG_LEVEL_DEBUG
		for _, e := range params.GetExtensions() {
			if isOptions(e.GetValue()) {
				b.options = e.GetValue()
				break
			}
		}
	} else if len(stdin) > 0 {
		opts := &anypb.Any{}
		// Parameters for another container would decode as well, and leave
		// fields over.
		if err := proto.Unmarshal(stdin, opts); err != nil || opts.GetTypeUrl() == "" || len(opts.ProtoReflect().GetUnknown()) > 0 {
			return bootstrap{}, fmt.Errorf("standard input holds neither bootstrap parameters for this container nor runtime options: "+
				"was the shim started by containerd, and with matching -id and -namespace? (%d bytes)", len(stdin))
		}
		// Options of a type unknown here are for Create to refuse.
		if isOptions(opts) {
			b.options = opts
		}
	}

	if b.ttrpcAddress == "" && b.address != "" {
		// Where containerd puts it unless configured otherwise.
		b.ttrpcAddress = b.address + ".ttrpc"
	}
	if !filepath.IsAbs(b.socketDir) {
		return bootstrap{}, fmt.Errorf("socket directory %q is not an absolute path: set socket_dir of containerd's shim manager to one", b.socketDir)
	}
	return b, nil
}

// isOptions tells whether the options are of a type that a runc-like runtime
// is given: runc's own, or CRI's generic one.
func isOptions(a *anypb.Any) bool {
	_, name, ok := strings.Cut(a.GetTypeUrl(), "/")
	if !ok {
		name = a.GetTypeUrl()
	}
	return name == "containerd.runc.v1.Options" || name == "runtimeoptions.v1.Options"
}

// answer is what to print for containerd to find the shim.
func (b bootstrap) answer(address string) ([]byte, error) {
	if !b.protobuf {
		return []byte(address), nil
	}
	return proto.Marshal(&bootstrapapi.BootstrapResult{
		Version:  3,
		Address:  address,
		Protocol: "ttrpc",
	})
}

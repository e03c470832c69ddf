package task

import (
	"os"
	"path/filepath"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/process"
)

// maxConfig bounds the options' TOML, in bytes.
const maxConfig = 1 << 20

// DecodeOptions reads a task's runtime options: containerd.runc.v1.Options, or
// runtimeoptions.v1.Options, which is what CRI makes of the options of a
// runtime it does not know: TOML, or the path of a file of it, with the names of
// the former's fields. None at all are the defaults. Errors are
// errdefs.ErrInvalidArgument.
func DecodeOptions(any *anypb.Any) (*options.Options, error) {
	opts, _, err := decodeOptions(any)
	return opts, err
}

// decodeOptions is DecodeOptions with what only Stasis has: the path of the node's
// configuration, empty for the default one.
func decodeOptions(any *anypb.Any) (_ *options.Options, nodeConfig string, _ error) {
	if any.GetTypeUrl() == "" && len(any.GetValue()) == 0 {
		return &options.Options{}, "", nil
	}
	v, err := typeurl.UnmarshalAny(any)
	if err != nil {
		return nil, "", invalid("options of type %q: %v", any.GetTypeUrl(), err)
	}
	switch v := v.(type) {
	case *options.Options:
		return v, "", nil
	case *runtimeoptions.Options:
		return decodeTOMLOptions(v)
	}
	return nil, "", invalid("options of type %q: want containerd.runc.v1.Options or runtimeoptions.v1.Options", any.GetTypeUrl())
}

// tomlOptions are the options as CRI's configuration spells them, in
// [plugins.….runtimes.NAME.options].
type tomlOptions struct {
	NoPivotRoot   bool
	NoNewKeyring  bool
	ShimCgroup    string
	IoUid         uint32
	IoGid         uint32
	BinaryName    string
	Root          string
	SystemdCgroup bool
	CriuImagePath string
	CriuWorkPath  string

	CriuPath string // of containerd 1.x; runc has ignored it since 1.1

	// StasisConfig is the path of the node's configuration; see nodeConfig.
	StasisConfig string

	// CRI's own keys, which it leaves in.
	TypeUrl    string
	ConfigPath string
	ConfigBody string
}

func decodeTOMLOptions(o *runtimeoptions.Options) (_ *options.Options, nodeConfig string, _ error) {
	body, from := o.GetConfigBody(), "config_body"
	if path := o.GetConfigPath(); path != "" {
		from = path
		var err error
		if body, err = readConfig(path); err != nil {
			return nil, "", invalid("options: config_path: %v", err)
		}
	}
	var t tomlOptions
	if err := decodeTOML(body, &t); err != nil {
		return nil, "", invalid("options: %s: %v", from, err)
	}
	if t.StasisConfig != "" && !filepath.IsAbs(t.StasisConfig) {
		return nil, "", invalid("options: %s: StasisConfig %q is not an absolute path", from, t.StasisConfig)
	}
	return &options.Options{
		NoPivotRoot:   t.NoPivotRoot,
		NoNewKeyring:  t.NoNewKeyring,
		ShimCgroup:    t.ShimCgroup,
		IoUid:         t.IoUid,
		IoGid:         t.IoGid,
		BinaryName:    t.BinaryName,
		Root:          t.Root,
		SystemdCgroup: t.SystemdCgroup,
		CriuImagePath: t.CriuImagePath,
		CriuWorkPath:  t.CriuWorkPath,
	}, t.StasisConfig, nil
}

// runtimeConfig is what of the options is about the OCI runtime. nil are the defaults.
func runtimeConfig(opts *options.Options) process.RuntimeConfig {
	return process.RuntimeConfig{
		Binary:        opts.GetBinaryName(),
		Root:          opts.GetRoot(),
		SystemdCgroup: opts.GetSystemdCgroup(),
	}
}

func readConfig(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readBounded(f)
}

// decodeCheckpointOptions reads the options of a Checkpoint call; none are the
// defaults.
func decodeCheckpointOptions(any *anypb.Any) (*options.CheckpointOptions, error) {
	opts := &options.CheckpointOptions{}
	if any.GetTypeUrl() == "" && len(any.GetValue()) == 0 {
		return opts, nil
	}
	v, err := typeurl.UnmarshalAny(any)
	if err != nil {
		return nil, invalid("options of type %q: %v", any.GetTypeUrl(), err)
	}
	opts, ok := v.(*options.CheckpointOptions)
	if !ok {
		return nil, invalid("options of type %q: want containerd.runc.v1.CheckpointOptions", any.GetTypeUrl())
	}
	return opts, nil
}

// criuOptions are the options of CRIU that containerd's Checkpoint
// (options.CheckpointOptions) and our own (api.CRIUOptions) have in common.
type criuOptions interface {
	GetOpenTcp() bool
	GetExternalUnixSockets() bool
	GetTerminal() bool
	GetFileLocks() bool
	GetEmptyNamespaces() []string
	GetCgroupsMode() string
}

// checkpointOptions makes a checkpoint's options of a request's. Errors are
// errdefs.ErrInvalidArgument.
func checkpointOptions(o criuOptions) (checkpoint.Options, error) {
	switch o.GetCgroupsMode() {
	case "", "soft", "full", "strict", "ignore":
	default:
		return checkpoint.Options{}, invalid("options: cgroups_mode %q: want soft, full, strict or ignore", o.GetCgroupsMode())
	}
	for _, ns := range o.GetEmptyNamespaces() {
		if ns != "network" {
			return checkpoint.Options{}, invalid("options: empty_namespaces %q: CRIU can leave out network only", ns)
		}
	}
	return checkpoint.Options{
		OpenTCP:             o.GetOpenTcp(),
		ExternalUnixSockets: o.GetExternalUnixSockets(),
		Terminal:            o.GetTerminal(),
		FileLocks:           o.GetFileLocks(),
		EmptyNamespaces:     o.GetEmptyNamespaces(),
		CgroupsMode:         o.GetCgroupsMode(),
	}, nil
}

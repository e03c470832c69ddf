package task

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/atomicfile"
	runc "github.com/containerd/go-runc"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint"
)

// bundle is a container's folder, which containerd makes and removes. Besides
// config.json and rootfs it holds what Cleanup needs of a container whose shim
// is gone, under the names and in the forms of upstream's shim, so that either
// can clean up after the other:
//
//	options.json  the runtime's options
//	runtime       the runtime's binary
//	init.pid      init's pid, written by the runtime
//	exit.json     how init ended
//	work          containerd's folder for what outlives the bundle
//
// and one of ours, restore-from: containerd's temporary copy of the checkpoint.
type bundle string

func (b bundle) path(name string) string { return filepath.Join(string(b), name) }

func (b bundle) rootfs() string { return b.path("rootfs") }

// rootOf is the root filesystem that a spec names, as the runtime takes it.
func (b bundle) rootOf(spec *specs.Spec) string {
	switch {
	case spec.Root == nil:
		return b.rootfs()
	case filepath.IsAbs(spec.Root.Path):
		return spec.Root.Path
	}
	return b.path(spec.Root.Path)
}

// workDir is where CRIU works unless the caller says where.
func (b bundle) workDir() string { return b.path("work") }

// restoreDir is where CRIU works in a restore.
func (b bundle) restoreDir(opts *options.Options) string {
	return cmp.Or(opts.GetCriuWorkPath(), b.workDir())
}

// dumpDir is where CRIU works in a dump unless the caller says where.
func (b bundle) dumpDir() string { return filepath.Join(b.workDir(), "checkpoint") }

// maxSpec bounds config.json, in bytes. containerd's gRPC messages, one of which
// brought it, end at 16 MiB.
const maxSpec = 16 << 20

// config is what every shim needs to know of config.json. specs.Spec is only
// decoded where it has to be: encoding/json keeps 150 KB of what it learns about
// that type for good.
type config struct {
	Process *struct {
		Terminal bool `json:"terminal"`
	} `json:"process"`
	Annotations map[string]string `json:"annotations"`
	Mounts      []struct {
		Source string `json:"source"`
	} `json:"mounts"`
	Linux *struct {
		CgroupsPath string                 `json:"cgroupsPath"`
		Namespaces  []specs.LinuxNamespace `json:"namespaces"`
	} `json:"linux"`
}

// hasTerminal tells whether init is to have one.
func (c *config) hasTerminal() bool { return c.Process != nil && c.Process.Terminal }

// cgroupsPath is the control group that it is to have, "" for one of the runtime's
// choice.
func (c *config) cgroupsPath() string {
	if c.Linux == nil {
		return ""
	}
	return c.Linux.CgroupsPath
}

// sharesPIDs tells whether the container lacks a pid namespace of its own, so
// that its processes outlive its init.
func (c *config) sharesPIDs() bool {
	if c.Linux != nil {
		for _, ns := range c.Linux.Namespaces {
			if ns.Type == specs.PIDNamespace {
				return ns.Path != ""
			}
		}
	}
	return true
}

// config reads config.json, and its digest, which is empty if it says something twice.
func (b bundle) config() (*config, string, error) {
	c := &config{}
	data, err := b.readConfig(c)
	if err != nil {
		return nil, "", err
	}
	digest, _ := checkpoint.SpecDigest(data)
	return c, digest, nil
}

// spec reads all of config.json.
func (b bundle) spec() (*specs.Spec, error) {
	spec := &specs.Spec{}
	_, err := b.readConfig(spec)
	return spec, err
}

// readConfig decodes config.json into v, and returns its bytes.
func (b bundle) readConfig(v any) ([]byte, error) {
	st, err := os.Stat(b.path("config.json"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, invalid("bundle %s holds no config.json", b)
	case err != nil:
		return nil, err
	case st.Size() > maxSpec:
		return nil, invalid("bundle %s: config.json is larger than %d bytes", b, maxSpec)
	}
	data, err := os.ReadFile(b.path("config.json"))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return nil, invalid("bundle %s: config.json: %v", b, err)
	}
	return data, nil
}

func (b bundle) writeOptions(opts *options.Options) error {
	data, err := json.Marshal(opts)
	if err != nil {
		return err
	}
	if err := os.WriteFile(b.path("options.json"), data, 0o600); err != nil {
		return err
	}
	return os.WriteFile(b.path("runtime"), []byte(opts.BinaryName), 0o600)
}

// readOptions returns what writeOptions wrote; options that were never written
// are the defaults.
func (b bundle) readOptions() (*options.Options, error) {
	opts := &options.Options{}
	data, err := os.ReadFile(b.path("options.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return opts, nil
	}
	if err != nil {
		return nil, err
	}
	return opts, json.Unmarshal(data, opts)
}

func (b bundle) writeExit(pid, status int, at time.Time) error {
	data, err := json.Marshal(runc.Exit{Pid: pid, Status: status, Timestamp: at})
	if err != nil {
		return err
	}
	f, err := atomicfile.New(b.path("exit.json"), 0o600)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		f.Cancel()
		return err
	}
	return f.Close()
}

func (b bundle) readExit() (*runc.Exit, error) {
	data, err := os.ReadFile(b.path("exit.json"))
	if err != nil {
		return nil, err
	}
	exit := &runc.Exit{}
	if err := json.Unmarshal(data, exit); err != nil {
		return nil, err
	}
	if exit.Pid <= 0 || exit.Timestamp.IsZero() {
		return nil, fmt.Errorf("exit.json: %s is no exit", data)
	}
	return exit, nil
}

// unmount undoes what mountRootfs did; a rootfs that is not mounted is no error.
func (b bundle) unmount() error {
	return mount.UnmountRecursive(b.rootfs(), 0)
}

// Package policy says whether a checkpoint asks for no more than the container
// that it is restored into may have.
//
// A checkpoint is untrusted input: whoever names an image names the checkpoint in
// it, and CRIU does as root whatever its images say. Check decodes them before
// CRIU runs and compares them with the container's config.json. What a process of
// that container could have come to by itself passes; so the checkpoint of a
// container passes with the container's own spec. What this package does not
// know (a kind of image, a field, a value) does not pass.
//
// Package policy/seccomp compares seccomp filters with a profile. Package policy/allow is
// the other half: what the spec that comes with a checkpoint may ask for.
//
// docs/security.md has the rules, each with its reason and its test.
package policy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Limits on an error: it is one line, which people read in kubectl describe.
const (
	maxFindings = 6
	maxText     = 120 // bytes of a string out of an image
)

// Check compares everything but mounts and paths, for which CheckMounts needs the
// root filesystem. The error names every process and field, up to a handful; it
// matches errdefs.ErrPermissionDenied, or ErrInvalidArgument if an image cannot
// be understood.
func Check(ctx context.Context, ckpt *checkpoint.Checkpoint, spec *specs.Spec) error {
	c := newChecker(ctx, ckpt, spec)
	for _, step := range []func() error{
		c.checkNames, c.checkDescriptors, c.checkInventory, c.checkTasks, c.checkNamespaces, c.checkNetwork,
		c.checkFiles, c.checkCgroups, c.checkLimits,
	} {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := step(); err != nil {
			return fmt.Errorf("checkpoint %s: %w", ckpt.Dir(), err)
		}
	}
	return c.verdict()
}

// checker is one check.
type checker struct {
	ctx    context.Context
	ckpt   *checkpoint.Checkpoint
	spec   *specs.Spec
	grant  grant
	budget budget

	found []string // what is refused, at most maxFindings
	more  int      // how many others

	names     map[string]bool
	inventory inventoryFacts
	tasks     []task
	threads   map[uint32]bool         // the numbers of all of them
	filters   map[uint32]verdict      // on each chain of seccomp filters
	mounts    map[string][]mountEntry // by the image that has them
	wanted    map[string]wanted       // the spec's, by path in the root filesystem
	unnamed   map[uint32]bool         // entries of files.img whose file CRIU makes anew
	parts     map[part]uint32         // entries of files.img, by what other images have of them
	entry     opened                  // the entry of files.img that is being decoded

	portStart  int                          // see unprivilegedPorts; -1 if it was not read
	processes  map[uint32]bool              // see uses
	used       map[uint32]use               // see uses
	tmpfsLinks map[string]map[string]string // of each archive of tmpfs files, by its number: where its links lead
	tmpfsWays  map[string][]*mountTree      // the namespaces that have a mount of it
}

func newChecker(ctx context.Context, ckpt *checkpoint.Checkpoint, spec *specs.Spec) *checker {
	c := &checker{ctx: ctx, ckpt: ckpt, spec: spec, grant: grantOf(spec), names: map[string]bool{},
		filters: map[uint32]verdict{}, threads: map[uint32]bool{}, portStart: -1, budget: newBudget(ctx)}
	for _, name := range ckpt.Names() {
		c.names[name] = true
	}
	return c
}

// refuse notes something that the checkpoint may not have.
func (c *checker) refuse(format string, args ...any) {
	if len(c.found) == maxFindings {
		c.more++
		return
	}
	c.found = append(c.found, fmt.Sprintf(format, args...))
}

func (c *checker) verdict() error {
	if len(c.found) == 0 {
		return nil
	}
	text := strings.Join(c.found, "; ")
	if c.more > 0 {
		text += fmt.Sprintf("; and %d more", c.more)
	}
	return fault.New(errdefs.ErrPermissionDenied, "checkpoint %s does not fit what the container's spec grants: %s", c.ckpt.Dir(), text)
}

// each is Checkpoint.Each for an image that may be missing.
func (c *checker) each(name, kind string, fn func(msg []byte) error) error {
	if !c.names[name] {
		return nil
	}
	if err := c.budget.spend(1, 0); err != nil {
		return err
	}
	return c.ckpt.Each(name, kind, func(msg []byte) error {
		if err := c.budget.spend(1, len(msg)); err != nil {
			return err
		}
		return fn(msg)
	})
}

// one decodes the only message of an image, and reports whether it is there.
// CRIU reads the first and passes over others.
func (c *checker) one(name, kind string, into proto.Message) (found bool, err error) {
	err = c.each(name, kind, func(msg []byte) error {
		if found {
			return fault.Invalid("more than one message")
		}
		found = true
		return c.decode(msg, into)
	})
	return found, err
}

// need is one for an image that must be there.
func (c *checker) need(name, kind string, into proto.Message) error {
	found, err := c.one(name, kind, into)
	if err == nil && !found {
		err = fault.Invalid("%s: missing or empty", name)
	}
	return err
}

// firstOnly is one for an image that has other bytes after the first message.
func (c *checker) firstOnly(name, kind string, into proto.Message) error {
	found := false
	err := c.ckpt.Each(name, kind, func(msg []byte) error {
		found = true
		if err := c.budget.spend(1, len(msg)); err != nil {
			return err
		}
		if err := c.decode(msg, into); err != nil {
			return err
		}
		return io.EOF
	})
	if err == nil && !found {
		err = fault.Invalid("%s: empty", name)
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = fault.Invalid("%s: missing", name)
	}
	return err
}

// quote makes a string of an image fit for an error.
func quote(s string) string {
	if len(s) > maxText {
		s = s[:maxText] + "…"
	}
	return fmt.Sprintf("%q", s)
}

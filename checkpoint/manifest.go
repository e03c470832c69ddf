package checkpoint

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sum"
	"github.com/stasis-run/stasis/process"
)

// manifestVersion is the newest version of the format that this package reads.
// Any change to the set of keys takes a new number: a reader must not restore
// while ignoring something that it was told. Versions 1 and 2 have sums that carry no
// signature (oldHash).
const manifestVersion = 3

// signedVersion is the oldest version that can be signed.
const signedVersion = 3

// Manifest is stasis.json.
type Manifest struct {
	Version   int       `json:"version"`
	Created   time.Time `json:"created"`
	Container Container `json:"container"`
	Options   Options   `json:"options"`
	// Exit: the container was stopped by this checkpoint.
	Exit bool `json:"exit"`
	// TerminalIO is process.terminal of the container's spec: a restore has to
	// provide a console.
	TerminalIO bool `json:"terminal_io"`
	// CRIU and Kernel are versions, such as "4.2.1" and "6.12.43-amd64".
	CRIU    string  `json:"criu"`
	Runtime Runtime `json:"runtime"`
	Kernel  string  `json:"kernel"`
	// Host is the name of the host where it was made.
	Host string `json:"host,omitempty"`
	// Architecture is a GOARCH.
	Architecture string `json:"architecture"`
	// Cgroups are the control groups that the container had made below its own, of
	// version 2; none with version 1, whose groups CRIU brings back itself.
	Cgroups []process.SubGroup `json:"cgroups,omitempty"`
	// CPUFeatures are those of HostCPUFeatures where the checkpoint was made. A
	// program asks once at its start what the CPU can do, so a restore needs
	// them all.
	CPUFeatures []string `json:"cpu_features"`
	// Files are all files that a restore reads, sorted by name.
	Files []File `json:"files"`
}

// Container says whose checkpoint this is.
type Container struct {
	ID        string `json:"id"`
	Namespace string `json:"namespace"` // containerd's
	// SpecDigest is that of the config.json, by the function of that name; before
	// version 3, "sha256:" and the digest of its bytes in hex.
	SpecDigest string `json:"spec_digest"`
	// Name is the container's in its pod, else empty.
	Name string `json:"name,omitempty"`
	// Pod is nil if it is in none.
	Pod *Pod `json:"pod,omitempty"`
	// BaseConfig is the digest of the config of the image that it was made from; it
	// is empty if who asked for the checkpoint did not say.
	BaseConfig string `json:"base_config,omitempty"`
}

// Pod is a Kubernetes pod.
type Pod struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	UID       string `json:"uid"`
}

// Runtime is the OCI runtime that made the checkpoint.
type Runtime struct {
	Name    string `json:"name"` // "runc", "crun"
	Version string `json:"version"`
}

// File is one file of the checkpoint.
type File struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // in bytes
	// Sum is a kind, a colon and hex: that of package sum; of versions 1 and 2 one of
	// oldHash. It is empty where it is left to AddSum.
	Sum string `json:"sum"`
	// Chunks are the sums of the chunks of a large file, one after the other.
	Chunks []byte `json:"chunks,omitempty"`
	// Inode and CtimeNs (ns since 1970) are those of a large file when it
	// had reached its final place; else 0. As long as they and the size are the
	// same, it is that file with that content, for the kernel sets ctime at
	// every change and nobody can set it back.
	Inode   uint64 `json:"inode,omitempty"`
	CtimeNs int64  `json:"ctime_ns,omitempty"`
}

// decodeManifest reads stasis.json.
func decodeManifest(data []byte) (*Manifest, error) {
	m, err := decodeUnsummed(data)
	if err != nil {
		return nil, err
	}
	for i := range m.Files {
		if f := &m.Files[i]; !f.validSum(m.Version) {
			return nil, fault.Invalid("files[%d]: %s has no valid sum", i, f.Name)
		}
	}
	return m, nil
}

// decodeUnsummed is decodeManifest, but for the sums, which it does not look at. It
// refuses unknown keys, since they would be something that the writer found
// necessary to say.
func decodeUnsummed(data []byte) (*Manifest, error) {
	// One for each file, and some of control groups.
	if err := capture.CheckNodes(data, 4*maxFiles); err != nil {
		return nil, err
	}
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, fault.Invalid("no valid JSON: %v", err)
	}
	switch {
	case head.Version > manifestVersion:
		return nil, fault.Unusable("format version %d is newer than %d, the newest this Stasis knows; restore it with a newer Stasis",
			head.Version, manifestVersion)
	case head.Version < 1:
		return nil, fault.Invalid("no valid format version (%d)", head.Version)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var m Manifest
	if err := d.Decode(&m); err != nil {
		return nil, fault.Invalid("%v", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fault.Invalid("something follows the manifest's closing brace")
	}
	if err := m.check(); err != nil {
		return nil, fault.Invalid("%v", err)
	}
	return &m, nil
}

// validSum tells whether f has a sum, of the kind of that version of a manifest.
func (f *File) validSum(version int) bool {
	if version >= signedVersion {
		return f.sum().Valid(f.Size)
	}
	if f.Chunks != nil {
		return false
	}
	kind, hash := oldHash(f.Name)
	digits, ok := strings.CutPrefix(f.Sum, kind+":")
	return ok && len(digits) == 2*hash.Size() && strings.Trim(digits, "0123456789abcdef") == ""
}

func (f *File) sum() sum.Sum { return sum.Sum{Text: f.Sum, Chunks: f.Chunks} }

// setSum is the reverse of sum.
func (f *File) setSum(s sum.Sum) { f.Sum, f.Chunks = s.Text, s.Chunks }

// check looks at each value by itself, but for sums; open.go compares them with the
// folder.
func (m *Manifest) check() error {
	if err := m.Options.check(); err != nil {
		return err
	}
	if err := process.CheckSubGroups(m.Cgroups); err != nil {
		return fmt.Errorf("cgroups%w", err)
	}
	if m.Architecture == "" {
		return errors.New("architecture is empty")
	}
	if len(m.Files) > maxFiles {
		return fmt.Errorf("files: %d entries, at most %d are allowed", len(m.Files), maxFiles)
	}
	seen := make(map[string]bool, len(m.Files))
	for i, f := range m.Files {
		switch {
		case !validName(f.Name):
			return fmt.Errorf("files[%d]: %.80q is no plain file name", i, f.Name)
		case seen[f.Name]:
			return fmt.Errorf("files[%d]: %s is listed twice", i, f.Name)
		case f.Size < 0:
			return fmt.Errorf("files[%d]: %s has size %d", i, f.Name, f.Size)
		}
		seen[f.Name] = true
	}
	if !seen[layout.Inventory] {
		return fmt.Errorf("files: %s is not listed", layout.Inventory)
	}
	return nil
}

func (m *Manifest) encode() ([]byte, error) {
	data, err := json.MarshalIndent(m, "", "\t")
	if err != nil {
		return nil, err
	}
	return append(data, '\n'), nil
}

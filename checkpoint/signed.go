package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// verifySignature finds who has signed the manifest in dir, of which data is the
// bytes. Nobody has where there is no envelope.
func verifySignature(dir string, m *Manifest, data []byte, trust *sign.Trust) (sign.Verdict, error) {
	// It has the manifest in base64, and the signatures.
	envelope, err := readBounded(dir, layout.Signature, min(sign.MaxEnvelope, int64(len(data))*3/2+64<<10))
	if err != nil || envelope == nil {
		return sign.Verdict{}, err
	}
	if m == nil || m.Version < signedVersion {
		return sign.Verdict{}, fault.Invalid("%s: there is no manifest that could be signed: %s was replaced", layout.Signature, layout.Manifest)
	}
	return trust.Verify(envelope, data)
}

// SignedBy tells who has signed the manifest of the checkpoint in dir, of those that are
// trusted. The files are not compared with it, which OpenWith does.
func SignedBy(dir string, trust *sign.Trust) (sign.Verdict, error) {
	_, v, err := signedManifest(dir, trust)
	return v, wrap(dir, err)
}

// signedManifest returns the manifest in dir, nil if there is none, and who has signed
// those very bytes.
func signedManifest(dir string, trust *sign.Trust) (*Manifest, sign.Verdict, error) {
	data, err := readManifestFile(dir)
	if err != nil {
		return nil, sign.Verdict{}, err
	}
	var m *Manifest
	if data != nil {
		if m, err = decodeManifest(data); err != nil {
			return nil, sign.Verdict{}, fmt.Errorf("%s: %w", layout.Manifest, err)
		}
	}
	v, err := verifySignature(dir, m, data, trust)
	return m, v, err
}

// OwnSpec tells whether this node's own key has signed the manifest of the checkpoint
// in dir, and the manifest is of a container that ran with spec. The files are not
// compared with it, which the restore does.
func OwnSpec(dir string, spec []byte, trust *sign.Trust) (bool, error) {
	m, v, err := signedManifest(dir, trust)
	if err != nil || len(v.Signers) == 0 || !v.Signers[0].Own {
		return false, wrap(dir, err)
	}
	digest, err := SpecDigest(spec)
	return err == nil && digest == m.Container.SpecDigest, err
}

// CheckSigned is nil if somebody has signed the checkpoint who is trusted; else the
// error says what would make it so, and matches ErrNotSigned. trust is that of
// OpenOptions.
func (c *Checkpoint) CheckSigned(trust *sign.Trust) error {
	if len(c.verdict.Signers) > 0 {
		return nil
	}
	return wrap(c.dir, notSigned(c.verdict, trust))
}

// ErrNotSigned is of OpenOptions.Require. It matches errdefs.ErrPermissionDenied.
var ErrNotSigned = fmt.Errorf("signed by no key that is trusted: %w", errdefs.ErrPermissionDenied)

// notSigned says why a checkpoint is not restored that nobody who is trusted has
// signed.
func notSigned(v sign.Verdict, trust *sign.Trust) error {
	why := "it is not signed: where its node is trusted, `stasis sign` signs it"
	if len(v.Unknown) > 0 {
		why = fmt.Sprintf("it is signed by key %s, which this node does not trust: `stasis key trust FILE` with that public key (`stasis key show` prints it where the checkpoint was made) would",
			strings.Join(v.Unknown, " and "))
	}
	if trust != nil {
		if err := errors.Join(trust.Skipped...); err != nil {
			why += fmt.Sprintf("; keys that were passed over: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
		}
	}
	return fault.New(ErrNotSigned, "%s", why)
}

// writeSigned writes a manifest into dir, and before it an envelope by key, unless
// that is nil, with the signatures of an older one of the same manifest.
func writeSigned(dir string, m *Manifest, key *sign.Key, older []byte) error {
	data, err := m.encode()
	if err != nil {
		return err
	}
	if key != nil {
		envelope, err := key.Sign(data, older)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, layout.Signature), envelope, 0o600)
		}
		if err != nil {
			return fmt.Errorf("sign the manifest: %w", err)
		}
	}
	return os.WriteFile(filepath.Join(dir, layout.Manifest), data, 0o600)
}

// Sign signs the checkpoint in dir, which has to be good. One that has no manifest, or
// of a version that cannot be signed, is given one: of that, made is who and when, and
// the rest is what its images tell. Signatures of others stay.
func Sign(ctx context.Context, dir string, key *sign.Key, made Manifest) error {
	return wrap(dir, signFolder(ctx, dir, key, made))
}

func signFolder(ctx context.Context, dir string, key *sign.Key, made Manifest) error {
	ckpt, err := open(ctx, dir, OpenOptions{Reread: true, AnyHost: true})
	if err != nil {
		return err
	}
	if m := ckpt.manifest; m != nil && m.Version >= signedVersion {
		data, err := readManifestFile(dir)
		if err != nil {
			return err
		}
		older, err := readBounded(dir, layout.Signature, sign.MaxEnvelope)
		if err != nil {
			return err
		}
		envelope, err := key.Sign(data, older)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, layout.Signature), envelope, 0o600)
	}
	m := made
	if ckpt.manifest != nil {
		m = *ckpt.manifest
		// Of which older versions know nothing.
		m.Container.Name, m.Container.Pod, m.Container.BaseConfig = made.Container.Name, made.Container.Pod, made.Container.BaseConfig
		m.Container.SpecDigest = made.Container.SpecDigest
	} else {
		m.Options = ckpt.options
		if m.Architecture == "" {
			m.Architecture = runtime.GOARCH
		}
	}
	m.Version, m.Files = manifestVersion, nil
	for _, file := range ckpt.files {
		if validName(file.name) && !layout.IsIncidental(file.name) {
			m.Files = append(m.Files, File{Name: file.name, Size: file.size})
		}
	}
	slices.SortFunc(m.Files, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	sums, err := sumFiles(ctx, dir, m.Files)
	if err != nil {
		return err
	}
	for i := range m.Files {
		m.Files[i].setSum(sums[i])
	}
	if err := m.check(); err != nil {
		return err
	}
	return writeSigned(dir, &m, key, nil)
}

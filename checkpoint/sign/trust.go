package sign

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Trust are the keys that a node trusts. Nil trusts none.
type Trust struct {
	keys []trusted
	// Skipped says of each file of a key that is not trusted what is wrong with it.
	Skipped []error
}

type trusted struct {
	Signer
	public ed25519.PublicKey
}

// maxTrusted bounds how many keys are read.
const maxTrusted = 1024

func (t *Trust) find(id string) (trusted, bool) {
	if t != nil {
		for _, k := range t.keys {
			if k.KeyID == id {
				return k, true
			}
		}
	}
	return trusted{}, false
}

// Keys lists the keys, the node's own first.
func (t *Trust) Keys() (all []Signer) {
	for _, k := range t.keys {
		all = append(all, k.Signer)
	}
	return all
}

// Trust reads the keys that are trusted. A file that others than root could have
// written is none of them.
func (d Dir) Trust() (*Trust, error) {
	t := &Trust{}
	own, err := d.ReadKey()
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		t.Skipped = append(t.Skipped, err)
	default:
		t.keys = append(t.keys, trusted{Signer{KeyID: own.ID, Own: true}, own.private.Public().(ed25519.PublicKey)})
	}
	paths, err := d.trustedFiles()
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		data, err := readOwn(path, 0o022)
		var id string
		var public ed25519.PublicKey
		if err == nil {
			if id, public, err = DecodePublic(data); err != nil {
				err = fmt.Errorf("%s: %w", path, err)
			}
		}
		if err != nil {
			t.Skipped = append(t.Skipped, err)
			continue
		}
		if _, ok := t.find(id); !ok {
			t.keys = append(t.keys, trusted{Signer{KeyID: id, File: path}, public})
		}
	}
	return t, nil
}

func (d Dir) trustedDir() string { return filepath.Join(string(d), "trusted") }

// trustedFiles are the names of files with keys, sorted.
func (d Dir) trustedFiles() (paths []string, err error) {
	entries, err := os.ReadDir(d.trustedDir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the trusted keys: %w", err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".pub") && !strings.HasPrefix(e.Name(), ".") {
			paths = append(paths, filepath.Join(d.trustedDir(), e.Name()))
		}
	}
	if len(paths) > maxTrusted {
		return nil, fault.Unusable("%s: more than %d keys", d.trustedDir(), maxTrusted)
	}
	return paths, nil
}

// Add makes a public key, as PEM, one that is trusted. One that is already is no
// error.
func (d Dir) Add(public []byte) (Signer, error) {
	id, key, err := DecodePublic(public)
	if err != nil {
		return Signer{}, err
	}
	have, err := d.Trust()
	if err != nil {
		return Signer{}, err
	}
	if k, ok := have.find(id); ok {
		return k.Signer, nil
	}
	data, err := encodePublic(key)
	if err != nil {
		return Signer{}, err
	}
	if err := os.MkdirAll(d.trustedDir(), 0o755); err != nil {
		return Signer{}, fmt.Errorf("trust a key: %w", err)
	}
	path := filepath.Join(d.trustedDir(), Short(id)+".pub")
	if err := place(path, data, 0o644); err != nil {
		return Signer{}, fmt.Errorf("trust a key: %w", err)
	}
	// Where the folder is not as it has to be, it is not trusted for all that.
	if have, err = d.Trust(); err != nil {
		return Signer{}, err
	}
	k, ok := have.find(id)
	if !ok {
		return Signer{}, fmt.Errorf("trust a key: %w", errors.Join(have.Skipped...))
	}
	return k.Signer, nil
}

// Remove makes a key one that is not trusted. id may be the beginning of its ID, if
// no other begins so. The node's own cannot be removed: what it signs would be
// refused.
func (d Dir) Remove(id string) (Signer, error) {
	t, err := d.Trust()
	if err != nil {
		return Signer{}, err
	}
	var found []Signer
	for _, k := range t.keys {
		if id != "" && strings.HasPrefix(k.KeyID, id) {
			found = append(found, k.Signer)
		}
	}
	switch {
	case len(found) == 0:
		return Signer{}, fault.New(errdefs.ErrNotFound, "no key that is trusted has the ID %s", id)
	case len(found) > 1:
		return Signer{}, fault.Invalid("%d keys that are trusted have an ID that begins with %s: give more of it", len(found), id)
	case found[0].Own:
		return found[0], fault.Unusable("%s is the key that this node signs with, and always trusted; it is in %s", Short(found[0].KeyID), d.KeyPath())
	}
	// It may be there under several names.
	paths, err := d.trustedFiles()
	if err != nil {
		return Signer{}, err
	}
	for _, path := range paths {
		data, err := readOwn(path, 0o022)
		if err != nil {
			continue
		}
		if other, _, err := DecodePublic(bytes.TrimSpace(data)); err == nil && other == found[0].KeyID {
			if err := os.Remove(path); err != nil {
				return Signer{}, err
			}
		}
	}
	return found[0], nil
}

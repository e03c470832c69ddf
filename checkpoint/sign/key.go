package sign

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Key is one to sign with.
type Key struct {
	// ID is the sha256 of the public key's PKIX DER, in hex.
	ID      string
	private ed25519.PrivateKey
}

// Public is the public key as PEM, as the trusted ones are kept.
func (k *Key) Public() ([]byte, error) {
	return encodePublic(k.private.Public().(ed25519.PublicKey))
}

// Short is a key's ID as people are shown it.
func Short(id string) string { return id[:min(16, len(id))] }

func validID(id string) bool {
	return len(id) == 2*sha256.Size && strings.Trim(id, "0123456789abcdef") == ""
}

func idOf(public ed25519.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

const (
	privateType = "PRIVATE KEY"
	publicType  = "PUBLIC KEY"
)

func encodePublic(public ed25519.PublicKey) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: publicType, Bytes: der}), nil
}

// block returns the one PEM block of a type.
func block(data []byte, kind string) ([]byte, error) {
	b, rest := pem.Decode(data)
	switch {
	case b == nil || b.Type != kind:
		return nil, fault.Invalid("no PEM with a %s", kind)
	case len(strings.TrimSpace(string(rest))) > 0:
		return nil, fault.Invalid("something follows the PEM")
	}
	return b.Bytes, nil
}

// DecodePublic reads a public key as PEM, and tells its ID.
func DecodePublic(data []byte) (id string, _ ed25519.PublicKey, _ error) {
	der, err := block(data, publicType)
	if err != nil {
		return "", nil, err
	}
	any, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return "", nil, fault.Invalid("no public key: %v", err)
	}
	public, ok := any.(ed25519.PublicKey)
	if !ok {
		return "", nil, fault.Invalid("a key of type %T; signatures are Ed25519", any)
	}
	id, err = idOf(public)
	return id, public, err
}

func decodePrivate(data []byte) (*Key, error) {
	der, err := block(data, privateType)
	if err != nil {
		return nil, err
	}
	any, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fault.Invalid("no private key") // what is wrong might quote it
	}
	private, ok := any.(ed25519.PrivateKey)
	if !ok {
		return nil, fault.Invalid("a key of type %T; signatures are Ed25519", any)
	}
	id, err := idOf(private.Public().(ed25519.PublicKey))
	return &Key{id, private}, err
}

// Dir is the folder with a node's keys and configuration.
type Dir string

// DefaultDir is $STASIS_CONFIG_DIR, or /etc/stasis.
func DefaultDir() Dir {
	if dir := os.Getenv("STASIS_CONFIG_DIR"); dir != "" {
		return Dir(dir)
	}
	return "/etc/stasis"
}

// KeyPath is where the private key is.
func (d Dir) KeyPath() string { return filepath.Join(string(d), "keys", "sign.key") }

// ReadKey reads the node's key. If there is none, the error matches fs.ErrNotExist.
func (d Dir) ReadKey() (*Key, error) {
	data, err := readOwn(d.KeyPath(), 0o077)
	if err != nil {
		return nil, fmt.Errorf("read the node's key: %w", err)
	}
	k, err := decodePrivate(data)
	if err != nil {
		return nil, fmt.Errorf("read the node's key: %s: %w", d.KeyPath(), err)
	}
	return k, nil
}

// Key reads the node's key, and makes it if there is none. Several may do that at
// once: all get the same.
func (d Dir) Key() (*Key, error) {
	k, err := d.ReadKey()
	if !errors.Is(err, fs.ErrNotExist) {
		return k, err
	}
	if err := d.makeKey(); err != nil {
		return nil, fmt.Errorf("make the node's key: %w", err)
	}
	return d.ReadKey()
}

// makeKey makes a key, unless one is there when it is whole.
func (d Dir) makeKey() (err error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(string(d), 0o755); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(d.KeyPath()), 0o700); err != nil {
		return err
	}
	err = place(d.KeyPath(), pem.EncodeToMemory(&pem.Block{Type: privateType, Bytes: der}), 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// place writes a file that is there when it is whole and on the disk, and not if one
// is there already: fs.ErrExist.
func place(path string, data []byte, mode fs.FileMode) (err error) {
	tmp := filepath.Join(filepath.Dir(path), ".new-"+rand.Text())
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, mode)
	if err != nil {
		return err
	}
	defer os.Remove(tmp)
	_, err = f.Write(data)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(tmp, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// maxKey bounds a file with a key, in bytes.
const maxKey = 16 << 10

// readOwn reads a small file that root or we own, none of whose mode bits are among
// the forbidden, in a folder that nobody else can write to.
func readOwn(path string, forbidden uint32) ([]byte, error) {
	for _, dir := range []string{filepath.Dir(path), filepath.Dir(filepath.Dir(path))} {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return nil, &fs.PathError{Op: "stat", Path: dir, Err: err}
		}
		if err := checkOwner(dir, &st, 0o022); err != nil {
			return nil, err
		}
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fault.Unusable("%s: not a regular file", path)
	}
	if err := checkOwner(path, &st, forbidden); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxKey+1))
	if err == nil && len(data) > maxKey {
		err = fault.Invalid("%s: larger than %d bytes", path, maxKey)
	}
	return data, err
}

func checkOwner(path string, st *unix.Stat_t, forbidden uint32) error {
	if st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fault.Unusable("%s is owned by user %d; it has to be root's", path, st.Uid)
	}
	if st.Mode&forbidden != 0 {
		return fault.Unusable("%s has mode %o, so others than root may use it: chmod %o it", path, st.Mode&0o7777, st.Mode&0o7777&^forbidden)
	}
	return nil
}

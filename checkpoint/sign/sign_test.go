package sign

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%v; want %q in it", err, part)
		}
	}
}

func newDir(t testing.TB) (Dir, *Key) {
	t.Helper()
	d := Dir(filepath.Join(t.TempDir(), "stasis"))
	k, err := d.Key()
	must(t, err)
	return d, k
}

func public(t testing.TB, k *Key) []byte {
	t.Helper()
	data, err := k.Public()
	must(t, err)
	return data
}

// TestKeyOnce: of many that make a key at once, all get the same.
func TestKeyOnce(t *testing.T) {
	d := Dir(filepath.Join(t.TempDir(), "a", "stasis"))
	if _, err := d.ReadKey(); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	ids := make([]string, 64)
	var group sync.WaitGroup
	start := make(chan struct{})
	for i := range ids {
		group.Go(func() {
			<-start
			if k, err := d.Key(); err != nil {
				t.Error(err)
			} else {
				ids[i] = k.ID
			}
		})
	}
	close(start)
	group.Wait()
	for _, id := range ids {
		if id != ids[0] || !validID(id) {
			t.Fatalf("%q", ids)
		}
	}
	entries, err := os.ReadDir(filepath.Dir(d.KeyPath()))
	must(t, err)
	if len(entries) != 1 {
		t.Errorf("left beside the key: %v", entries)
	}
	info, err := os.Stat(d.KeyPath())
	must(t, err)
	if info.Mode() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
}

// TestKeyRefused: a key that others could have read or replaced is none, and is not
// replaced either.
func TestKeyRefused(t *testing.T) {
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(other)
	must(t, err)
	for name, c := range map[string]struct {
		do   func(d Dir) error
		want string
	}{
		"readable":           {func(d Dir) error { return os.Chmod(d.KeyPath(), 0o640) }, "mode 640"},
		"others' folder":     {func(d Dir) error { return os.Chmod(filepath.Dir(d.KeyPath()), 0o777) }, "mode 777"},
		"others' top folder": {func(d Dir) error { return os.Chmod(string(d), 0o775) }, "mode 775"},
		"owner":              {func(d Dir) error { return os.Chown(d.KeyPath(), 7, 7) }, "owned by user 7"},
		"link": {func(d Dir) error {
			return errors.Join(os.Rename(d.KeyPath(), string(d)+"/k"), os.Symlink(string(d)+"/k", d.KeyPath()))
		}, "sign.key"},
		"FIFO":    {func(d Dir) error { return errors.Join(os.Remove(d.KeyPath()), os.Mkdir(d.KeyPath(), 0o700)) }, "sign.key"},
		"garbage": {func(d Dir) error { return os.WriteFile(d.KeyPath(), []byte("x"), 0o600) }, "no PEM"},
		"of ECDSA": {func(d Dir) error {
			return os.WriteFile(d.KeyPath(), pem.EncodeToMemory(&pem.Block{Type: privateType, Bytes: der}), 0o600)
		}, "ecdsa"},
		"two": {func(d Dir) error {
			data, err := os.ReadFile(d.KeyPath())
			return errors.Join(err, os.WriteFile(d.KeyPath(), append(data, data...), 0o600))
		}, "something follows"},
		"large": {func(d Dir) error { return os.WriteFile(d.KeyPath(), make([]byte, maxKey+1), 0o600) }, "larger"},
	} {
		t.Run(name, func(t *testing.T) {
			if os.Geteuid() != 0 && name == "owner" {
				t.Skip("needs root")
			}
			d, _ := newDir(t)
			must(t, c.do(d))
			_, err := d.Key()
			wantError(t, err, c.want)
			trust, err := d.Trust()
			must(t, err)
			if len(trust.Keys()) != 0 || len(trust.Skipped) != 1 {
				t.Errorf("trusted: %v, skipped: %v", trust.Keys(), trust.Skipped)
			}
		})
	}
	// Where nothing can be written, there is no key, and an error.
	if os.Geteuid() == 0 {
		_, err := Dir("/proc/stasis").Key()
		wantError(t, err, "make the node's key")
	}
}

func TestTrust(t *testing.T) {
	here, own := newDir(t)
	_, theirs := newDir(t)
	_, third := newDir(t)
	payload := []byte("what is signed")
	envelope, err := theirs.Sign(payload, nil)
	must(t, err)

	verify := func(data []byte) Verdict {
		t.Helper()
		trust, err := here.Trust()
		must(t, err)
		v, err := trust.Verify(data, payload)
		must(t, err)
		return v
	}
	if v := verify(envelope); len(v.Signers) != 0 || len(v.Unknown) != 1 || v.Unknown[0] != theirs.ID {
		t.Errorf("%+v", v)
	}
	for range 2 { // the second has nothing to do
		s, err := here.Add(public(t, theirs))
		must(t, err)
		if s.KeyID != theirs.ID || s.Own || filepath.Dir(s.File) != here.trustedDir() {
			t.Errorf("%+v", s)
		}
	}
	if v := verify(envelope); len(v.Signers) != 1 || v.Signers[0].Own || v.Signers[0].KeyID != theirs.ID {
		t.Errorf("%+v", v)
	}
	// Rotation: both have signed, and either will do.
	both, err := own.Sign(payload, envelope)
	must(t, err)
	if v := verify(both); len(v.Signers) != 2 || !v.Signers[0].Own {
		t.Errorf("%+v", v)
	}
	if ids, err := KeyIDs(both); err != nil || len(ids) != 2 {
		t.Errorf("%q, %v", ids, err)
	}
	again, err := own.Sign(payload, both)
	must(t, err)
	if v := verify(again); len(v.Signers) != 2 {
		t.Errorf("a signature twice: %+v", v)
	}
	if _, err := own.Sign([]byte("something else"), both); err == nil {
		t.Error("an envelope of something else was added to")
	}
	// A node's own cannot be removed, others' can, by a part of the ID that is one's only.
	_, err = here.Remove(own.ID)
	wantError(t, err, "this node signs with")
	_, err = here.Remove("")
	wantError(t, err, "no key")
	_, err = here.Remove(third.ID)
	if !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	must(t, os.WriteFile(filepath.Join(here.trustedDir(), "again.pub"), public(t, theirs), 0o644))
	_, err = here.Remove(theirs.ID[:20])
	must(t, err)
	if v := verify(both); len(v.Signers) != 1 || len(v.Unknown) != 1 {
		t.Errorf("%+v", v)
	}
	// One that others can write is not trusted.
	_, err = here.Add(public(t, theirs))
	must(t, err)
	must(t, os.Chmod(filepath.Join(here.trustedDir(), Short(theirs.ID)+".pub"), 0o646))
	trust, err := here.Trust()
	must(t, err)
	if len(trust.Keys()) != 1 || len(trust.Skipped) != 1 || !strings.Contains(trust.Skipped[0].Error(), "646") {
		t.Errorf("%v, %v", trust.Keys(), trust.Skipped)
	}
	_, err = here.Add([]byte("no key"))
	wantError(t, err, "no PEM")
	private, err := os.ReadFile(here.KeyPath())
	must(t, err)
	_, err = here.Add(private)
	wantError(t, err, "no PEM with a PUBLIC KEY")
}

// TestVerifyRefuses: what does not fit is refused, by who trusts the key and by who does
// not know it.
func TestVerifyRefuses(t *testing.T) {
	d, k := newDir(t)
	_, other := newDir(t)
	trust, err := d.Trust()
	must(t, err)
	payload := []byte("what is signed")
	good, err := k.Sign(payload, nil)
	must(t, err)
	edited := func(do func(e map[string]any, sig map[string]any)) []byte {
		var e map[string]any
		must(t, json.Unmarshal(good, &e))
		do(e, e["signatures"].([]any)[0].(map[string]any))
		data, err := json.Marshal(e)
		must(t, err)
		return data
	}
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"payload":          {edited(func(e, _ map[string]any) { e["payload"] = "AAAA" }), "not what was signed"},
		"no base64":        {edited(func(e, _ map[string]any) { e["payload"] = "?" }), "payload"},
		"loose base64":     {edited(func(e, _ map[string]any) { e["payload"] = e["payload"].(string) + "\n" + "AA=" }), "payload"},
		"type":             {edited(func(e, _ map[string]any) { e["payloadType"] = PayloadType + "1" }), "signs"},
		"none":             {edited(func(e, _ map[string]any) { e["signatures"] = nil }), "0 signatures"},
		"many":             {edited(func(e, _ map[string]any) { e["signatures"] = make([]struct{}, maxSignatures+1) }), "17 signatures"},
		"twice":            {edited(func(e, s map[string]any) { e["signatures"] = []any{s, s} }), "two signatures"},
		"short":            {edited(func(_, s map[string]any) { s["sig"] = "AAAA" }), "none of Ed25519"},
		"zeros":            {edited(func(_, s map[string]any) { s["sig"] = strings.Repeat("A", 86) + "==" }), "is not right"},
		"no key":           {edited(func(_, s map[string]any) { delete(s, "keyid") }), "no key ID"},
		"a path for a key": {edited(func(_, s map[string]any) { s["keyid"] = "../" + k.ID[3:] }), "no key ID"},
		"more":             {append(bytes.Clone(good), '{'), "something follows"},
		"nothing":          {nil, "no envelope"},
		"another's signature": {edited(func(_, s map[string]any) {
			var e map[string]any
			made, err := other.Sign(payload, nil)
			must(t, err)
			must(t, json.Unmarshal(made, &e))
			s["sig"] = e["signatures"].([]any)[0].(map[string]any)["sig"]
		}), "is not right"},
		"large": {make([]byte, MaxEnvelope+1), "larger"},
	} {
		_, err := trust.Verify(c.data, payload)
		if err == nil || !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", name, err, c.want)
		}
	}
	if _, err := trust.Verify(good, payload); err != nil {
		t.Fatal(err)
	}
	// One right signature does not make up for a wrong one of a key that is trusted.
	if _, err := d.Add(public(t, other)); err != nil {
		t.Fatal(err)
	}
	trust, err = d.Trust()
	must(t, err)
	both, err := other.Sign(payload, good)
	must(t, err)
	_, err = trust.Verify(both, payload)
	must(t, err)
	var e map[string]any
	must(t, json.Unmarshal(both, &e))
	e["signatures"].([]any)[1].(map[string]any)["sig"] = strings.Repeat("A", 86) + "=="
	data, err := json.Marshal(e)
	must(t, err)
	_, err = trust.Verify(data, payload)
	wantError(t, err, "is not right")
}

// FuzzEnvelope: only what the key has signed, as it was signed, has a signer; and what is
// accepted is bounded.
func FuzzEnvelope(f *testing.F) {
	d, k := newDir(f)
	trust, err := d.Trust()
	must(f, err)
	payload := []byte(`{"version":3}`)
	good, err := k.Sign(payload, nil)
	must(f, err)
	_, other := newDir(f)
	both, err := other.Sign(payload, good)
	must(f, err)
	for _, data := range [][]byte{good, both, []byte("{}"), []byte(fmt.Sprintf(`{"payloadType":%q,"payload":"","signatures":[{}]}`, PayloadType))} {
		f.Add(data, payload)
	}
	f.Fuzz(func(t *testing.T, data, claimed []byte) {
		e, err := decode(data)
		if err == nil && (len(e.signatures) == 0 || len(e.signatures) > maxSignatures) {
			t.Fatalf("%d signatures", len(e.signatures))
		}
		v, err := trust.Verify(data, claimed)
		if err != nil {
			return
		}
		if len(v.Signers)+len(v.Unknown) != len(e.signatures) || !bytes.Equal(e.payload, claimed) {
			t.Fatalf("%+v of %+v", v, e)
		}
		if len(v.Signers) > 0 && !bytes.Equal(claimed, payload) {
			t.Fatalf("%q has a signer", claimed)
		}
	})
}

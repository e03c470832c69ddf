package checkpoint

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// signedFolder is a checkpoint that was signed by the key of a node, with a large file.
func signedFolder(t testing.TB, key *sign.Key) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "c")
	f, err := NewFolder(dir)
	must(t, err)
	f.Key = key
	fill(t, f.Path())
	write(t, filepath.Join(f.Path(), "pages-9.img"), bytes.Repeat([]byte("x"), recheckSize+1))
	must(t, f.Commit(Manifest{Container: Container{ID: "c", Name: "app", Pod: &Pod{"web-0", "team", "7"}, SpecDigest: mustDigest(t, `{"a":1}`)}}, false))
	return dir
}

func mustDigest(t testing.TB, spec string) string {
	t.Helper()
	digest, err := SpecDigest([]byte(spec))
	must(t, err)
	return digest
}

// node is one with a key of its own, and what it trusts.
func node(t testing.TB) (*sign.Key, *sign.Trust) {
	t.Helper()
	dir := sign.Dir(filepath.Join(t.TempDir(), "stasis"))
	key, err := dir.Key()
	must(t, err)
	trust, err := dir.Trust()
	must(t, err)
	return key, trust
}

func TestSigned(t *testing.T) {
	key, trust := node(t)
	dir := signedFolder(t, key)
	for _, reread := range []bool{false, true} {
		ckpt, err := OpenWith(t.Context(), dir, OpenOptions{Trust: trust, Require: true, Reread: reread})
		must(t, err)
		if s, ok := ckpt.Signer(); !ok || !s.Own || s.KeyID != key.ID {
			t.Errorf("signer %+v, %v", s, ok)
		}
		if !ckpt.RanWith([]byte(` { "a" : 1, "annotations": {} } `)) || ckpt.RanWith([]byte(`{"a":2}`)) {
			t.Error("RanWith")
		}
	}
	// Another node does not know who that is, and takes it where it need not.
	_, others := node(t)
	ckpt, err := OpenWith(t.Context(), dir, OpenOptions{Trust: others})
	must(t, err)
	if _, ok := ckpt.Signer(); ok || ckpt.RanWith([]byte(`{"a":1}`)) {
		t.Error("another node knows the signer")
	}
	_, err = OpenWith(t.Context(), dir, OpenOptions{Trust: others, Require: true})
	wantError(t, err, errdefs.ErrPermissionDenied, "signed by key "+key.ID, "stasis key trust FILE")
	// It is replaced by one that is not signed, which has no envelope.
	f, err := NewFolder(dir)
	must(t, err)
	fill(t, f.Path())
	must(t, f.Commit(Manifest{}, false))
	if _, err := os.Lstat(filepath.Join(dir, layout.Signature)); err == nil {
		t.Error("an envelope is left")
	}
	_, err = OpenWith(t.Context(), dir, OpenOptions{Trust: trust, Require: true})
	wantError(t, err, errdefs.ErrPermissionDenied, "it is not signed", "stasis sign")
}

// TestSignedIsAltered alters a checkpoint that is signed: it is refused, required or
// not, and by nodes that do not know the key unless only that could tell.
func TestSignedIsAltered(t *testing.T) {
	key, trust := node(t)
	_, others := node(t)
	otherKey, _ := node(t)
	envelope := func(t *testing.T, dir string, do func(map[string]any)) {
		path := filepath.Join(dir, layout.Signature)
		data, err := os.ReadFile(path)
		must(t, err)
		var e map[string]any
		must(t, json.Unmarshal(data, &e))
		do(e)
		data, err = json.Marshal(e)
		must(t, err)
		write(t, path, data)
	}
	for name, c := range map[string]struct {
		alter  func(t *testing.T, dir string)
		want   string
		unseen bool // by who does not know the key
	}{
		"small file":        {func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "core-1.img"), 9) }, "core-1.img: altered", false},
		"first chunk":       {func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "pages-9.img"), 0) }, "pages-9.img: altered", false},
		"last chunk":        {func(t *testing.T, dir string) { flip(t, filepath.Join(dir, "pages-9.img"), recheckSize) }, "pages-9.img: altered", false},
		"missing file":      {func(t *testing.T, dir string) { must(t, os.Remove(filepath.Join(dir, "core-1.img"))) }, "core-1.img: missing", false},
		"added file":        {func(t *testing.T, dir string) { write(t, filepath.Join(dir, "core-9.img"), nil) }, "core-9.img", false},
		"namespace":         {func(t *testing.T, dir string) { edit(t, dir, `"team"`, `"mine"`) }, "stasis.json is not what was signed", false},
		"blank in manifest": {func(t *testing.T, dir string) { edit(t, dir, `{`, `{ `) }, "stasis.json is not what was signed", false},
		"no manifest": {func(t *testing.T, dir string) { must(t, os.Remove(filepath.Join(dir, layout.Manifest))) },
			"", false},
		"manifest and payload": {func(t *testing.T, dir string) {
			edit(t, dir, `"team"`, `"mine"`)
			data, err := os.ReadFile(filepath.Join(dir, layout.Manifest))
			must(t, err)
			made, err := otherKey.Sign(data, nil)
			must(t, err)
			var other map[string]any
			must(t, json.Unmarshal(made, &other))
			envelope(t, dir, func(e map[string]any) { e["payload"] = other["payload"] })
		}, "the signature of key " + sign.Short(key.ID) + " is not right", true},
		"signature": {func(t *testing.T, dir string) {
			envelope(t, dir, func(e map[string]any) {
				s := e["signatures"].([]any)[0].(map[string]any)
				sig := s["sig"].(string)
				s["sig"] = string('A'+(sig[0]-'A'+1)%20) + sig[1:]
			})
		}, "is not right", true},
		"payload type": {func(t *testing.T, dir string) {
			envelope(t, dir, func(e map[string]any) { e["payloadType"] = "text/plain" })
		}, "text/plain", false},
		"no signatures": {func(t *testing.T, dir string) { envelope(t, dir, func(e map[string]any) { e["signatures"] = []any{} }) }, "0 signatures", false},
		"no envelope":   {func(t *testing.T, dir string) { write(t, filepath.Join(dir, layout.Signature), []byte("{}")) }, layout.Signature, false},
		"large envelope": {func(t *testing.T, dir string) {
			must(t, os.Truncate(filepath.Join(dir, layout.Signature), 1<<20))
		}, "larger than", false},
		"older version": {func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, layout.Manifest), []byte(goodManifest))
		}, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := signedFolder(t, key)
			c.alter(t, dir)
			for _, o := range []OpenOptions{{Trust: trust}, {Trust: trust, Require: true}, {Trust: others}, {}} {
				o.Reread = true
				ckpt, err := OpenWith(t.Context(), dir, o)
				if c.unseen && (o.Trust == others || o.Trust == nil) {
					must(t, err)
					if _, ok := ckpt.Signer(); ok {
						t.Error("it has a signer")
					}
					continue
				}
				wantError(t, err, errdefs.ErrInvalidArgument, c.want)
			}
		})
	}
}

// TestSignLater signs what has no signature: of this version, of an older one, of other
// software. A key more is added to those that have signed.
func TestSignLater(t *testing.T) {
	key, trust := node(t)
	second, trustsSecond := node(t)
	old := signedFolder(t, nil)
	rewrite(t, old)
	for name, dir := range map[string]string{
		"this version": signedFolder(t, nil), "other software": realFolder(t, "runc-sleep"), "older version": old,
	} {
		t.Run(name, func(t *testing.T) {
			before, err := OpenWith(t.Context(), dir, OpenOptions{Trust: trust})
			must(t, err)
			if _, ok := before.Signer(); ok {
				t.Fatal("it is signed")
			}
			made := Manifest{Container: Container{ID: "other", Pod: &Pod{Namespace: "team"}}}
			must(t, Sign(t.Context(), dir, key, made))
			must(t, Sign(t.Context(), dir, second, made))
			for k, trust := range map[*sign.Key]*sign.Trust{key: trust, second: trustsSecond} {
				ckpt, err := OpenWith(t.Context(), dir, OpenOptions{Trust: trust, Require: true})
				must(t, err)
				if s, _ := ckpt.Signer(); s.KeyID != k.ID {
					t.Errorf("signed by %+v", s)
				}
				if ckpt.Options().OpenTCP != before.Options().OpenTCP || ckpt.Manifest().Container.Pod.Namespace != "team" {
					t.Errorf("manifest %+v", ckpt.Manifest())
				}
			}
		})
	}
	// What is not as it was made is not signed.
	dir := signedFolder(t, nil)
	flip(t, filepath.Join(dir, "pages-9.img"), 0)
	wantError(t, Sign(t.Context(), dir, key, Manifest{}), errdefs.ErrInvalidArgument, "pages-9.img: altered")
}

// rewrite gives a checkpoint a manifest of version 2.
func rewrite(t *testing.T, dir string) {
	t.Helper()
	m, err := readManifest(dir)
	must(t, err)
	m.Version, m.Container.Pod = 2, nil
	for i := range m.Files {
		f, err := os.Open(filepath.Join(dir, m.Files[i].Name))
		must(t, err)
		m.Files[i].Chunks = nil
		m.Files[i].Sum, err = oldSum(t.Context(), f, m.Files[i].Name)
		must(t, err)
		must(t, f.Close())
	}
	must(t, writeSigned(dir, m, nil, nil))
	if !strings.Contains(m.Files[0].Sum+m.Files[len(m.Files)-1].Sum, "sha256:") {
		t.Fatal("no old sums")
	}
}

// TestAddSumSigns: where a sum is left to AddSum, so is the signature; not what a
// shim of an older version has made.
func TestAddSumSigns(t *testing.T) {
	key, trust := node(t)
	for _, version := range []int{manifestVersion, 2} {
		dir := filepath.Join(t.TempDir(), "c")
		f, err := NewFolder(dir)
		must(t, err)
		fill(t, f.Path())
		f.LeaveSum = version == manifestVersion
		must(t, f.Commit(Manifest{}, false))
		if version == 2 {
			rewrite(t, dir)
			m, err := readManifest(dir)
			must(t, err)
			m.Files[len(m.Files)/2].Sum = ""
			must(t, writeSigned(dir, m, nil, nil))
		}
		must(t, AddSum(t.Context(), dir, File{}, key))
		ckpt, err := OpenWith(t.Context(), dir, OpenOptions{Trust: trust, Reread: true})
		must(t, err)
		if _, signed := ckpt.Signer(); signed != (version == manifestVersion) {
			t.Errorf("version %d: signed: %v", version, signed)
		}
	}
}

func TestSpecDigest(t *testing.T) {
	base := mustDigest(t, `{"process":{"args":["a"],"cwd":"/"},"hooks":null,"n":12345678901234567890}`)
	for spec, same := range map[string]bool{
		"{\n\t\"n\": 12345678901234567890, \"hooks\": null,\n \"process\": {\"cwd\":\"/\", \"args\": [\"a\"]}}\n":       true,
		`{"process":{"args":["\u0061"],"cwd":"/"},"hooks":null,"n":12345678901234567890,"annotations":{}}`:              true,
		`{"process":{"args":["a"],"cwd":"/"},"hooks":null,"n":12345678901234567891}`:                                    false,
		`{"process":{"args":["a"],"cwd":"/"},"hooks":{},"n":12345678901234567890}`:                                      false,
		`{"process":{"args":["a"],"cwd":"/"},"hooks":null,"Hooks":{},"n":12345678901234567890}`:                         false,
		`{"process":{"noNewPrivileges":true},"process":{"args":["a"],"cwd":"/"},"hooks":null,"n":12345678901234567890}`: false,
		`{"process":{"args":["a"],"cwd":"/"},"hookſ":{},"hooks":null,"n":12345678901234567890}`:                         false,
		`{"process":{"args":["a"],"cwd":"/"},"hooks":null,"n":12345678901234567890,"annotations":{"a":"b"}}`:            false,
		`{"process":{"args":["a"],"cwd":"/"},"hooks":null,"n":12345678901234567890} {}`:                                 false,
		`[]`: false, `null`: false, ``: false, `{`: false, `{"a":}`: false, `{"a":[1}`: false,
		strings.Repeat(`{"a":`, 1000) + "1" + strings.Repeat("}", 1000): false,
	} {
		digest, err := SpecDigest([]byte(spec))
		if same != (digest == base) || !same && err != nil && digest != "" {
			t.Errorf("%.100s: %s, %v", spec, digest, err)
		}
	}
}

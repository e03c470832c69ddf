package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// TestKeys goes through the commands for keys of two nodes, one of which trusts the
// other.
func TestKeys(t *testing.T) {
	at := func(node string, args ...string) (string, string) {
		t.Helper()
		t.Setenv("STASIS_CONFIG_DIR", node)
		code, out, errs := stasis(t, args...)
		if code != 0 {
			t.Errorf("stasis %q: exit code %d, %s", args, code, errs)
		}
		return strings.TrimSpace(out), errs
	}
	fails := func(node, says string, args ...string) {
		t.Helper()
		t.Setenv("STASIS_CONFIG_DIR", node)
		if code, _, errs := stasis(t, args...); code != exitFailed || !strings.Contains(errs, says) {
			t.Errorf("stasis %q: exit code %d, %s; want %q", args, code, errs, says)
		}
	}
	here, there := filepath.Join(t.TempDir(), "here"), filepath.Join(t.TempDir(), "there")
	fails(there, "stasis key init", "key", "show")
	id, _ := at(there, "key", "init")
	if again, says := at(there, "key", "init"); again != id || !strings.Contains(says, "has a key already") {
		t.Errorf("init again: %s, %q", again, says)
	}
	var shown shownKey
	out, _ := at(there, "key", "show", "-o", "json")
	must0(t, json.Unmarshal([]byte(out), &shown))
	if shown.Key != id || shown.File != filepath.Join(there, "keys", "sign.key") || strings.Contains(out, "PRIVATE") {
		t.Errorf("show: %s", out)
	}
	public := filepath.Join(t.TempDir(), "there.pub")
	must0(t, os.WriteFile(public, []byte(shown.Public), 0o644))

	own, _ := at(here, "key", "init")
	fails(here, "no PEM", "key", "trust", filepath.Join(here, "keys", "sign.key"))
	if out, _ := at(here, "key", "trust", public); out != id {
		t.Errorf("trust printed %q", out)
	}
	out, _ = at(here, "key", "list")
	if !strings.Contains(out, own+"   this node's") || !strings.Contains(out, id+"   trusted") {
		t.Errorf("list:\n%s", out)
	}
	fails(here, "this node signs with", "key", "remove", own)
	fails(here, "no key that is trusted", "key", "remove", "0123")
	at(here, "key", "remove", id)
	out, _ = at(here, "key", "list", "-o", "json")
	var keys []sign.Signer
	must0(t, json.Unmarshal([]byte(out), &keys))
	if len(keys) != 1 || keys[0].KeyID != own || !keys[0].Own {
		t.Errorf("list: %s", out)
	}
	if out, _ := at(filepath.Join(t.TempDir(), "none"), "key", "list", "-o", "json"); out != "[]" {
		t.Errorf("list of none: %q", out)
	}
}

func TestVerify(t *testing.T) {
	there, here := sign.Dir(filepath.Join(t.TempDir(), "there")), filepath.Join(t.TempDir(), "here")
	t.Setenv("STASIS_CONFIG_DIR", here)
	dir := filepath.Join(t.TempDir(), "checkpoint")
	must0(t, os.CopyFS(dir, os.DirFS(sleep)))
	verify := func(want int, says ...string) {
		t.Helper()
		code, out, errs := stasis(t, "verify", dir)
		for _, s := range says {
			if code != want || !strings.Contains(out+errs, s) {
				t.Errorf("exit code %d, want %d; %q in\n%s%s", code, want, s, out, errs)
			}
		}
	}
	verify(exitFailed, "it is not signed", "stasis sign")
	key, err := there.Key()
	must0(t, err)
	must0(t, checkpoint.Sign(t.Context(), dir, key, checkpoint.Manifest{
		Container: checkpoint.Container{ID: "c", Name: "app", Pod: &checkpoint.Pod{Name: "web-0", Namespace: "team"}}, Host: "node-7"}))
	verify(exitFailed, key.ID+" (not trusted here, and not verified)", "signed by key "+key.ID, "stasis key trust FILE")
	if code, out, _ := stasis(t, "inspect", dir); code != 0 || !strings.Contains(out, sign.Short(key.ID)+" (not trusted here)") {
		t.Errorf("inspect: exit code %d\n%s", code, out)
	}
	public, err := key.Public()
	must0(t, err)
	_, err = sign.Dir(here).Add(public)
	must0(t, err)
	verify(0, key.ID+" (trusted)", "team/web-0/app", "node-7", "another than was signed")
	data, err := os.ReadFile(filepath.Join(dir, "core-1.img"))
	must0(t, err)
	data[20] ^= 1
	must0(t, os.WriteFile(filepath.Join(dir, "core-1.img"), data, 0o600))
	verify(exitFailed, "core-1.img: altered")
	must0(t, os.WriteFile(filepath.Join(dir, "stasis.sig.json"), []byte("{}"), 0o600))
	verify(exitFailed, "stasis.sig.json")
	if code, out, errs := stasis(t, "inspect", dir); code != 0 || !strings.Contains(out, "not valid") {
		t.Errorf("inspect: exit code %d\n%s%s", code, out, errs)
	}
}

package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

// effective is the configuration that a command line comes to.
func effective(t *testing.T, file string, args ...string) (config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "stasisd.toml")
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	var got config
	cmd := newCommand(io.Discard, io.Discard, func(_ context.Context, c config, _ io.Writer) error {
		got = c
		return nil
	})
	cmd.SetArgs(append([]string{"--config", path}, args...))
	return got, cmd.Execute()
}

func TestConfig(t *testing.T) {
	fromDefaults, err := effective(t, "")
	if err != nil || !reflect.DeepEqual(fromDefaults, defaults()) {
		t.Errorf("an empty file is %+v, %v; want the defaults", fromDefaults, err)
	}
	c, err := effective(t, `
		listen = ["unix:///a", "tcp://127.0.0.1:1"]
		insecure_loopback = true
		allow_paths = ["/srv"]
		[tls]
		cert = "/c"
		[[clients]]
		name = "ci"
		token = "sha256:x"
		scopes = ["read"]
		namespaces = ["*"]`, "--allow-path", "/one", "--allow-path", "/two", "--log-level", "debug")
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(c.Listen, []string{"unix:///a", "tcp://127.0.0.1:1"}) || !c.InsecureLoopback || c.TLS.Cert != "/c" || len(c.Clients) != 1 ||
		c.LogLevel != "debug" || !reflect.DeepEqual(c.AllowPaths, []string{"/one", "/two"}) || c.State != "/var/lib/stasis" {
		t.Errorf("%+v", c)
	}
	for file, want := range map[string]string{
		`allow_path = ["/srv"]`:                  "allow_path",
		"[[clients]]\nscope = [\"read\"]":        "scope",
		`listen = 1`:                             "listen",
		`allow_paths = ["srv"]`:                  "absolute",
		`state = "here"`:                         "absolute",
		`log_level = "info"` + "\nlog_level = 1": "log_level",
	} {
		if _, err := effective(t, file); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want an error about %s", file, err, want)
		}
	}
	if _, err := readConfig(filepath.Join(t.TempDir(), "none"), true); err == nil {
		t.Error("a file that was named and is not there is no error")
	}
	if c, err := readConfig(filepath.Join(t.TempDir(), "none"), false); err != nil || !reflect.DeepEqual(c, defaults()) {
		t.Errorf("no file: %+v, %v", c, err)
	}
}

// TestEveryKeyIsAFlag: clients aside, which have no form on a command line.
func TestEveryKeyIsAFlag(t *testing.T) {
	var keys map[string]any
	if err := toml.Unmarshal(defaultConfig, &keys); err != nil {
		t.Fatal(err)
	}
	cmd := newCommand(io.Discard, io.Discard, nil)
	for key, value := range keys {
		names := []string{key}
		if table, ok := value.(map[string]any); ok {
			names = nil
			for k := range table {
				names = append(names, key+"-"+k)
			}
		}
		for _, name := range names {
			name = strings.ReplaceAll(strings.TrimSuffix(name, "_paths"), "_", "-")
			if key == "allow_paths" {
				name = "allow-path"
			}
			f := cmd.Flags().Lookup(name)
			if f == nil {
				t.Errorf("key %s has no flag --%s", key, name)
			}
		}
	}
}

func output(t *testing.T, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	cmd := newCommand(&out, io.Discard, func(context.Context, config, io.Writer) error {
		t.Error("it serves")
		return nil
	})
	cmd.SetArgs(args)
	if err := cmd.Execute(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestConfigDefault(t *testing.T) {
	c, err := effective(t, output(t, "config", "default"))
	if err != nil || !reflect.DeepEqual(c, defaults()) {
		t.Errorf("config default is %+v, %v; want the defaults", c, err)
	}
}

// TestToken: what it prints is a client whom the configuration takes.
func TestToken(t *testing.T) {
	one, two := output(t, "token", "ci"), output(t, "token", "ci")
	if one == two {
		t.Error("two tokens are the same")
	}
	c, err := effective(t, one)
	if err != nil || len(c.Clients) != 1 || c.Clients[0].Name != "ci" || len(c.Clients[0].Token) != len("sha256:")+64 {
		t.Errorf("%s: %+v, %v", one, c.Clients, err)
	}
}

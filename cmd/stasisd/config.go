package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pelletier/go-toml/v2"

	"github.com/stasis-run/stasis/node/rest"
)

// config is the file /etc/stasis/stasisd.toml; defaultConfig describes each key.
type config struct {
	Listen           []string `toml:"listen"`
	InsecureLoopback bool     `toml:"insecure_loopback"`
	Address          string   `toml:"address"`
	Namespace        string   `toml:"namespace"`
	State            string   `toml:"state"`
	AllowPaths       []string `toml:"allow_paths"`
	LogLevel         string   `toml:"log_level"`
	TLS              struct {
		Cert     string `toml:"cert"`
		Key      string `toml:"key"`
		ClientCA string `toml:"client_ca"`
	} `toml:"tls"`
	Clients []rest.Client `toml:"clients"`
}

const defaultPath = "/etc/stasis/stasisd.toml"

// defaultConfig is what `stasisd config default` prints.
//
//go:embed default.toml
var defaultConfig []byte

// defaults are those of defaultConfig.
func defaults() config {
	var c config
	if err := toml.Unmarshal(defaultConfig, &c); err != nil {
		panic(err)
	}
	return c
}

// readConfig reads a file. If it is the default one, it need not be there. A key that is
// not known is an error: it may be a restriction that was misspelt.
func readConfig(path string, named bool) (config, error) {
	c := defaults()
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	if err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(&c); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) {
			return c, fmt.Errorf("%s: unknown key:\n%s", path, strict.String())
		}
		var where *toml.DecodeError
		if errors.As(err, &where) {
			return c, fmt.Errorf("%s: %s", path, where.String())
		}
		return c, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// check says what is wrong with values that nothing else looks at.
func (c *config) check() error {
	for _, p := range append([]string{c.State, c.Address}, c.AllowPaths...) {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("configuration: %q is no absolute path", p)
		}
	}
	return nil
}

// serverTLS is nil if none is configured.
func (c *config) serverTLS() (*tls.Config, error) {
	t := c.TLS
	if t.Cert == "" && t.Key == "" && t.ClientCA == "" {
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	o := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, NextProtos: []string{"http/1.1"}}
	if t.ClientCA != "" {
		pem, err := os.ReadFile(t.ClientCA)
		if err != nil {
			return nil, fmt.Errorf("tls.client_ca: %w", err)
		}
		o.ClientCAs = x509.NewCertPool()
		if !o.ClientCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("tls.client_ca: %s has no certificate", t.ClientCA)
		}
		// A client may show a token instead.
		o.ClientAuth = tls.VerifyClientCertIfGiven
	}
	return o, nil
}

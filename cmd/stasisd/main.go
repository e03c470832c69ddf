// Command stasisd serves the containers and checkpoints of a node by HTTP. What it serves
// is in package node/rest; here are flags, configuration and listeners.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/node"
	"github.com/stasis-run/stasis/node/rest"
)

// Set by the build, with -ldflags "-X main.version=...".
var (
	version = "dev"
	commit  = "unknown"
	date    = "unknown"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends us at once
	if err := newCommand(os.Stdout, os.Stderr, serve).ExecuteContext(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "stasisd: %v\n", err)
		os.Exit(1)
	}
}

func newCommand(out, logs io.Writer, serve func(context.Context, config, io.Writer) error) *cobra.Command {
	path, c := defaultPath, defaults()
	root := &cobra.Command{
		Use:   "stasisd",
		Short: "Serve this node's containers and checkpoints by HTTP",
		Long: `stasisd serves the containers and checkpoints of a node by HTTP. docs/rest-api.md
describes the requests.

By default it listens on a Unix socket that only root can use. On TCP it needs TLS, and
clients show a token or a certificate. SIGTERM ends it when the requests at work are
answered, 30 seconds later at most; containers run on.`,
		Example: `  stasisd --allow-path /srv/bundles
  curl --unix-socket /run/stasis/stasisd.sock http://node/state`,
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			merged, err := c.overFile(cmd, path)
			if err != nil {
				return err
			}
			return serve(cmd.Context(), merged, logs)
		},
	}
	root.SetOut(out)
	root.SetErr(logs)
	f := root.Flags()
	f.StringVar(&path, "config", path, "configuration file")
	f.StringArrayVar(&c.Listen, "listen", c.Listen, "unix:///PATH or tcp://ADDRESS:PORT; repeatable")
	f.BoolVar(&c.InsecureLoopback, "insecure-loopback", false, "TCP on loopback without TLS and tokens: every user of this host may do everything")
	f.StringVar(&c.Address, "address", c.Address, "containerd's socket")
	f.StringVar(&c.Namespace, "namespace", c.Namespace, "containerd's namespace of containers that are started from bundles")
	f.StringVar(&c.State, "state", c.State, "folder for work under way and checkpoints")
	f.StringArrayVar(&c.AllowPaths, "allow-path", nil, "folder below which requests may name bundles and files; repeatable")
	f.StringVar(&c.LogLevel, "log-level", c.LogLevel, "debug, info, warn or error")
	f.StringVar(&c.TLS.Cert, "tls-cert", "", "PEM file with the certificate for TCP")
	f.StringVar(&c.TLS.Key, "tls-key", "", "PEM file with its key")
	f.StringVar(&c.TLS.ClientCA, "tls-client-ca", "", "PEM file with the authority of clients' certificates")
	root.AddCommand(newConfigCommand(), newTokenCommand(), &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			fmt.Fprintf(cmd.OutOrStdout(), "stasisd %s (commit %s, %s)\n", version, commit, date)
		},
	})
	return root
}

// overFile is what the file says, with the flags that were given in place of its keys.
func (c *config) overFile(cmd *cobra.Command, path string) (config, error) {
	f := cmd.Flags()
	merged, err := readConfig(path, f.Changed("config"))
	if err != nil {
		return merged, err
	}
	for name, set := range map[string]func(){
		"listen":            func() { merged.Listen = c.Listen },
		"insecure-loopback": func() { merged.InsecureLoopback = c.InsecureLoopback },
		"address":           func() { merged.Address = c.Address },
		"namespace":         func() { merged.Namespace = c.Namespace },
		"state":             func() { merged.State = c.State },
		"allow-path":        func() { merged.AllowPaths = c.AllowPaths },
		"log-level":         func() { merged.LogLevel = c.LogLevel },
		"tls-cert":          func() { merged.TLS.Cert = c.TLS.Cert },
		"tls-key":           func() { merged.TLS.Key = c.TLS.Key },
		"tls-client-ca":     func() { merged.TLS.ClientCA = c.TLS.ClientCA },
	} {
		if f.Changed(name) {
			set()
		}
	}
	return merged, merged.check()
}

func newConfigCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "config", Short: "About the configuration", Args: cobra.NoArgs}
	cmd.AddCommand(&cobra.Command{
		Use: "default", Short: "Print the configuration with its defaults", Args: cobra.NoArgs,
		Example: "  stasisd config default >" + defaultPath,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(defaultConfig)
			return err
		},
	})
	return cmd
}

func newTokenCommand() *cobra.Command {
	return &cobra.Command{
		Use: "token NAME", Short: "Make a token for a client, and print what the configuration says of it",
		Args:    cobra.ExactArgs(1),
		Example: "  stasisd token ci",
		RunE: func(cmd *cobra.Command, args []string) error {
			token := rand.Text()
			_, err := fmt.Fprintf(cmd.OutOrStdout(), `# The client's token, which is nowhere else: %s
[[clients]]
name = %q
token = %q
scopes = ["read"]
namespaces = ["default"]
`, token, args[0], rest.HashToken(token))
			return err
		},
	}
}

// serve serves until ctx ends.
func serve(ctx context.Context, c config, logs io.Writer) error {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return fmt.Errorf("log_level: %w", err)
	}
	log := slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: level}))
	n := node.Dial(c.Address, node.Options{State: c.State, Version: version, Logger: log, ImagesOnly: true})
	defer n.Close()
	handler, err := rest.New(rest.Options{Node: n, Namespace: c.Namespace, Address: c.Address, State: c.State, AllowPaths: c.AllowPaths, Clients: c.Clients, Log: log})
	if err != nil {
		return err
	}
	defer handler.Close()
	listeners, err := c.listen()
	if err != nil {
		return err
	}
	server := rest.Serve(handler)
	server.ErrorLog = slog.NewLogLogger(log.Handler(), slog.LevelDebug)
	// What is at work outlives ctx, for rest.GraceTime.
	working, abort := context.WithCancel(context.WithoutCancel(ctx))
	defer abort()
	server.BaseContext = func(net.Listener) context.Context { return working }

	running, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, 1+len(listeners))
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		failed <- handler.Run(running, func() {
			for _, l := range listeners {
				log.Info("serve", "address", l.Addr().Network()+"://"+l.Addr().String())
				go func() { failed <- server.Serve(l) }()
			}
			_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
		})
	}()
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	cancel() // no new jobs; those at work have rest.GraceTime, as requests have
	grace, stop := context.WithTimeout(context.WithoutCancel(ctx), rest.GraceTime)
	defer stop()
	if serr := server.Shutdown(grace); serr != nil {
		// What was at work is undone, not left half way.
		abort()
		last, stop := context.WithTimeout(context.WithoutCancel(ctx), rest.GraceTime)
		defer stop()
		err = errors.Join(err, server.Shutdown(last))
	}
	<-watched
	for _, l := range listeners {
		l.Close() // again, if it was served
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// listen opens the listeners. Sockets that systemd has opened for us take the place of the
// configured ones that are Unix sockets.
func (c *config) listen() (listeners []net.Listener, err error) {
	if listeners, err = activation.Listeners(); err != nil {
		return nil, fmt.Errorf("take the sockets from systemd: %w", err)
	}
	activated := len(listeners) > 0
	for _, l := range listeners {
		if l.Addr().Network() != "unix" {
			return nil, fmt.Errorf("systemd has opened %s for us: only Unix sockets are taken so; configure listen for TCP", l.Addr())
		}
	}
	tlsConfig, err := c.serverTLS()
	if err != nil {
		return nil, err
	}
	for _, address := range c.Listen {
		if activated && strings.HasPrefix(address, "unix:") {
			continue
		}
		l, err := rest.Listen(address, rest.ListenOptions{TLS: tlsConfig, InsecureLoopback: c.InsecureLoopback})
		if err != nil {
			for _, open := range listeners {
				open.Close()
			}
			return nil, err
		}
		listeners = append(listeners, l)
	}
	if len(listeners) == 0 {
		return nil, errors.New("listen is empty")
	}
	return listeners, nil
}

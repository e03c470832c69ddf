package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/sign"
)

// newKeyCommand is for the keys that checkpoints are signed with.
func newKeyCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "Manage the keys that sign checkpoints",
		Long: `Manage the keys that sign checkpoints. A node signs with its own key, which it trusts,
and which is made with its first checkpoint. A pod restores only what a key has
signed that its node trusts; so for a checkpoint of another node, that node's
public key has to be trusted here.

Keys are in /etc/stasis, or in $STASIS_CONFIG_DIR: keys/sign.key is the private key,
trusted/*.pub are the public keys of others.`,
		Example: `  stasis key init
  ssh other stasis key show | stasis key trust -
  stasis key list`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.AddCommand(newKeyInitCommand(a), newKeyShowCommand(a), newKeyTrustCommand(a), newKeyListCommand(a), newKeyRemoveCommand(a))
	return cmd
}

// shownKey is what `stasis key init` and `stasis key show` print with -o json.
type shownKey struct {
	Key    string `json:"key"`
	Public string `json:"public"` // PEM
	File   string `json:"file"`   // of the private key
	Made   bool   `json:"made"`
}

func showKey(k *sign.Key, made bool) (*shownKey, error) {
	public, err := k.Public()
	return &shownKey{k.ID, string(public), sign.DefaultDir().KeyPath(), made}, err
}

func newKeyInitCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "init",
		Short: "Make the key that this node signs with, unless it has one",
		Long: `Make the key that this node signs with, and print its ID. If there is one, that stays:
to replace it, remove the file, having had the old public key trusted, so that older
checkpoints are still restored.`,
		Example: `  stasis key init
  stasis key show > old.pub && stasis key trust old.pub   # before a rotation`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			dir := sign.DefaultDir()
			_, err := dir.ReadKey()
			made := errors.Is(err, fs.ErrNotExist)
			k, err := dir.Key()
			if err != nil {
				return err
			}
			if a.json() {
				shown, err := showKey(k, made)
				if err != nil {
					return err
				}
				return printJSON(a.out, shown)
			}
			if !made {
				fmt.Fprintf(a.err, "stasis: this node has a key already, %s\n", dir.KeyPath())
			}
			_, err = fmt.Fprintln(a.out, k.ID)
			return err
		},
	}
}

func newKeyShowCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "show",
		Short: "Print the public key that belongs to this node's signatures",
		Long: `Print the public key that belongs to this node's signatures, as PEM: another node
that is given it ("stasis key trust") restores what was signed here.`,
		Example: `  stasis key show > node1.pub
  stasis key show -o json | jq -r .key`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			k, err := sign.DefaultDir().ReadKey()
			if errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("this node has no key yet: the first checkpoint makes one, or `stasis key init`: %w", errdefs.ErrNotFound)
			}
			if err != nil {
				return err
			}
			shown, err := showKey(k, false)
			if err != nil {
				return err
			}
			if a.json() {
				return printJSON(a.out, shown)
			}
			fmt.Fprintf(a.err, "stasis: key %s\n", k.ID)
			_, err = fmt.Fprint(a.out, shown.Public)
			return err
		},
	}
}

func newKeyTrustCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "trust FILE",
		Short: "Trust another node's public key",
		Long: `Trust a public key, as "stasis key show" prints it where it signs; "-" is stdin. From
then on pods of this node restore what it has signed.`,
		Example: `  stasis key trust node1.pub
  ssh node1 stasis key show | stasis key trust -`,
		Args: cobra.ExactArgs(1),
		ValidArgsFunction: firstArgs(1, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"pub", "pem"}, cobra.ShellCompDirectiveFilterFileExt
		}),
		RunE: func(_ *cobra.Command, args []string) error {
			in := a.in
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			}
			// A key has some hundred bytes.
			data, err := io.ReadAll(io.LimitReader(in, 64<<10))
			if err != nil {
				return err
			}
			s, err := sign.DefaultDir().Add(data)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			return a.printSigner(s)
		},
	}
}

func newKeyListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the keys that this node trusts",
		Example: `  stasis key list
  stasis key list -o json | jq -r '.[].key'`,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			trust, err := sign.DefaultDir().Trust()
			if err != nil {
				return err
			}
			for _, err := range trust.Skipped {
				fmt.Fprintf(a.err, "stasis: not trusted: %v\n", err)
			}
			keys := trust.Keys()
			if a.json() {
				return printJSON(a.out, append([]sign.Signer{}, keys...))
			}
			t := newTable(a.out, "KEY", "WHOSE", "FILE")
			for _, k := range keys {
				t.row(k.KeyID, k.Whose(), k.File)
			}
			return t.end()
		},
	}
}

func newKeyRemoveCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "remove ID",
		Aliases: []string{"rm"},
		Short:   "Trust a key no longer",
		Long: `Trust a key no longer. ID may be the beginning of one. The node's own key cannot be
removed.`,
		Example: `  stasis key remove 3f6c1b0a9e2d4c58`,
		Args:    cobra.ExactArgs(1),
		ValidArgsFunction: firstArgs(1, func(*cobra.Command, []string, string) (ids []string, _ cobra.ShellCompDirective) {
			trust, err := sign.DefaultDir().Trust()
			if err == nil {
				for _, k := range trust.Keys() {
					if !k.Own {
						ids = append(ids, k.KeyID)
					}
				}
			}
			return ids, cobra.ShellCompDirectiveNoFileComp
		}),
		RunE: func(_ *cobra.Command, args []string) error {
			s, err := sign.DefaultDir().Remove(args[0])
			if err != nil {
				return err
			}
			return a.printSigner(s)
		},
	}
}

func (a *app) printSigner(s sign.Signer) error {
	if a.json() {
		return printJSON(a.out, s)
	}
	_, err := fmt.Fprintln(a.out, s.KeyID)
	return err
}

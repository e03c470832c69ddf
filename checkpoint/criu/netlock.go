package criu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"

	"github.com/stasis-run/stasis/process"
)

// unlockNetwork removes CRIU's rules from the network namespace that the calling
// thread is in.
func unlockNetwork(ids []string) error {
	return errors.Join(unlockNFT(ids), unlockIPTables("iptables"), unlockIPTables("ip6tables"))
}

// unlockNFT removes the nftables table that CRIU makes for a dump. Its name has
// CRIU's run ID, before CRIU 4.1 init's pid, so another container's, in a
// namespace that both share, stays.
func unlockNFT(ids []string) error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	tables, err := conn.ListTables()
	if err != nil {
		return nil // a kernel without nftables, which CRIU then did not use
	}
	for _, t := range tables {
		if id, ok := strings.CutPrefix(t.Name, "CRIU-"); ok && slices.Contains(ids, id) {
			conn.DelTable(t)
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("remove CRIU's nftables table: %w", err)
	}
	return nil
}

// unlockIPTables removes CRIU's iptables rules: those that match its packet
// mark 0xC114, and the chain CRIU that locks a whole namespace.
func unlockIPTables(tool string) error {
	out, err := process.Output(context.Background(), tool+"-save", "-t", "filter")
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(out)) {
		args := strings.Fields(line)
		if len(args) < 2 || args[0] != "-A" {
			continue
		}
		mark := strings.Contains(strings.ToLower(line), "0xc114")
		jump := strings.HasSuffix(strings.TrimSpace(line), "-j CRIU")
		if args[1] == "CRIU" || !mark && !jump {
			continue
		}
		if err := run(tool, append([]string{"-w", "-D"}, args[1:]...)...); err != nil {
			return err
		}
	}
	if !bytes.Contains(out, []byte(":CRIU ")) {
		return nil
	}
	return errors.Join(run(tool, "-w", "-F", "CRIU"), run(tool, "-w", "-X", "CRIU"))
}

func run(name string, args ...string) error {
	_, err := process.Output(context.Background(), name, args...)
	return err
}

package main

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/policy/allow"
)

// greedy asks for something of each kind that a flag grants.
const greedy = `{
"process": {"cwd": "/", "capabilities": {"bounding": ["CAP_SYS_ADMIN"]}, "oomScoreAdj": -1, "apparmorProfile": "mine",
	"rlimits": [{"type": "RLIMIT_RTPRIO", "hard": 18446744073709551615, "soft": 0}]},
"root": {"path": "x"},
"mounts": [{"destination": "/m", "type": "bind", "source": "/it's here, 'now'"}, {"destination": "/o", "type": "overlay"}],
"hooks": {"poststart": [{"path": "/bin/evil"}]},
"linux": {"cgroupsPath": "/apps/db/c", "namespaces": [{"type": "mount"}, {"type": "network", "path": "/run"}, {"type": "time", "path": "/run"}],
	"sysctl": {"kernel.core_pattern": "x"}, "devices": [{"path": "/dev/x", "type": "b", "major": 8, "minor": 0}],
	"resources": {"devices": [{"allow": true, "access": "rwm"}]}}}`

// TestGrantFlags gives the flags that a refusal names, as a shell would.
func TestGrantFlags(t *testing.T) {
	parse := func(args ...string) *restoreFlags {
		f := &restoreFlags{}
		cmd := &cobra.Command{}
		cmd.Flags().StringVar(&f.request.Grants.Network, "network", "", "")
		grantFlags(cmd, f)
		must0(t, cmd.ParseFlags(args))
		return f
	}
	judge := func(f *restoreFlags, own bool) (*specs.Spec, []allow.Ask, error) {
		asked, unknown, err := allow.Parse([]byte(greedy))
		must0(t, err)
		grants := f.request.Grants
		grants.Seccomp = f.seccomp.value
		return allow.New(asked, unknown, allow.Options{Grants: grants, Own: own, ID: "c", Namespace: "ns", Host: allow.ThisHost()})
	}
	_, _, err := judge(parse(), false)
	if !errdefs.IsPermissionDenied(err) {
		t.Fatal(err)
	}
	_, flags, _ := strings.Cut(err.Error(), "add: ")
	words, err := exec.Command("sh", "-c", `printf '%s\n' `+flags).Output()
	must0(t, err)
	args := strings.Split(strings.TrimSpace(string(words)), "\n")
	for _, f := range []*restoreFlags{parse(args...), parse("--privileged")} {
		spec, asks, err := judge(f, false)
		if err != nil || spec.Hooks != nil || len(spec.Mounts) != 2 || spec.Linux.CgroupsPath != "/apps/db/c" {
			t.Errorf("%q: %v", args, err)
		}
		var errs strings.Builder
		(&app{err: &errs}).tellAsks(asks, f.request.Grants.Privileged)
		if warned := strings.Contains(errs.String(), "WARNING") && strings.Contains(errs.String(), "CAP_SYS_ADMIN"); warned != f.request.Grants.Privileged {
			t.Errorf("it says %s", errs.String())
		}
		if !strings.Contains(errs.String(), "/bin/evil") {
			t.Errorf("no word of the hook in %s", errs.String())
		}
	}
	for _, arg := range args {
		if !strings.HasPrefix(arg, "--") {
			continue
		}
		if code, _, errs := stasis(t, "restore", arg+"=x", "--help"); arg != "--allow-new-privs" && arg != "--allow-seccomp" && code != 0 {
			t.Errorf("restore has no %s: %s", arg, errs)
		}
	}
	if spec, _, err := judge(parse(), true); err != nil || spec.Hooks != nil {
		t.Errorf("its own: %v", err)
	}
}

func TestCompleteGrants(t *testing.T) {
	for flag, want := range map[string]string{
		"allow-capability": "CAP_SYS_ADMIN", "allow-host": "pid", "allow-seccomp": "unconfined", "allow-priority": "oom", "allow-ulimit": "nofile",
		"allow-unmask": "/proc/kcore", "allow-sysctl": "all", "allow-label": "all", "network": "host",
	} {
		if _, out, _ := stasis(t, "__complete", "restore", "--"+flag, ""); !strings.Contains(out, want+"\n") {
			t.Errorf("--%s proposes %q", flag, out)
		}
	}
}

package main

import (
	"fmt"
	"strings"
)

// A variant is one boot of the machine.
type variant struct {
	name string
	// init is the machine's first program, and what follows it on the kernel's
	// command line.
	init   string
	passes []pass
}

// A pass is one run of the tests, on one set of programs.
type pass struct {
	name string
	// debian has the tests run on what Debian itself ships: containerd 1.7,
	// runc, crun and CRIU.
	debian bool
	// systemd has it make the containers' cgroups.
	systemd bool
	tests   []string
	skip    []string
}

var variants = []variant{
	{
		name: "cgroupfs",
		init: "/stasis/guest",
		passes: []pass{
			{name: "current", tests: core},
			{name: "debian", debian: true, tests: debianCore},
		},
	},
	{
		name: "systemd",
		init: "/usr/lib/systemd/systemd systemd.firstboot=off systemd.condition_first_boot=false systemd.mask=ldconfig.service " +
			"systemd.run=/stasis/guest systemd.run_success_action=poweroff-force systemd.run_failure_action=poweroff-force",
		passes: []pass{{name: "current", systemd: true, tests: systemdCore}},
	},
}

// core are the tests that ask something of the kernel or of cgroups.
var core = []string{
	"TestTaskCore/(by_name|drop-in|crun|1.7,_by_name|2.1,_by_name)",
	"TestTerminal", "TestStats", "TestOOM", "TestOOMOfExec", "TestOneShimPerPod",
	"TestRestoreEverywhere/(stasis|crun|native|2.1)", "TestRoundTrip/(erofs.*|blockfile)", "TestRestoredContainer", "TestRestoreTerminal", "TestRestoreElsewhere",
	"TestLimitsAfterRestore", "TestNestedCgroups", "TestAppArmor",
	"TestCheckpointState", "TestStoppedProcess", "TestFreeze", "TestRestoreTCP", "TestPreDump/runc/state", "TestPreDump/crun/pages", "TestParentPath/runc/memory",
	"TestSmokeCRI", "TestEmbeddedAgain", "TestRunnableUnderCRI", "TestCLIRestore",
}

var debianCore = []string{
	"TestTaskCore/(by_name|drop-in|crun)", "TestStats", "TestOOM",
	"TestRestoredContainer", "TestRestoreElsewhere", "TestLimitsAfterRestore", "TestNestedCgroups", "TestAppArmor",
}

var systemdCore = []string{
	"TestTaskCore/(by_name|crun)", "TestStats", "TestOOM", "TestRestoredContainer", "TestRestoreElsewhere", "TestLimitsAfterRestore", "TestNestedCgroups",
	"TestSmokeCRI", "TestCLIRestore",
}

// pattern is what selects tests, or subtests, by their names. What follows a test's
// name is a regular expression.
func pattern(tests []string) string {
	var all []string
	for _, t := range tests {
		name, subtest, ok := strings.Cut(t, "/")
		t = "^" + name + "$"
		if ok {
			t += "/^" + subtest + "$"
		}
		all = append(all, t)
	}
	return strings.Join(all, "|")
}

// environment is the pass as a shell script that sets variables.
func (p pass) environment(cache, run string, slow int) string {
	env := map[string]string{
		"STASIS_CACHE": cache, "STASIS_BIN": "/stasis/bin", "STASIS_TEST_BIN": "/stasis/test",
		"STASIS_TEST_SLOW": fmt.Sprint(slow),
		"TEST_TIMEOUT":     "30m",
		"TEST_RUN":         pattern(p.tests),
		"TEST_SKIP":        pattern(p.skip),
	}
	if p.debian {
		env["STASIS_CACHE"] = "/stasis/debian"
		env["STASIS_TEST_CONTAINERD"] = "1.7"
	}
	if p.systemd {
		env["STASIS_TEST_SYSTEMD"] = "1"
	}
	if run != "" {
		env["TEST_RUN"], env["TEST_SKIP"] = run, ""
	}
	var b strings.Builder
	for name, value := range env {
		fmt.Fprintf(&b, "%s='%s'\n", name, strings.ReplaceAll(value, "'", `'\''`))
	}
	return b.String()
}

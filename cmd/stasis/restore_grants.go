package main

import (
	"github.com/spf13/cobra"

	"github.com/stasis-run/stasis/checkpoint/policy/allow"
)

// grantFlags adds the flags by which a caller grants what a checkpoint's spec asks
// for. Package allow names them in its errors.
func grantFlags(cmd *cobra.Command, f *restoreFlags) {
	flags, g := cmd.Flags(), &f.request.Grants
	for _, l := range []struct {
		to                 *[]string
		name, usage, words string
	}{
		{&g.Mounts, "allow-mount", "grant a mount of the host, `SRC[:DST]`, or all of them", ""},
		{&g.Devices, "allow-device", "grant a device: its `PATH` on the host, a rule such as 'c 10:229 rwm', or all", ""},
		{&g.Namespaces, "allow-host", "grant a `NAMESPACE` of the host: pid, network, ipc, uts; one by its path; or all", "Namespaces"},
		{&g.Capabilities, "allow-capability", "grant a capability beyond containerd's default, such as `CAP_SYS_ADMIN`, or all", "Capabilities"},
		{&g.Unmask, "allow-unmask", "let a `PATH` of /proc or /sys be unmasked or writable, or all", "Unmask"},
		{&g.Sysctls, "allow-sysctl", "grant a kernel setting that is not of the container's own namespaces, by its `NAME`, or all", "Sysctls"},
		{&g.Ulimits, "allow-ulimit", "grant a resource limit above your own, by its `NAME` (nofile, memlock, …), or all", "Ulimits"},
		{&g.Labels, "allow-label", "grant an SELinux `LABEL` or AppArmor profile, or all", "Labels"},
		{&g.Priorities, "allow-priority", "grant a `KIND` of priority over others: oom, scheduler, io, cpu, memory, network, or all", "Priorities"},
	} {
		// Not a list with commas, which paths may have.
		flags.StringArrayVar(l.to, l.name, nil, l.usage)
		if l.words != "" {
			must(cmd.RegisterFlagCompletionFunc(l.name, cobra.FixedCompletions(allow.Words(l.words), cobra.ShellCompDirectiveNoFileComp)))
		}
	}
	f.seccomp = choice{"", []string{"profile", "unconfined"}}
	flags.Var(&f.seccomp, "allow-seccomp", "let the seccomp profile permit more than containerd's default (profile), or be none (unconfined)")
	must(cmd.RegisterFlagCompletionFunc("allow-seccomp", f.seccomp.complete))
	flags.BoolVar(&g.NewPrivileges, "allow-new-privs", false, "let programs gain privileges (no_new_privs is off)")
	flags.StringVar(&g.CgroupParent, "cgroup-parent", "", "put the control group below this `PARENT`, a path or a slice; default: /NAMESPACE")
	flags.BoolVar(&g.Privileged, "privileged", false, "grant everything that can be granted")
	must(cmd.RegisterFlagCompletionFunc("cgroup-parent", cobra.NoFileCompletions))
	must(cmd.RegisterFlagCompletionFunc("network", cobra.FixedCompletions([]string{"host", "none", "join="}, cobra.ShellCompDirectiveNoFileComp|cobra.ShellCompDirectiveNoSpace)))
}

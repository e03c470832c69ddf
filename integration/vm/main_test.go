package main

import "testing"

func TestEmulatorFault(t *testing.T) {
	const head = "[    4.1] systemd[1]: Started the tests.\n"
	for _, tc := range []struct {
		name, console string
		want          bool
	}{
		{"breakpoint", head + "[   12.3] Oops: int3: 0000 [#1] PREEMPT SMP PTI\n[   12.3] RIP: 0010:f+0x1/0x2\n" +
			"[   12.4] Kernel panic - not syncing: Fatal exception in interrupt\n", true},
		{"another fault", head + "[   12.3] Oops: general protection fault: 0000 [#1] PREEMPT SMP PTI\n" +
			"[   12.4] Kernel panic - not syncing: Fatal exception in interrupt\n", false},
		{"a breakpoint that was survived", head + "[   12.3] Oops: int3: 0000 [#1] PREEMPT SMP PTI\n", false},
		{"a panic before it", "Kernel panic - not syncing: x\nOops: int3: 0000\n", false},
		{"none", head, false},
		{"nothing", "", false},
	} {
		if got := emulatorFault([]byte(tc.console)); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}

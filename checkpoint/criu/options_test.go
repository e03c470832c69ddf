package criu

import "testing"

func TestSkipInFlight(t *testing.T) {
	for version, want := range map[string]int{"": 0, "1.1.5+ds1": 0, "1.2.6": 0, "1.3.0": 1, "1.5.2": 1, "2.0.0-rc.1": 1} {
		if got := skipInFlight("runc", version); len(got) != want {
			t.Errorf("runc %q: %q", version, got)
		}
	}
	if got := skipInFlight("crun", "1.21"); got != nil {
		t.Errorf("crun: %q", got)
	}
}

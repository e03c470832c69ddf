package process

import (
	"strings"
	"testing"
)

func TestCheckSubGroups(t *testing.T) {
	limit := map[string]string{"memory.max": "33554432"}
	good := []SubGroup{
		{Path: ".", Controllers: []string{"memory", "pids"}},
		{Path: "init.scope"},
		{Path: "a/b", Controllers: []string{"cpu"}, Limits: limit},
		{Path: "odd\nname", Limits: map[string]string{"cpuset.cpus": "0-1"}},
	}
	if err := CheckSubGroups(good); err != nil {
		t.Error(err)
	}
	for name, bad := range map[string]SubGroup{
		"empty path":            {Path: ""},
		"absolute path":         {Path: "/a"},
		"path to the outside":   {Path: "../other"},
		"path through it":       {Path: "a/../../other"},
		"path that is odd":      {Path: "a//b"},
		"long path":             {Path: strings.Repeat("a/", 4096) + "a"},
		"path with a zero":      {Path: "a\x00b"},
		"unknown controller":    {Path: "a", Controllers: []string{"-memory"}},
		"two in one":            {Path: "a", Controllers: []string{"cpu io"}},
		"empty controller":      {Path: "a", Controllers: []string{""}},
		"file that is none":     {Path: "a", Limits: map[string]string{"cgroup.procs": "1"}},
		"file elsewhere":        {Path: "a", Limits: map[string]string{"../memory.max": "1"}},
		"the container's own":   {Path: ".", Limits: limit},
		"long value":            {Path: "a", Limits: map[string]string{"pids.max": strings.Repeat("1", 5000)}},
		"freeze is no limit":    {Path: "a", Limits: map[string]string{"cgroup.freeze": "1"}},
		"kill is none for sure": {Path: "a", Limits: map[string]string{"cgroup.kill": "1"}},
	} {
		if err := CheckSubGroups([]SubGroup{bad}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := CheckSubGroups(make([]SubGroup, maxSubGroups+1)); err == nil {
		t.Error("no error for too many")
	}
}

package seccomp

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write syscalls.txt anew")

// TestSyscallTable compares syscalls.txt with golang.org/x/sys, which has the
// numbers of all architectures as constants of as many builds.
func TestSyscallTable(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", "{{.Dir}}", "golang.org/x/sys/unix").Output()
	must(t, err)
	dir := strings.TrimSpace(string(out))
	line := regexp.MustCompile(`(?m)^\s*SYS_(\w+)\s*= (\d+)$`)
	arches := []string{"amd64", "386", "arm64", "arm"}
	numbers := map[string]map[string]string{} // by name and architecture
	files, err := filepath.Glob(filepath.Join(dir, "zsysnum_linux_*.go"))
	must(t, err)
	for _, file := range files {
		arch := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(file), "zsysnum_linux_"), ".go")
		data, err := os.ReadFile(file)
		must(t, err)
		for _, m := range line.FindAllStringSubmatch(string(data), -1) {
			name := strings.ToLower(m[1])
			if arch == "arm64" && name == "fstatat" {
				name = "newfstatat" // as libseccomp and the kernel have it
			}
			if numbers[name] == nil {
				numbers[name] = map[string]string{}
			}
			numbers[name][arch] = m[2]
		}
	}
	var b strings.Builder
	fmt.Fprintln(&b, "name", strings.Join(arches, " "))
	for _, name := range slices.Sorted(maps.Keys(numbers)) {
		b.WriteString(name)
		for _, arch := range arches {
			nr := numbers[name][arch]
			if nr == "" {
				nr = "-"
			}
			b.WriteString(" " + nr)
		}
		b.WriteString("\n")
	}
	if *update {
		must(t, os.WriteFile("syscalls.txt", []byte(b.String()), 0o644))
	} else if b.String() != syscallTable {
		t.Error("syscalls.txt is not that of golang.org/x/sys; write it with: go test ./checkpoint/policy/seccomp -run TestSyscallTable -update")
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

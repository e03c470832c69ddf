package checkpoint

import (
	"bufio"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// cpuFeatures are the flags of /proc/cpuinfo that name instructions or state
// of user space: what a program may have found at its start and be using. What
// only the kernel sees (vmx, pti, smep, …) is not among them. A trailing *
// stands for any ending.
var cpuFeatures = []string{
	// x86: "flags", arch/x86/include/asm/cpufeatures.h
	"cx8", "cx16", "cmov", "fxsr", "mmx", "sse", "sse2", "pni", "ssse3", "sse4_1", "sse4_2", "sse4a",
	"popcnt", "abm", "lahf_lm", "movbe", "aes", "vaes", "pclmulqdq", "vpclmulqdq", "sha_ni", "sha512", "sm3", "sm4", "gfni",
	"avx", "avx2", "avx512*", "avx_*", "avx10*", "f16c", "fma", "fma4", "xop", "bmi1", "bmi2", "tbm", "adx",
	"amx_*", "xsave", "xsaveopt", "xsavec", "xgetbv1", "fsgsbase", "rdrand", "rdseed", "rdtscp", "rdpid",
	"pku", "ospke", "rtm", "hle", "clflush", "clflushopt", "clwb", "clzero", "movdiri", "movdir64b", "waitpkg", "mwaitx",
	"serialize", "user_shstk", "3dnowprefetch", "enqcmd", "cmpccxadd", "raoint", "tsxldtrk",
	// arm64: "Features", arch/arm64/kernel/cpuinfo.c
	"fp", "fphp", "asimd", "asimd*", "pmull*", "sha1", "sha2", "sha3", "crc32", "atomics", "lse128", "cpuid",
	"jscvt", "fcma", "lrcpc*", "dcpop", "dcpodp", "sve", "sve*", "f64mm", "f32mm", "i8mm", "bf16", "ebf16", "dgh", "rng",
	"dit", "uscat", "ilrcpc", "flagm*", "ssbs", "sb", "paca", "pacg", "frint", "bti", "mte*", "ecv", "afp",
	"rpres", "sme*", "wfxt", "cssc", "rprfm", "mops", "hbc", "gcs", "fpmr", "lut", "faminmax", "f8*", "poe",
}

func isCPUFeature(flag string) bool {
	return slices.ContainsFunc(cpuFeatures, func(f string) bool {
		prefix, open := strings.CutSuffix(f, "*")
		return flag == f || open && strings.HasPrefix(flag, prefix)
	})
}

// HostCPUFeatures returns the instruction-set features of this host's first
// CPU that matter to programs, in the words of /proc/cpuinfo, sorted; none if
// that cannot be read.
func HostCPUFeatures() []string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return nil
	}
	defer f.Close()
	return parseCPUFeatures(f)
}

func parseCPUFeatures(r io.Reader) []string {
	lines := bufio.NewScanner(io.LimitReader(r, 1<<20))
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), ":")
		if key = strings.TrimSpace(key); key != "flags" && key != "Features" {
			continue
		}
		flags := slices.DeleteFunc(strings.Fields(value), func(f string) bool { return !isCPUFeature(f) })
		slices.Sort(flags)
		return slices.Compact(flags)
	}
	return nil
}

// KernelRelease returns what uname -r prints, or "".
func KernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

package tarcheck

import (
	"fmt"
	"strings"
	"testing"
)

// FuzzReader: what is accepted, archive/tar and GNU tar read alike.
func FuzzReader(f *testing.F) {
	for _, data := range honest(f) {
		f.Add(data, false)
	}
	f.Add(join(sparseHeader(nil)), true)
	f.Add(join(long('L', "evil"), x(record("path", "good")), raw{name: "f", flag: '0', magic: posix}), true)
	f.Add(join(x(record("size", "5")), raw{name: "f", flag: '0', magic: posix, content: "hello"}), true)
	f.Fuzz(func(t *testing.T, data []byte, fix bool) {
		if len(data) > 1<<16 {
			return
		}
		if fix {
			// So that the fuzzer gets past the checksums.
			for at := 0; at+blockSize <= len(data); at += blockSize {
				b := data[at : at+blockSize]
				if string(b[257:262]) != "ustar" {
					continue
				}
				sum := 8 * int(' ')
				for i, c := range b {
					if i < 148 || i >= 156 {
						sum += int(c)
					}
				}
				copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
			}
		}
		entries, headers, err := check(data)
		if err != nil {
			return
		}
		compare(t, "fuzzed", data, entries, headers)
	})
}

// FuzzHeaders is FuzzReader for tars that are put together of parts in which programs
// differ.
func FuzzHeaders(f *testing.F) {
	names := []string{"a", "b/", "./c", "", "d\x00e", strings.Repeat("n", 100), "../x", "/y", "z z", "é", "a -> b", "dir/.."}
	flags := []byte{'0', 0, '1', '2', '3', '4', '5', '6', '7', 'L', 'K', 'x', 'g', 'S', 'D', 'M', 'N', 'V', 'X', 'A'}
	magics := []string{posix, gnu, v7, "ustar\x00  ", "ustar  0", "ustar\x0001"}
	sizes := []string{"", "00000000005\x00", "0000000000 5", "       0005 ", "5", "5\x00777", "\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x05",
		"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfb", "\x80\x00\x00\x00\x80\x00\x00\x00\x00\x00\x00\x05", "+AAAAAAAAAAF", "00000001000\x00", "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "5 5", "-5"}
	contents := []string{"", "hello", record("path", "p"), record("path", "p") + record("path", "q"), record("linkpath", "l"), record("size", "5"),
		record("size", "0"), record("size", "512"), record("size", "") + record("path", "r"), record("path", "s/"), record("GNU.sparse.size", "9"),
		record("GNU.sparse.name", "e") + record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0"), record("uid", "7"), record("mtime", "1.5"),
		record("mtime", "-1.5"), record("comment", "c"), record("SCHILY.xattr.user.a", "\x00"), record("charset", "BINARY"), record("path", "t\x00u"),
		"long\x00", "long", "lo\x00ng\x00", "\x00", "dir/\x00", strings.Repeat("x", 600) + "\x00"}
	edits := []func(b []byte){
		nil, func(b []byte) { copy(b[345:], "prefix") }, func(b []byte) { copy(b[508:], "tar\x00") }, func(b []byte) { copy(b[329:], "0000001\x00") },
		func(b []byte) { copy(b[345:], "00000000001\x00") }, func(b []byte) { b[482] = 1 },
		func(b []byte) { number12(b[386:], 0); number12(b[398:], 5); number12(b[483:], 5) },
		func(b []byte) {
			number12(b[386:], 10)
			number12(b[398:], 5)
			number12(b[410:], 15)
			number12(b[422:], 0)
			number12(b[483:], 15)
		},
		func(b []byte) { number12(b[386:], 0); number12(b[398:], 5); number12(b[483:], 3) },
		func(b []byte) { copy(b[108:], "7777777\x00") }, func(b []byte) { copy(b[108:], "\x80\x00\x00\x00\x01\x00\x00\x00") },
		func(b []byte) { copy(b[136:], "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff") }, func(b []byte) { copy(b[100:], "\x00\x00\x00\x00\x00\x00\x00\x00") },
		func(b []byte) { copy(b[100:], "  644 \x00\x00") }, func(b []byte) { copy(b[483:], "00000000005\x00") },
	}
	f.Add([]byte{9, 1, 0, 0, 19, 0, 0, 0, 1, 0, 1, 0}, byte(0))
	f.Add([]byte{11, 0, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0}, byte(1))
	f.Add([]byte{13, 1, 0, 0, 1, 6, 0, 0, 0, 0, 1, 0}, byte(2))
	f.Add([]byte{3, 0, 0, 0, 0, 3, 6, 0, 0, 0, 1, 0}, byte(3))
	f.Add([]byte{2, 1, 118, 0, 0, 0, 2, 1, 96, 0, 0, 0}, byte(0)) // hard links to /y and ../x
	f.Fuzz(func(t *testing.T, choices []byte, end byte) {
		var data []byte
		for len(choices) >= 6 && len(data) < 1<<14 {
			c := choices[:6]
			choices = choices[6:]
			r := raw{flag: flags[int(c[0])%len(flags)], magic: magics[int(c[1])%len(magics)], name: names[int(c[2])%len(names)],
				content: contents[int(c[4])%len(contents)], link: names[int(c[2]/16)%len(names)]}
			edit, size := edits[int(c[5])%len(edits)], sizes[int(c[3])%len(sizes)]
			r.edit = func(b []byte) {
				if size != "" {
					copy(b[124:136], make([]byte, 12))
					copy(b[124:136], size)
				}
				if edit != nil {
					edit(b)
				}
			}
			data = append(data, r.bytes()...)
		}
		tail := [][]byte{make([]byte, 1024), nil, make([]byte, 512), append(make([]byte, 1024), "more"...), append(make([]byte, 512), data...)}
		data = append(data, tail[int(end)%len(tail)]...)
		entries, headers, err := check(data)
		if err == nil {
			compare(t, fmt.Sprintf("%q", choices), data, entries, headers)
		}
	})
}

package tarcheck

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// raw is a header block for tests.
type raw struct {
	name, link, prefix string
	flag               byte
	size               int64
	magic              string
	edit               func(b []byte) // before the checksum is made
	content            string
}

const (
	posix = "ustar\x0000"
	gnu   = "ustar  \x00"
	v7    = "\x00\x00\x00\x00\x00\x00\x00\x00"
)

func (r raw) bytes() []byte {
	b := make([]byte, blockSize)
	copy(b[0:100], r.name)
	copy(b[100:], "0000644\x00")
	copy(b[108:], "0000000\x00")
	copy(b[116:], "0000000\x00")
	if r.size == 0 {
		r.size = int64(len(r.content))
	}
	copy(b[124:], fmt.Sprintf("%011o\x00", r.size))
	copy(b[136:], "00000000000\x00")
	b[156] = r.flag
	copy(b[157:257], r.link)
	copy(b[257:], r.magic)
	copy(b[345:], r.prefix)
	if r.edit != nil {
		r.edit(b)
	}
	for i := 148; i < 156; i++ {
		b[i] = ' '
	}
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	b = append(b, r.content...)
	return append(b, make([]byte, padding(int64(len(r.content))))...)
}

func record(key, value string) string {
	n := len(key) + len(value) + 3
	for len(strconv.Itoa(n))+len(key)+len(value)+3 != n {
		n = len(strconv.Itoa(n)) + len(key) + len(value) + 3
	}
	return fmt.Sprintf("%d %s=%s\n", n, key, value)
}

func x(records ...string) raw {
	return raw{name: "x", flag: 'x', magic: posix, content: strings.Join(records, "")}
}
func long(flag byte, name string) raw {
	return raw{name: "././@LongLink", flag: flag, magic: gnu, content: name + "\x00"}
}

func join(parts ...raw) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p.bytes()...)
	}
	return append(b, make([]byte, 2*blockSize)...)
}

func number12(b []byte, n int64) {
	copy(b, fmt.Sprintf("%011o\x00", n))
}

// check reads a tar as callers do: with archive/tar, through a Reader.
func check(data []byte) (entries []Entry, headers []*tar.Header, err error) {
	r := NewReader(bytes.NewReader(data), func(e Entry) error { entries = append(entries, e); return nil })
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return entries, headers, r.Finish()
		}
		if err != nil {
			return nil, nil, err
		}
		if h.Typeflag != tar.TypeXGlobalHeader {
			headers = append(headers, h)
		}
	}
}

func TestRefused(t *testing.T) {
	file := raw{name: "file", flag: '0', magic: posix, content: "hello"}
	gnuFile := raw{name: "file", flag: '0', magic: gnu, content: "hello"}
	for name, data := range map[string][]byte{
		"L and path":             join(long('L', "evil"), x(record("path", "good")), file),
		"path and L":             join(x(record("path", "good")), long('L', "evil"), gnuFile),
		"K and linkpath":         join(long('K', "evil"), x(record("linkpath", "good")), raw{name: "l", flag: '2', link: "z", magic: posix}),
		"L twice":                join(long('L', "good"), long('L', "evil"), gnuFile),
		"K twice":                join(long('K', "good"), long('K', "evil"), raw{name: "l", flag: '2', link: "z", magic: gnu}),
		"two PAX headers":        join(x(record("path", "good")), x(record("path", "evil")), file),
		"path twice":             join(x(record("path", "good"), record("path", "evil")), file),
		"path in a GNU header":   join(x(record("path", "good")), gnuFile),
		"L before ustar":         join(long('L', "evil"), file),
		"L of ustar":             join(raw{name: "x", flag: 'L', magic: posix, content: "evil\x00"}, file),
		"x of GNU":               join(raw{name: "x", flag: 'x', magic: gnu, content: record("path", "evil")}, file),
		"x of V7":                join(raw{name: "x", flag: 'x', magic: v7, content: record("path", "evil")}, file),
		"zero byte in L":         join(long('L', "good\x00evil"), gnuFile),
		"L without end":          join(raw{name: "x", flag: 'L', magic: gnu, content: "evil"}, gnuFile),
		"empty L":                join(long('L', ""), gnuFile),
		"zero byte in path":      join(x(record("path", "good\x00evil")), file),
		"empty path":             join(x(record("path", "")), file),
		"zero byte in name":      join(raw{name: "good\x00evil", flag: '0', magic: posix}),
		"zero byte in link":      join(raw{name: "l", link: "good\x00evil", flag: '2', magic: posix}),
		"zero byte in prefix":    join(raw{name: "l", prefix: "good\x00evil", flag: '0', magic: posix}),
		"size in PAX":            join(x(record("size", "1024")), file),
		"size in PAX, 0 in V7":   join(x(record("size", "1024")), raw{name: "file", flag: '0', magic: posix, content: strings.Repeat("x", 1024), edit: func(b []byte) { number12(b[124:], 0) }}),
		"size in PAX, signed":    join(x(record("size", "+5")), file),
		"size in PAX, spaces":    join(x(record("size", " 5")), file),
		"PAX sparse":             join(x(record("GNU.sparse.major", "1"), record("GNU.sparse.minor", "0"), record("GNU.sparse.name", "evil")), file),
		"real size of star":      join(x(record("SCHILY.realsize", "1")), file),
		"charset":                join(x(record("hdrcharset", "BINARY")), file),
		"global path":            join(raw{name: "g", flag: 'g', magic: posix, content: record("path", "evil")}, file),
		"global after x":         join(x(record("path", "good")), raw{name: "g", flag: 'g', magic: posix, content: record("comment", "c")}, file),
		"record without name":    join(x("6 =ab\n"), file),
		"record too long":        join(x("99 path=a\n"), file),
		"record, leading zero":   join(x("010 path=a\n"), file),
		"record, no newline":     join(x("9 path=ab"), file),
		"base 256, other prefix": join(raw{name: "f", flag: '0', magic: gnu, edit: func(b []byte) { copy(b[124:], "\x81\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00") }}),
		"base 256, negative":     join(raw{name: "f", flag: '0', magic: gnu, edit: func(b []byte) { copy(b[124:], "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe\x00") }}),
		"base 256, too large":    join(raw{name: "f", flag: '0', magic: gnu, edit: func(b []byte) { copy(b[124:], "\x80\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00") }}),
		"base 64":                join(raw{name: "f", flag: '0', magic: gnu, edit: func(b []byte) { copy(b[124:], "+A\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00") }}),
		"size with a tail":       join(raw{name: "f", flag: '0', magic: posix, content: "12345", edit: func(b []byte) { copy(b[124:], "5 777\x00\x00\x00\x00\x00\x00\x00") }}),
		"size not octal":         join(raw{name: "f", flag: '0', magic: posix, content: "12345678", edit: func(b []byte) { copy(b[124:], "00000000008\x00") }}),
		"blank size":             join(raw{name: "f", flag: '0', magic: posix, edit: func(b []byte) { copy(b[124:], make([]byte, 12)) }}),
		"signed checksum":        signed(raw{name: "f\xff\xff", flag: '0', magic: posix}),
		"wrong checksum":         append(file.bytes()[:0:0], append([]byte("g"), join(file)[1:]...)...),
		"link with content":      join(raw{name: "l", flag: '2', link: "z", magic: posix, content: string(file.bytes())}),
		"hard link with content": join(raw{name: "l", flag: '1', link: "z", magic: posix, content: "x"}),
		"folder with content":    join(raw{name: "d/", flag: '5', magic: posix, content: "x"}),
		"file called a folder":   join(raw{name: "d/", flag: '0', magic: posix}),
		"old file, a folder":     join(raw{name: "d/", flag: 0, magic: v7}),
		"path of a folder":       join(x(record("path", "d/")), file),
		"contiguous":             join(raw{name: "d", flag: '7', magic: posix}),
		"multi volume":           join(raw{name: "d", flag: 'M', magic: gnu}),
		"dump folder":            join(raw{name: "d/", flag: 'D', magic: gnu}),
		"old long name":          join(raw{name: "d", flag: 'N', magic: gnu}),
		"Solaris":                join(raw{name: "d", flag: 'X', magic: posix}),
		"star":                   join(raw{name: "d", prefix: "p", flag: '0', magic: posix, edit: func(b []byte) { copy(b[508:], "tar\x00") }}),
		"prefix in GNU":          join(raw{name: "d", prefix: "evil", flag: '0', magic: gnu}),
		"unknown magic":          join(raw{name: "d", flag: '0', magic: "ustar 00"}),
		"V7 with more":           join(raw{name: "d", prefix: "evil", flag: '0', magic: v7}),
		"no name":                join(raw{flag: '0', magic: posix}),
		"link to nothing":        join(raw{name: "l", flag: '2', magic: posix}),
		"data after the end":     append(join(file), join(file)...),
		"data after one zero":    append(append(file.bytes(), make([]byte, 512)...), join(file)...),
		"long tail":              append(join(file), make([]byte, MaxPadding+blockSize)...),
		"name for nothing":       join(long('L', "evil")),
		"name for nothing, cut":  long('L', "evil").bytes(),
		"no tar":                 bytes.Repeat([]byte("no tar "), 200),
	} {
		if _, _, err := check(data); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: error %v, want ErrInvalidArgument", name, err)
		}
	}
}

// signed has a checksum of signed bytes, which archive/tar and GNU tar take too.
func signed(r raw) []byte {
	data := join(r)
	sum := 0
	for i, c := range data[:blockSize] {
		if i >= 148 && i < 156 {
			c = ' '
		}
		sum += int(int8(c))
	}
	copy(data[148:], fmt.Sprintf("%06o\x00 ", sum))
	return data
}

func sparseHeader(edit func(b []byte)) raw {
	return raw{name: "s", flag: 'S', magic: gnu, content: strings.Repeat("x", 1024), edit: func(b []byte) {
		number12(b[386:], 0)
		number12(b[398:], 512)
		number12(b[410:], 4096)
		number12(b[422:], 512)
		number12(b[483:], 8192)
		if edit != nil {
			edit(b)
		}
	}}
}

func TestSparse(t *testing.T) {
	if entries, headers, err := check(join(sparseHeader(nil))); err != nil || entries[0].Size != 8192 || headers[0].Size != 8192 {
		t.Errorf("%+v, %v", entries, err)
	}
	for name, edit := range map[string]func(b []byte){
		"less than is there":     func(b []byte) { number12(b[422:], 256) },
		"beyond the end":         func(b []byte) { number12(b[410:], 8000) },
		"out of order":           func(b []byte) { number12(b[386:], 6000) },
		"a gap between parts":    func(b []byte) { copy(b[458:], "00000000000\x0000000000000\x00") },
		"extended, but not full": func(b []byte) { b[482] = 1 },
		"extended strangely":     func(b []byte) { b[482] = 'y' },
		"no size":                func(b []byte) { copy(b[483:], make([]byte, 12)) },
	} {
		if _, _, err := check(join(sparseHeader(edit))); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

// honest are tars as the programs make them whose tars Stasis reads.
func honest(t testing.TB) map[string][]byte {
	t.Helper()
	all := map[string][]byte{
		"empty": make([]byte, 2*blockSize),
		"V7":    join(raw{name: "f", flag: 0, magic: v7, content: "hello"}),
		"git":   join(raw{name: "pax_global_header", flag: 'g', magic: posix, content: record("comment", "0123")}, raw{name: "f", flag: '0', magic: posix}),
	}
	for _, format := range []tar.Format{tar.FormatUnknown, tar.FormatUSTAR, tar.FormatPAX, tar.FormatGNU} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		name := "dir/file"
		if format != tar.FormatUSTAR {
			name = strings.Repeat("long/", 60) + "é"
		}
		for _, h := range []*tar.Header{
			{Typeflag: tar.TypeDir, Name: "dir/", Mode: 0o755},
			{Typeflag: tar.TypeReg, Name: name, Mode: 0o4755, Size: 5, Uid: 1 << 20, ModTime: time.Unix(1, 0)},
			{Typeflag: tar.TypeSymlink, Name: "link", Linkname: name},
			{Typeflag: tar.TypeLink, Name: "hard", Linkname: name},
			{Typeflag: tar.TypeChar, Name: "dev", Devmajor: 1, Devminor: 3},
			{Typeflag: tar.TypeFifo, Name: "fifo"},
		} {
			h.Format = format
			if format == tar.FormatPAX {
				h.Uid = 1 << 30
				h.ModTime = time.Unix(-5, 600)
				h.PAXRecords = map[string]string{"SCHILY.xattr.user.x": "a\x00b=\n"}
			}
			if format == tar.FormatGNU {
				h.Uid = 1 << 30
				h.ModTime = time.Unix(-5, 0)
			}
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if h.Size > 0 {
				fmt.Fprint(w, "hello")
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		all["Go "+format.String()] = b.Bytes()
	}
	dir := t.TempDir()
	long := filepath.Join(dir, strings.Repeat("n", 120), strings.Repeat("m", 120))
	for _, err := range []error{
		os.MkdirAll(long, 0o700), os.WriteFile(filepath.Join(long, "f"), []byte("x"), 0o600),
		os.Symlink(strings.Repeat("t/", 80), filepath.Join(dir, "l")), os.Link(filepath.Join(long, "f"), filepath.Join(dir, "h")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, parts := range map[string]int{"few": 3, "many": 60} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		for i := range parts {
			if _, err := f.WriteAt(bytes.Repeat([]byte("x"), 4096), int64(i)*65536); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(f.Truncate(60*65536+1), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	// As CRIU calls it.
	for name, args := range map[string][]string{
		"GNU tar, gnu": {"--format=gnu", "--sparse"}, "GNU tar, posix": {"--format=posix", "--xattrs"},
		"GNU tar, ustar": {"--format=ustar", "--wildcards", "--exclude=l", "--exclude=n*", "--exclude=h"}, "GNU tar, plain": {},
	} {
		args = append([]string{"--create", "--no-unquote", "--no-wildcards", "--one-file-system", "--check-links", "--preserve-permissions",
			"--numeric-owner", "--directory", dir}, append(args, ".")...)
		cmd := exec.Command("tar", args...)
		cmd.Stderr = os.Stderr
		data, err := cmd.Output()
		if err != nil {
			t.Fatalf("tar %q: %v", args, err)
		}
		all[name] = data
	}
	return all
}

func TestHonest(t *testing.T) {
	for name, data := range honest(t) {
		entries, headers, err := check(data)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		compare(t, name, data, entries, headers)
		// One byte at a time, as a reader may give them.
		var s scanner
		for i := range data {
			if err := s.write(data[i : i+1]); err != nil {
				t.Fatalf("%s: at %d: %v", name, i, err)
			}
		}
		// A tar that is cut in an entry is not one that ends.
		if len(headers) > 0 {
			if _, _, err := check(data[:blockSize+1]); err == nil {
				t.Errorf("%s, cut: no error", name)
			}
		}
	}
}

// compare fails the test unless the scanner, archive/tar and GNU tar see the same.
func compare(t *testing.T, what string, data []byte, entries []Entry, headers []*tar.Header) {
	t.Helper()
	if len(entries) != len(headers) {
		t.Fatalf("%s: %d entries, archive/tar has %d", what, len(entries), len(headers))
	}
	for i, h := range headers {
		if e := entries[i]; e != (Entry{h.Name, h.Typeflag, h.Size}) {
			t.Errorf("%s: %+v, archive/tar has %q %q %d", what, e, h.Name, h.Typeflag, h.Size)
		}
	}
	if len(headers) == 0 {
		return // of which GNU tar says that they are no tars
	}
	// -P: without it, tar lists the target of a hard link as it would extract it,
	// without a leading / or ../.
	cmd := exec.Command("tar", "-tPvf", "-", "--numeric-owner", "--quoting-style=escape", "--no-unquote")
	cmd.Env = []string{"LC_ALL=C", "TZ=UTC", "PATH=" + os.Getenv("PATH")}
	cmd.Stdin = bytes.NewReader(data)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: GNU tar: %v: %s", what, err, errs.String())
	}
	lines := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	if len(out) == 0 {
		lines = nil
	}
	if len(lines) != len(headers) {
		t.Fatalf("%s: GNU tar has %d entries, archive/tar %d: %s", what, len(lines), len(headers), out)
	}
	types := map[byte]byte{tar.TypeReg: '-', tar.TypeGNUSparse: '-', tar.TypeDir: 'd', tar.TypeSymlink: 'l', tar.TypeLink: 'h',
		tar.TypeChar: 'c', tar.TypeBlock: 'b', tar.TypeFifo: 'p'}
	for i, h := range headers {
		fields := strings.Fields(lines[i])
		size := fmt.Sprint(h.Size)
		if h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock {
			size = fmt.Sprintf("%d,%d", h.Devmajor, h.Devminor)
		}
		name := strings.TrimRight(h.Name, "/")
		switch h.Typeflag {
		case tar.TypeSymlink:
			name += " -> " + h.Linkname
		case tar.TypeLink:
			name += " link to " + h.Linkname
		}
		rest := lines[i]
		for range 5 { // mode, owner, size, date, time
			rest = strings.TrimLeft(rest, " ")
			_, rest, _ = strings.Cut(rest, " ")
		}
		theirs := unescape(rest)
		if h.Typeflag == tar.TypeDir {
			theirs = strings.TrimRight(theirs, "/")
		}
		if fields[0][0] != types[h.Typeflag] || fields[2] != size || theirs != name {
			t.Errorf("%s: GNU tar has %q, archive/tar %q %q %s (%q)", what, lines[i], h.Typeflag, name, size, theirs)
		}
	}
}

// unescape undoes GNU's quoting style "escape".
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' || i+1 == len(s) {
			b.WriteByte(s[i])
			continue
		}
		i++
		if j := strings.IndexByte("abfnrtv", s[i]); j >= 0 {
			b.WriteByte("\a\b\f\n\r\t\v"[j])
		} else if s[i] >= '0' && s[i] <= '7' && i+2 < len(s) {
			n, _ := strconv.ParseUint(s[i:i+3], 8, 8)
			b.WriteByte(byte(n))
			i += 2
		} else {
			b.WriteByte(s[i])
		}
	}
	return b.String()
}

package tarcheck

import (
	"archive/tar"
	"bytes"
	"errors"
	"math"
	"strconv"
	"strings"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

type format int

const (
	formatV7 format = iota
	formatPOSIX
	formatGNU
)

// maxOctalSize is the largest size that a header's field can have in octal.
const maxOctalSize = 1<<33 - 1

// PAX records that change what an entry is.
const (
	paxPath     = "path"
	paxLinkpath = "linkpath"
	paxSize     = "size"
)

// header is what counts of a header block.
type header struct {
	format     format
	flag       byte
	name, link string // with the prefix
	size       int64
}

// numbers are the fields of every header, by offset; none may be blank.
var numbers = []struct {
	what  string
	at, n int
	most  int64
}{
	{"mode", 100, 8, 1<<24 - 1}, {"uid", 108, 8, math.MaxUint32}, {"gid", 116, 8, math.MaxUint32}, {"size", 124, 12, math.MaxInt64},
	{"mtime", 136, 12, maxTime},
}

// maxTime bounds times, in seconds: programs fail with some that are larger.
const maxTime = 1 << 40

func parseHeader(b *[blockSize]byte) (header, error) {
	var h header
	var err error
	var sum int64
	for i, c := range b {
		if i >= 148 && i < 156 {
			c = ' '
		}
		sum += int64(c)
	}
	if n, _, err := number(b[148:156], false); err != nil || n != sum {
		return h, fault.Invalid("no tar, or a damaged one: a header's checksum is wrong")
	}
	if h.name, err = text(b[0:100]); err != nil {
		return h, fault.Invalid("a name with a zero byte in it: %q", b[0:100])
	}
	refused := func(format string, args ...any) (header, error) {
		return h, fault.Invalid("entry %q: "+format, append([]any{h.name}, args...)...)
	}
	values := map[string]int64{}
	for _, f := range numbers {
		n, blank, err := number(b[f.at:f.at+f.n], f.what == "mtime")
		if err != nil || blank || n > f.most || n < -f.most {
			return refused("its %s cannot be read without doubt: %q", f.what, b[f.at:f.at+f.n])
		}
		values[f.what] = n
	}
	h.size = values["size"]
	h.flag = b[156]
	if h.link, err = text(b[157:257]); err != nil {
		return refused("a link's target with a zero byte in it")
	}
	switch magic := string(b[257:265]); magic {
	case "ustar\x0000":
		h.format = formatPOSIX
		// Here archive/tar looks for another format ("tar").
		if !zero(b[500:]) {
			return refused("an unknown kind of tar header")
		}
		prefix, err := text(b[345:500])
		if err != nil {
			return refused("a prefix with a zero byte in it")
		}
		if prefix != "" {
			h.name = prefix + "/" + h.name
		}
	case "ustar  \x00":
		h.format = formatGNU
		// archive/tar takes times that it cannot read for a prefix of the name.
		for _, at := range []int{345, 357} {
			if _, _, err := number(b[at:at+12], true); err != nil {
				return refused("times that cannot be read without doubt")
			}
		}
		if h.flag != tar.TypeGNUSparse && !zero(b[369:]) {
			return refused("a header of GNU's with parts of a sparse file, or unknown ones")
		}
	case "\x00\x00\x00\x00\x00\x00\x00\x00":
		if !zero(b[265:]) {
			return refused("an unknown kind of tar header")
		}
	default:
		return refused("an unknown kind of tar header (%q)", magic)
	}
	if h.format != formatV7 {
		for _, at := range []int{329, 337} {
			n, blank, err := number(b[at:at+8], false)
			if err != nil || n > math.MaxUint32 || blank && (h.flag == tar.TypeChar || h.flag == tar.TypeBlock) {
				return refused("its device number cannot be read without doubt")
			}
		}
		for _, f := range [][]byte{b[265:297], b[297:329]} {
			if _, err := text(f); err != nil {
				return refused("an owner with a zero byte in its name")
			}
		}
	} else if h.flag == tar.TypeChar || h.flag == tar.TypeBlock {
		return refused("a device without a number")
	}
	return h, nil
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

var errDoubt = errors.New("can be read in two ways")

// text returns a field that ends with its first zero byte. Nothing else may follow
// that: some programs might show it.
func text(b []byte) (string, error) {
	s, rest, _ := bytes.Cut(b, []byte{0})
	if !zero(rest) {
		return "", errDoubt
	}
	return string(s), nil
}

// number reads a field: octal digits, with spaces before them and spaces or zero
// bytes after, or base 256. Only times may be negative, and that only in base 256. A
// blank field is 0.
func number(b []byte, isTime bool) (n int64, blank bool, err error) {
	if b[0] == 0x80 || b[0] == 0xff && isTime {
		negative := b[0] == 0xff
		for _, c := range b[1:] {
			if negative {
				c = ^c
			}
			if n>>55 != 0 {
				return 0, false, errDoubt
			}
			n = n<<8 | int64(c)
		}
		if negative {
			n = ^n
		}
		return n, false, nil
	}
	digits := strings.TrimRight(strings.TrimLeft(string(b), " "), " \x00")
	if digits == "" {
		return 0, true, nil
	}
	for _, c := range []byte(digits) {
		if c < '0' || c > '7' {
			return 0, false, errDoubt
		}
		n = n<<3 | int64(c-'0')
	}
	return n, false, nil
}

// decimal reads a number of a PAX record: digits, and nothing else.
func decimal(s string) (int64, error) {
	if s == "" || strings.Trim(s, "0123456789") != "" || len(s) > 1 && s[0] == '0' {
		return 0, errDoubt
	}
	return strconv.ParseInt(s, 10, 64)
}

// parsePAX reads the records of a PAX header: "LENGTH KEY=VALUE\n".
func parsePAX(data []byte) (map[string]string, error) {
	records := map[string]string{}
	for rest := string(data); rest != ""; {
		length, _, ok := strings.Cut(rest, " ")
		n, err := decimal(length)
		if !ok || err != nil || n > int64(len(rest)) || n < int64(len(length))+4 || rest[n-1] != '\n' {
			return nil, fault.Invalid("a PAX header that cannot be read without doubt, at %q", short(rest))
		}
		key, value, ok := strings.Cut(rest[len(length)+1:n-1], "=")
		rest = rest[n:]
		if !ok || key == "" || strings.ContainsRune(key, 0) {
			return nil, fault.Invalid("a PAX header with a record without a name")
		}
		if _, twice := records[key]; twice {
			return nil, fault.Invalid("a PAX header with %q twice: programs differ in which one counts", short(key))
		}
		switch {
		case key == "charset", key == "hdrcharset", key == "SCHILY.realsize", strings.HasPrefix(key, "GNU."), strings.HasPrefix(key, "SUN."):
			return nil, fault.Invalid("a PAX header with %q, which some programs know and others do not", short(key))
		case key == paxPath, key == paxLinkpath, key == "uname", key == "gname":
			if (value == "" && (key == paxPath || key == paxLinkpath)) || strings.ContainsRune(value, 0) {
				return nil, fault.Invalid("a PAX header whose %s is empty, or has a zero byte in it: %q", key, short(value))
			}
		case key == "mtime", key == "atime", key == "ctime":
			seconds, fraction, _ := strings.Cut(value, ".")
			if n, err := decimal(strings.TrimPrefix(seconds, "-")); err != nil || n > maxTime || strings.Trim(fraction, "0123456789") != "" {
				return nil, fault.Invalid("a PAX header whose %s cannot be read without doubt: %q", key, short(value))
			}
		case key == paxSize, key == "uid", key == "gid":
			if n, err := decimal(value); err != nil || n > math.MaxUint32 && key != paxSize {
				return nil, fault.Invalid("a PAX header whose %s cannot be read without doubt: %q", key, short(value))
			}
		}
		records[key] = value
	}
	return records, nil
}

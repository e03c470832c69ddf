package policy

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"testing"
)

// CRIU has GNU tar unpack what is checked here by Go's reader: an archive that the two
// read differently is refused.
func TestTmpfsNames(t *testing.T) {
	header := func(h *tar.Header) []byte {
		var b bytes.Buffer
		must(t, tar.NewWriter(&b).WriteHeader(h))
		return b.Bytes()
	}
	long := header(&tar.Header{Format: tar.FormatGNU, Name: string(bytes.Repeat([]byte("../"), 40)) + "etc/passwd", Typeflag: tar.TypeReg})
	pax := header(&tar.Header{Format: tar.FormatPAX, Name: "./é", Typeflag: tar.TypeReg})
	end := make([]byte, 1024)
	plain := header(&tar.Header{Name: "./a", Typeflag: tar.TypeReg})
	for name, tc := range map[string]struct {
		parts [][]byte
		want  string
	}{
		// L and the name in one block each, then the header of PAX and its own.
		"two names": {[][]byte{long[:1024], pax, end}, "PAX header after another header for the same entry"},
		"after end": {[][]byte{plain, end, plain, end}, "data after its end"},
		"honest":    {[][]byte{pax, plain, end}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			z := gzip.NewWriter(&b)
			_, err := z.Write(bytes.Join(tc.parts, nil))
			must(t, err)
			must(t, z.Close())
			f := confined(t)
			f.raw("tmpfs-dev-99.tar.gz.img", b.Bytes())
			f.judged(tc.want, "tmpfs-dev-99.tar.gz.img")
		})
	}
}

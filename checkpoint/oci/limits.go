package oci

import (
	"strings"
	"unicode/utf8"
)

// What is read is not larger than this, whatever it says of itself.
const (
	// maxDocument is for manifests, indexes and configs, in bytes. Registries
	// take 4 MiB, containerd reads 8.
	maxDocument = 8 << 20
	// maxMetadata is for info.json and spec.json, in bytes.
	maxMetadata = 16 << 20
	// maxFiles is the number of CRIU's images, as in package checkpoint.
	maxFiles = 1 << 16
	// maxBlobs is how many blobs an image in a file may have, and how many entries a
	// manifest or index that is kept.
	maxBlobs = 1 << 12
	// maxManifests is how many manifests of an index are looked at. Images for
	// many platforms have about twenty.
	maxManifests = 64
	// maxPadding is what may follow the end of a tar, in bytes. Writers fill up
	// a block of theirs with zeros.
	maxPadding = 1 << 20
	// maxWindow is zstd's: what decoding takes of memory, in bytes. It is what
	// the zstd program accepts.
	maxWindow = 128 << 20
)

// plainName tells if name can be that of a file in the flat folder of a
// checkpoint. What begins with a dot is none: a layer has whiteouts there, and
// package checkpoint its unfinished work.
func plainName(name string) bool {
	if name == "" || len(name) > 255 || name[0] == '.' || !utf8.ValidString(name) {
		return false
	}
	return !strings.ContainsFunc(name, func(r rune) bool { return r == '/' || r < ' ' || r == 0x7f })
}

package oci

import (
	"io"
	"path/filepath"
	"strings"

	"github.com/stasis-run/stasis/checkpoint/capture"
	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/sign"
)

// signedBy adds to annotations by which keys the checkpoint in a folder says it is
// signed. Whether it is, nobody looks at here.
func signedBy(annotations map[string]string, dir string) {
	f, err := capture.OpenPlain(filepath.Join(dir, layout.Signature))
	if err != nil {
		return
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, sign.MaxEnvelope+1))
	if err != nil {
		return
	}
	if ids, err := sign.KeyIDs(data); err == nil {
		annotations[AnnotationSigned] = strings.Join(ids, ",")
	}
}

// signers is the reverse of signedBy.
func signers(annotations map[string]string) []string {
	if text := annotations[AnnotationSigned]; text != "" {
		return strings.Split(text, ",")
	}
	return nil
}

// Package imgtest makes CRIU images for tests.
package imgtest

import (
	"encoding/binary"
	"sync"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/magic"
	"google.golang.org/protobuf/proto"
)

var magics = sync.OnceValue(magic.LoadMagic)

// Encode returns an image of a kind, such as "PSTREE", made of messages.
func Encode(t testing.TB, kind string, msgs ...proto.Message) []byte {
	t.Helper()
	magics := magics()
	var out []byte
	if kind != "INVENTORY" {
		out = binary.LittleEndian.AppendUint32(out, uint32(magics.ByName["IMG_COMMON"]))
	}
	out = binary.LittleEndian.AppendUint32(out, uint32(magics.ByName[kind]))
	for _, m := range msgs {
		msg, err := proto.MarshalOptions{AllowPartial: true}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		out = binary.LittleEndian.AppendUint32(out, uint32(len(msg)))
		out = append(out, msg...)
	}
	return out
}

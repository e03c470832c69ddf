package policy

import (
	"encoding/binary"
	"testing"

	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/seccomp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// answer is a filter that answers the same to every system call.
func answer(value uint32) []byte {
	filter := binary.NativeEndian.AppendUint16(nil, unix.BPF_RET)
	return binary.NativeEndian.AppendUint32(append(filter, 0, 0), value)
}

// What filters permit is tested in package seccomp; here, which of them count.
func TestSeccomp(t *testing.T) {
	const (
		eperm = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
		allow = unix.SECCOMP_RET_ALLOW
	)
	first := func(filter []byte) func(*forgery) {
		return func(f *forgery) {
			one(f, layout.Seccomp, "SECCOMP", func(e *seccomp.SeccompEntry) { e.SeccompFilters[0].Filter = filter })
		}
	}
	for _, tc := range []struct {
		name string
		fn   func(*forgery)
		want string // "" if it passes
	}{
		{"none", func(f *forgery) {
			f.core(func(e *core.CoreEntry) { e.ThreadCore.SeccompMode, e.ThreadCore.SeccompFilter = nil, nil })
		}, "has no seccomp filter, and the spec has a profile"},
		{"mode without a filter", func(f *forgery) {
			f.core(func(e *core.CoreEntry) { e.ThreadCore.SeccompFilter = nil })
		}, "has no seccomp filter"},
		{"strict", func(f *forgery) {
			f.core(func(e *core.CoreEntry) { e.ThreadCore.SeccompMode = core.SeccompMode_strict.Enum() })
		}, ""},
		{"all", first(answer(allow)), "its seccomp filters permit more than the spec's profile: "},
		{"nothing", first(answer(eperm)), ""},
		{"malformed", first([]byte("abc")), "a filter is malformed"},
		{"a further one on top", func(f *forgery) {
			one(f, layout.Seccomp, "SECCOMP", func(e *seccomp.SeccompEntry) {
				e.SeccompFilters = append(e.SeccompFilters, &seccomp.SeccompFilter{
					Filter: answer(allow), Prev: proto.Uint32(0)})
			})
			f.core(func(e *core.CoreEntry) { e.ThreadCore.SeccompFilter = proto.Uint32(1) })
		}, ""},
		{"a loop", func(f *forgery) {
			one(f, layout.Seccomp, "SECCOMP", func(e *seccomp.SeccompEntry) {
				e.SeccompFilters = []*seccomp.SeccompFilter{{Filter: answer(allow), Prev: proto.Uint32(0)}}
			})
		}, "permit more"},
		{"a listener", func(f *forgery) {
			one(f, layout.Seccomp, "SECCOMP", func(e *seccomp.SeccompEntry) {
				e.SeccompFilters[0].Flags = proto.Uint32(unix.SECCOMP_FILTER_FLAG_NEW_LISTENER)
			})
		}, "a filter with flags 0x8"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newForgery(t)
			tc.fn(f)
			f.judged(tc.want)
		})
	}
}

package policy

import (
	"fmt"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	fown "github.com/checkpoint-restore/go-criu/v8/crit/images/fown"
	skopts "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-opts"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// maxPriority is the highest SO_PRIORITY that needs no capability.
const maxPriority = 6

// decode decodes a message that CRIU will decode again, with another library, and
// refuses what the two could see differently: a field or value that go-criu does
// not know, a field that is missing, a string that ends early for CRIU. Messages
// that are part of many others are checked here.
func (c *checker) decode(msg []byte, into proto.Message) error {
	if err := proto.Unmarshal(msg, into); err != nil {
		return fault.Invalid("malformed: %v", err)
	}
	return c.walk(into.ProtoReflect())
}

func (c *checker) walk(m protoreflect.Message) (err error) {
	if err := c.budget.spend(1, 0); err != nil {
		return err
	}
	name := m.Descriptor().Name()
	if len(m.GetUnknown()) > 0 {
		return fault.Invalid("%s has a field or value that this version of Stasis does not know, and cannot check", name)
	}
	switch e := m.Interface().(type) {
	case *fdinfo.FileEntry:
		c.entry = opened{c, e.GetId()} // which has the others
	case *fown.FownEntry:
		// A signal is sent with these users' rights (F_SETOWN).
		if e.GetPid() != 0 && !(c.grant.uid(e.GetUid()) && c.grant.uid(e.GetEuid())) {
			c.refuse("%s: sends signals as user %d/%d, which the spec does not grant", c.entry, e.GetUid(), e.GetEuid())
		}
	case *skopts.SkOptsEntry:
		if e.GetSoPriority() > maxPriority && !c.grant.any("CAP_NET_ADMIN", "CAP_NET_RAW") {
			c.refuse("%s: has the priority %d, which needs CAP_NET_ADMIN or CAP_NET_RAW", c.entry, e.GetSoPriority())
		}
		if e.GetSoMark() != 0 && !c.grant.any("CAP_NET_ADMIN", "CAP_NET_RAW") {
			c.refuse("%s: has the packet mark %#x, which needs CAP_NET_ADMIN or CAP_NET_RAW", c.entry, e.GetSoMark())
		}
	}
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.Kind() == protoreflect.StringKind:
			err = eachString(fd, v, func(s string) error {
				if strings.ContainsRune(s, 0) {
					return fault.Invalid("%s.%s contains a zero byte", name, fd.Name())
				}
				return nil
			})
		case fd.Kind() != protoreflect.MessageKind:
		case fd.IsList():
			for i := 0; i < v.List().Len() && err == nil; i++ {
				err = c.walk(v.List().Get(i).Message())
			}
		default:
			err = c.walk(v.Message())
		}
		return err == nil
	})
	return err
}

func eachString(fd protoreflect.FieldDescriptor, v protoreflect.Value, fn func(string) error) error {
	if !fd.IsList() {
		return fn(v.String())
	}
	for i := range v.List().Len() {
		if err := fn(v.List().Get(i).String()); err != nil {
			return err
		}
	}
	return nil
}

// climbs tells whether a path of an image has a component "..": the kernel never
// tells one, and CRIU appends these paths to others.
func climbs(path string) bool {
	for part := range strings.SplitSeq(path, "/") {
		if part == ".." {
			return true
		}
	}
	return false
}

// inRoot returns what is wrong with the path of a file in the container, or "".
func inRoot(path string) string {
	switch {
	case !strings.HasPrefix(path, "/"):
		return fmt.Sprintf("path %s is not absolute", quote(path))
	case climbs(path):
		return fmt.Sprintf("path %s climbs with ..", quote(path))
	}
	return ""
}

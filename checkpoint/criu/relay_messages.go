package criu

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
)

// The messages between the runtime and CRIU, of which few fields matter here
// (criu/images/rpc.proto). go-criu's package for them would bring a second
// implementation of protobuf into the shim.

// maxMessage is in bytes, and more than the kernel takes with its own settings.
const maxMessage = 256 << 10

// forward hands messages on, as look returns them, with their descriptors (a
// terminal's master).
func forward(to, from *net.UnixConn, look func([]byte) ([]byte, error)) error {
	buf, oob := make([]byte, maxMessage), make([]byte, 4096)
	for {
		n, oobn, flags, _, err := from.ReadMsgUnix(buf, oob)
		if err != nil {
			return err
		}
		if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
			err = errors.New("a message of CRIU's is too long")
		}
		message := buf[:n]
		if err == nil {
			message, err = look(message)
		}
		if err == nil {
			_, _, err = to.WriteMsgUnix(message, oob[:oobn], nil)
		}
		fds, _ := rightsIn(oob[:oobn])
		for _, fd := range fds {
			unix.Close(fd)
		}
		if err != nil {
			return err
		}
	}
}

// folders are those that the runtime has told CRIU of by numbers of its own
// descriptors. CRIU looks for them at the process that has made its socket, which is
// the shim now.
type folders []*os.File

func (f *folders) close() {
	for _, d := range *f {
		d.Close()
	}
}

// translate has a request of the runtime's (a criu_req) name the shim's descriptors, and
// ask for notifications: libcriu, which crun uses, answers those that it has not asked for.
func (f *folders) translate(message []byte, from *net.UnixConn) ([]byte, error) {
	var out []byte
	runtime, err := peerOf(from)
	if err != nil {
		return nil, err
	}
	err = eachField(message, func(n protowire.Number, raw, value []byte, _ uint64) error {
		if n != 2 { // opts
			out = append(out, raw...)
			return nil
		}
		var opts []byte
		err := eachField(value, func(n protowire.Number, raw, _ []byte, number uint64) error {
			// images_dir_fd, work_dir_fd, status_fd; -1 is none.
			if n != 1 && n != 17 && n != 49 || int32(number) < 0 {
				opts = append(opts, raw...)
				return nil
			}
			d, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", runtime, int32(number)), unix.O_PATH, 0)
			if err != nil {
				return err
			}
			*f = append(*f, d)
			opts = protowire.AppendTag(opts, n, protowire.VarintType)
			opts = protowire.AppendVarint(opts, uint64(d.Fd()))
			return nil
		})
		opts = protowire.AppendTag(opts, 12, protowire.VarintType) // notify_scripts; the last one counts
		opts = protowire.AppendVarint(opts, 1)
		out = protowire.AppendTag(out, n, protowire.BytesType)
		out = protowire.AppendBytes(out, opts)
		return err
	})
	return out, err
}

// criuMessage is what matters here of a criu_resp.
type criuMessage struct {
	kind    int    // what it answers: messageDump, …
	success bool   // of what it answers
	script  string // of a notification (criu_notify): its name
	pid     int    // of a notification: the process that it is about, 0 if of none
}

// messageDump is the kind of the answer to a request to dump (criu_req_type).
const messageDump = 1

func parseMessage(message []byte) (m criuMessage, err error) {
	err = eachField(message, func(n protowire.Number, _, value []byte, number uint64) error {
		switch n {
		case 1:
			m.kind = int(int32(number))
		case 2:
			m.success = number != 0
		case 5:
			return eachField(value, func(n protowire.Number, _, value []byte, number uint64) error {
				switch n {
				case 1:
					m.script = string(value)
				case 2:
					m.pid = int(int32(number))
				}
				return nil
			})
		}
		return nil
	})
	return m, err
}

// eachField calls fn with each field of a message, raw and, if it is bytes or a
// number, decoded.
func eachField(message []byte, fn func(n protowire.Number, raw, value []byte, number uint64) error) error {
	for len(message) > 0 {
		n, kind, tag := protowire.ConsumeTag(message)
		if tag < 0 {
			return protowire.ParseError(tag)
		}
		var value []byte
		var number uint64
		var used int
		switch kind {
		case protowire.BytesType:
			value, used = protowire.ConsumeBytes(message[tag:])
		case protowire.VarintType:
			number, used = protowire.ConsumeVarint(message[tag:])
		default:
			used = protowire.ConsumeFieldValue(n, kind, message[tag:])
		}
		if used < 0 {
			return protowire.ParseError(used)
		}
		if err := fn(n, message[:tag+used], value, number); err != nil {
			return err
		}
		message = message[tag+used:]
	}
	return nil
}

// rightsIn returns the descriptors that came with a message.
func rightsIn(oob []byte) (fds []int, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	for i := range messages {
		got, perr := unix.ParseUnixRights(&messages[i])
		err = errors.Join(err, perr)
		fds = append(fds, got...)
	}
	return fds, err
}

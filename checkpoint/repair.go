package checkpoint

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/timerfd"
	"google.golang.org/protobuf/proto"
)

const filesName = "files.img"

// repairTimers puts right what CRIU gets wrong about timerfds that tick (CRIU
// issue 3162). One that has expired, and was not read since, starts its next
// period when it is read; until then the kernel says that no time is left. CRIU
// takes that for a timer that is not set, and it never ticks again.
func repairTimers(dir string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", filesName, err)
		}
	}()
	path := filepath.Join(dir, filesName)
	in, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // CRIU before 3.3
	}
	if err != nil {
		return err
	}
	defer in.Close()
	frames, err := framesOf(in)
	if err != nil {
		return err
	}
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out := make([]byte, info.Size()-frames.left) // what comes before the messages
	if _, err := in.ReadAt(out, 0); err != nil {
		return err
	}
	repaired := false
	for {
		msg, err := frames.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		var file fdinfo.FileEntry
		if err := decode(msg, &file); err != nil {
			return err
		}
		if repairTimer(file.GetTfd()) {
			repaired = true
			if msg, err = (proto.MarshalOptions{AllowPartial: true}).Marshal(&file); err != nil {
				return err
			}
		}
		out = binary.LittleEndian.AppendUint32(out, uint32(len(msg)))
		out = append(out, msg...)
	}
	if !repaired {
		return nil
	}
	// Never half of it: with Exit, this is all there is of the container.
	tmp := path + ".new"
	if err = os.WriteFile(tmp, out, 0o600); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
	}
	return err
}

func repairTimer(t *timerfd.TimerfdEntry) bool {
	left := t.GetVsec() != 0 || t.GetVnsec() != 0
	ticks := t.GetIsec() != 0 || t.GetInsec() != 0
	// Without an expiry that nobody has seen, it is one that was stopped.
	if left || !ticks || t.GetTicks() == 0 {
		return false
	}
	t.Vsec, t.Vnsec = t.Isec, t.Insec
	return true
}

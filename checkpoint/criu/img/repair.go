package img

import (
	"errors"
	"io/fs"
	"path/filepath"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/cgroup"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/timerfd"
	"google.golang.org/protobuf/proto"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// This file puts right what CRIU's images say wrongly.

// RepairTimers puts right what CRIU gets wrong about timerfds that tick (CRIU
// issue 3162). One that has expired, and was not read since, starts its next
// period when it is read; until then the kernel says that no time is left. CRIU
// takes that for a timer that is not set, and it never ticks again.
func RepairTimers(dir string) error {
	err := Rewrite(filepath.Join(dir, layout.Files), func(msg []byte, put func([]byte)) error {
		var file fdinfo.FileEntry
		if err := Decode(msg, &file); err != nil {
			return err
		}
		if repairTimer(file.GetTfd()) {
			var err error
			if msg, err = (proto.MarshalOptions{AllowPartial: true}).Marshal(&file); err != nil {
				return err
			}
		}
		put(msg)
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // CRIU before 3.3
	}
	return err
}

// ThawGroups has a checkpoint say that the container runs. It was frozen before
// CRIU began, which has noted that, and a restore that brings back all properties
// (cgroups_mode full) would freeze CRIU itself, which is in the same group.
func ThawGroups(dir string) error {
	err := Rewrite(filepath.Join(dir, layout.Cgroups), func(msg []byte, put func([]byte)) error {
		var groups cgroup.CgroupEntry
		if err := Decode(msg, &groups); err != nil {
			return err
		}
		for _, controller := range groups.GetControllers() {
			thawFolders(controller.GetDirs())
		}
		msg, err := (proto.MarshalOptions{AllowPartial: true}).Marshal(&groups)
		put(msg)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // its control groups are not managed
	}
	return err
}

func thawFolders(dirs []*cgroup.CgroupDirEntry) {
	for _, dir := range dirs {
		for _, p := range dir.GetProperties() {
			switch p.GetName() {
			case "freezer.state":
				p.Value = proto.String("THAWED")
			case "cgroup.freeze":
				p.Value = proto.String("0")
			}
		}
		thawFolders(dir.GetChildren())
	}
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

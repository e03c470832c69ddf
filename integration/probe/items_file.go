package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

const fileSize = 10000

// create makes a file with some content and leaves it open.
func create(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o640)
	if err != nil {
		return nil, err
	}
	_, err = f.Write(text(path, fileSize))
	return f, err
}

// file is an open file with an offset, which a duplicate of it shares.
func file(p *probe) (func() error, error) {
	path := p.dir + "/file"
	f, err := create(path)
	if err != nil {
		return nil, err
	}
	dup, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	content := text(path, fileSize)
	offset := int64(500)
	_, err = f.Seek(offset, io.SeekStart)
	return func() error {
		got, err := unix.Seek(dup, 0, io.SeekCurrent)
		if err != nil {
			return err
		}
		buf := make([]byte, 10)
		if _, err := io.ReadFull(f, buf); err != nil {
			return err
		}
		err = errors.Join(equal("offset", got, offset), same("content", buf, content[offset:offset+10]))
		offset += 10
		return err
	}, err
}

// appendFile is a file to which others may append as well.
func appendFile(p *probe) (func() error, error) {
	path := p.dir + "/append"
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	want := ""
	add := func(w io.Writer, s string) error {
		want += s
		_, err := io.WriteString(w, s)
		return err
	}
	return func() error {
		other, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer other.Close()
		if err := errors.Join(add(other, "other "), add(f, "own ")); err != nil {
			return err
		}
		got, err := os.ReadFile(path)
		return errors.Join(err, same("content", got, []byte(want)))
	}, add(f, "first ")
}

// deleted is a file that has no name any more.
func deleted(p *probe) (func() error, error) {
	path := p.dir + "/deleted"
	f, err := create(path)
	if err != nil {
		return nil, err
	}
	content := text(path, fileSize)
	return func() error {
		got := make([]byte, fileSize)
		if _, err := f.ReadAt(got, 0); err != nil {
			return err
		}
		var stat unix.Stat_t
		err := errors.Join(same("content", got, content), unix.Fstat(int(f.Fd()), &stat), equal("links", stat.Nlink, 0))
		content[0]++
		_, werr := f.WriteAt(content[:1], 0)
		return errors.Join(err, werr)
	}, os.Remove(path)
}

// unlinked is an open file that lost the name it was opened by, but has another.
func unlinked(p *probe) (func() error, error) {
	path := p.dir + "/unlinked"
	f, err := create(path)
	if err != nil {
		return nil, err
	}
	os.Remove(path + "-other")
	return func() error {
		got := make([]byte, fileSize)
		_, err := f.ReadAt(got, 0)
		return errors.Join(err, same("content", got, text(path, fileSize)))
	}, errors.Join(os.Link(path, path+"-other"), os.Remove(path))
}

// directory is an open directory.
func directory(p *probe) (func() error, error) {
	path := p.dir + "/directory"
	if err := os.MkdirAll(path, 0o750); err != nil {
		return nil, err
	}
	d, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	n := 0
	return func() error {
		n++
		name := fmt.Sprint("entry", n)
		fd, err := unix.Openat(int(d.Fd()), name, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		unix.Close(fd)
		entries, err := os.ReadDir(path)
		return errors.Join(err, equal("entries", len(entries), n))
	}, nil
}

// mapping is a file's memory: shared, and private with a change.
func mapping(p *probe) (func() error, error) {
	path := p.dir + "/mapping"
	f, err := create(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	shared, err := unix.Mmap(int(f.Fd()), 0, fileSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	private, err := unix.Mmap(int(f.Fd()), 0, fileSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	own := text("private", 100)
	copy(private, own)
	n := 0
	return func() error {
		n++
		change := fmt.Appendf(nil, "change %d", n)
		copy(shared, change)
		got, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if !bytes.HasPrefix(got, change) {
			return errors.New("a change in memory does not reach the file")
		}
		return errors.Join(
			same("file", got[100:], text(path, fileSize)[100:]),
			same("private change", private[:100], own),
			same("private", private[100:], text(path, fileSize)[100:]))
	}, nil
}

// tmpfs is what lies in a file system in memory.
func tmpfs(*probe) (func() error, error) {
	dir := "/dev/shm/probe"
	file, link := dir+"/file", dir+"/link"
	err := all(
		func() error { return os.RemoveAll(dir) },
		func() error { return os.Mkdir(dir, 0o751) },
		func() error { return os.WriteFile(file, text(file, fileSize), 0o604) },
		func() error { return os.Symlink("file", link) },
		func() error { return os.Chmod(file, 0o604) },
	)
	if err != nil {
		return nil, err
	}
	before, err := os.Stat(file)
	return func() error {
		got, err := os.ReadFile(link)
		if err != nil {
			return err
		}
		now, err := os.Stat(file)
		if err != nil {
			return err
		}
		return errors.Join(
			same("content", got, text(file, fileSize)),
			equal("mode", now.Mode(), before.Mode()),
			// CRIU carries it in a tar file, which has only seconds.
			equal("modification time", now.ModTime().Unix(), before.ModTime().Unix()))
	}, err
}

// devices are open ones.
func devices(*probe) (func() error, error) {
	var files []*os.File
	for _, name := range []string{"/dev/null", "/dev/zero", "/dev/urandom"} {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	return func() error {
		if _, err := files[0].WriteString("nothing"); err != nil {
			return err
		}
		zero, random := text("", 100), make([]byte, 100)
		_, err := files[1].Read(zero)
		_, err2 := files[2].Read(random)
		if bytes.Equal(random, make([]byte, 100)) {
			err = errors.Join(err, errors.New("/dev/urandom: not random"))
		}
		return errors.Join(err, err2, same("/dev/zero", zero, make([]byte, 100)))
	}, nil
}

// lockItem is a file lock, which another process must not get.
func lockItem(kind string) func(p *probe) (func() error, error) {
	return func(p *probe) (func() error, error) {
		path := p.dir + "/" + kind
		f, err := create(path)
		if err != nil {
			return nil, err
		}
		a, err := startAgent(nil)
		if err != nil {
			return nil, err
		}
		return func() error {
			defer runtime.KeepAlive(f) // Else it is closed when it is found to be garbage.
			return a.expect("busy", "trylock %s %s", kind, path)
		}, lock(kind, f)
	}
}

func lock(kind string, f *os.File) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: 10, Len: 20}
	switch kind {
	case "flock":
		return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	case "fcntl":
		return unix.FcntlFlock(f.Fd(), unix.F_SETLK, &l)
	case "ofd":
		return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l)
	}
	return fmt.Errorf("no lock %q", kind)
}

// tryLock tells if a lock could be had, and does not keep it.
func tryLock(kind, path string) (string, error) {
	f, err := os.OpenFile(strings.TrimSpace(path), os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	err = lock(kind, f)
	switch {
	case err == nil:
		return "free", nil
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		return "busy", nil
	}
	return "", err
}

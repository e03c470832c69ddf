package criu

import (
	"encoding/binary"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// SoftDirty tells whether the kernel tracks which pages are written to
// (CONFIG_MEM_SOFT_DIRTY): it writes to one and looks at bit 55 of pagemap(5).
func SoftDirty() (bool, error) {
	size := os.Getpagesize()
	page, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return false, err
	}
	defer unix.Munmap(page)
	page[0] = 1
	if err := os.WriteFile("/proc/self/clear_refs", []byte("4"), 0); err != nil {
		return false, err
	}
	before, err := softDirty(page)
	if err != nil {
		return false, err
	}
	page[0] = 2
	after, err := softDirty(page)
	return !before && after, err
}

func softDirty(page []byte) (bool, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return false, err
	}
	defer f.Close()
	var entry [8]byte
	if _, err := f.ReadAt(entry[:], int64(uintptr(unsafe.Pointer(&page[0])))/int64(len(page))*8); err != nil {
		return false, err
	}
	return binary.NativeEndian.Uint64(entry[:])>>55&1 == 1, nil
}

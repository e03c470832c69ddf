package img

import (
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pagemap"

	"github.com/stasis-run/stasis/checkpoint/fault"
)

// Flags of pagemap entries, CRIU's include/pagemap.h.
const (
	pagesParent  = 1 << 0 // in an older checkpoint
	pagesLazy    = 1 << 1 // may be fetched later
	pagesPresent = 1 << 2 // in pages-*.img
)

// maxPages is more than any machine has.
const maxPages = 1 << 40

// PageRun is a run of pages of a process or of shared memory.
type PageRun struct {
	Addr  uint64 // of the first, in bytes
	Pages uint64

	flags uint32
	// newer: CRIU has said something of the pages that go-criu does not know, such
	// as that they are compressed.
	newer bool
}

// Present: the pages are in the checkpoint's own images, after those of the runs
// before.
func (r PageRun) Present() bool { return r.flags&pagesPresent != 0 }

// InParent: they are in the images of a checkpoint that this one builds on.
func (r PageRun) InParent() bool { return r.flags&pagesParent != 0 }

// Pagemap returns what reads the messages of an image of kind PAGEMAP: the first
// sets pagesID, the number of the image that has the pages, and fn is called for
// each of the others.
func Pagemap(pagesID *uint32, fn func(PageRun) error) func(msg []byte) error {
	first := true
	return func(msg []byte) error {
		if first {
			first = false
			var head pagemap.PagemapHead
			err := Decode(msg, &head)
			*pagesID = head.GetPagesId()
			return err
		}
		var e pagemap.PagemapEntry
		if err := Decode(msg, &e); err != nil {
			return err
		}
		r := PageRun{Addr: e.GetVaddr(), Pages: e.GetNrPages(), flags: pageFlags(&e), newer: len(e.ProtoReflect().GetUnknown()) > 0}
		if e.NrPages == nil {
			r.Pages = uint64(e.GetCompatNrPages()) // CRIU before 4.2
		}
		if r.Pages > maxPages || r.Addr > 1<<63 {
			return fault.Invalid("lists more memory than there can be")
		}
		return fn(r)
	}
}

// pageFlags are those of a run. CRIU before 2.9 had in_parent instead; its pagemap.c,
// init_compat_pagemap_entry.
func pageFlags(e *pagemap.PagemapEntry) uint32 {
	switch {
	case e.GetInParent():
		return e.GetFlags() | pagesParent
	case e.Flags == nil:
		return pagesPresent
	}
	return e.GetFlags()
}

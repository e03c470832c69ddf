// Package img reads and writes CRIU images: the files that a dump of CRIU consists of,
// most of which are sequences of protobuf messages.
//
// Reader, Each and EachIn read one image message by message, Pagemap reads a list of
// memory pages, and Set.Derive reads what a restore has to know of all of them. Rewrite
// changes an image, RepairTimers and ThawGroups what CRIU gets wrong, and Flatten puts a
// dump and the pre-dumps that it builds on together.
//
// Images are untrusted input: nothing is believed of a length, or of what a message says,
// that was not checked. Package imgtest makes images for tests.
package img

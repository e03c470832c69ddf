// Package contentstore uploads blobs to containerd's content store. It is the only
// package that knows the private layout of the store's folder, and writes there.
//
// # Why the folder
//
// A gigabyte costs containerd four seconds of CPU when it comes through its socket, in
// HTTP/2 frames of 16 KiB. So an Upload is begun through the socket, and its bytes are
// written into the file that containerd made for it. The file then gets a second name,
// the one of a blob. The blob is committed through the socket: containerd takes it for
// one that another namespace has uploaded, and does not read it again.
//
// # Layout
//
// The folder is the one of containerd's local content store
// (plugins/content/local/store.go; content/local/store.go before 2.0):
//
//	ingest/*/ref            the name of an upload, with a prefix for its namespace
//	ingest/*/data           its bytes so far
//	blobs/ALGORITHM/DIGEST  a blob, of mode 0444
//
// containerd 1.0.0, 1.7.28, 2.0.0 and 2.4.2 were read, and have the same. The folder is
// used with the major versions 1 and 2 only (layoutKnown). A new major version has to be
// read before it is added there.
//
// One thing differs: containerd 2 turns on fs-verity for the blobs that it names itself,
// if the file system has it, and not for these. It does not require it of a blob.
//
// # Fallback
//
// All bytes go through the socket if the version of containerd is another or not known,
// if the content store is not containerd's own, and if the folder is not here or has no
// upload of that name with an empty, regular file. If the file cannot get the name of the
// blob, for example because that is on another file system, or if containerd does not see
// the blob there, containerd is told to go on with the upload. It then hashes the file
// itself, as it does with an upload from before a restart.
package contentstore

// Package tarcheck refuses tars that two programs could read differently.
//
// A tar has several ways to say the same thing: a long name in a GNU header (L), in
// a PAX header (path) or in two fields of the header itself; a size in three
// encodings. Where an entry uses two ways at once, Go's archive/tar, GNU tar and
// others differ in which one counts. What Stasis checks with Go's reader, CRIU hands
// to GNU tar; so an attacker could show a harmless name to the one and another name
// to the other.
//
// NewReader passes a tar through and looks at the raw headers, which archive/tar does
// not show:
//
//	scan := tarcheck.NewReader(r, nil)
//	archive := tar.NewReader(scan)
//	… until io.EOF, then
//	err := scan.Finish() // no data behind the end
//
// What passes, archive/tar and GNU tar read as the same names, types and sizes.
// Accepted are plain headers of V7, ustar and GNU; PAX headers; GNU's long names and
// its old form of sparse files, which CRIU's tar writes. Errors match
// errdefs.ErrInvalidArgument.
package tarcheck

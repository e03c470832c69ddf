// Package processtest is for tests of what runs containers, without runc, CRIU and
// root's privileges where they can be done without: a fake of the OCI runtime whose
// processes are real, but no containers (Runtime); points at which a test holds what it
// tests (Point); and a CRIU that restores a process (Main).
//
// A test binary that uses it calls Main in TestMain, and has one process.Reaper for all
// its tests: a second one would take the first one's children.
package processtest

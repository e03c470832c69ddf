package inspect

// Limits on what is read. A report is read by people; a checkpoint beyond these
// can still be restored.
const (
	// maxEntries is of files in the folder: those of package checkpoint.
	maxEntries = 1 << 16
	// maxItems is of processes, threads, mappings, descriptors, open files and
	// mounts in a report, together.
	maxItems = 1 << 20
	// maxManifest and maxImage are in bytes: those of package checkpoint.
	maxManifest = 16 << 20
	maxImage    = 256 << 20
	maxPagemap  = 1 << 30
	// maxPath is in bytes, of a name in an image; Linux's PATH_MAX.
	maxPath = 4096
	// maxStrings is in bytes, of the arguments of a process, and of its
	// environment. What is longer is cut.
	maxStrings = 256 << 10
	// maxSteps bounds the work on one list of memory pages, in runs of pages
	// times mappings they touch: the kernel's mappings do not overlap, and CRIU
	// lists no page twice.
	maxSteps = 1 << 24
)

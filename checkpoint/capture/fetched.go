package capture

// Fetched is what the command line tells the shim of a checkpoint that it has
// copied for it (`stasis stage`), as JSON on stdout. The copy is a folder:
//
//	checkpoint/  CRIU's images, flat
//	layer.tar    the Layer; missing if that is nil
//
// There is no spec in it: that of the new container decides.
type Fetched struct {
	Info Info `json:"info"`
	// OtherBase says why the checkpoint's files do not belong on the image of
	// the container that they are for; it is empty if they do.
	OtherBase string `json:"other_base,omitempty"`
}

// FetchedArchive is the descriptor that `stasis stage --archive` reads from: the
// file that the shim has found to be allowed, whatever has its name by then.
const FetchedArchive = 3

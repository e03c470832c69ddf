package layout

import "testing"

// TestNames pins the names: of those in the folder, checkpoints of other versions and
// of other software have the same.
func TestNames(t *testing.T) {
	for got, want := range map[string]string{
		Manifest: "stasis.json", Signature: "stasis.sig.json", Partial: ".partial", ParentLink: ".parent", PreDump(2): ".pre-2",
		Inventory: "inventory.img", Descriptors: "descriptors.json", DumpLog: "dump.log", DumpStats: "stats-dump",
		Core.Name(17): "core-17.img", Pages.Name(1): "pages-1.img", PagemapShared.Name(4): "pagemap-shmem-4.img",
		GhostFile.Hex(26): "ghost-file-1a.img", UTSNamespace.Glob(): "utsns-*.img",
		EmbeddedInfo: ".stasis/info.json", EmbeddedSpec: ".stasis/spec.json",
		EmbeddedImages: ".stasis/checkpoint", EmbeddedDevShm: ".stasis/devshm-checkpoint.tar",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestSeries(t *testing.T) {
	for name, want := range map[string][3]bool{ // Begins and Has of Pagemap, IsIncidental
		"pagemap-1.img":       {true, true, false},
		"pagemap-shmem-1.img": {true, true, false},
		"pagemap-1":           {true, false, false},
		"pages-1.img":         {},
		"restore.log":         {false, false, true},
		"stats-restore":       {false, false, true},
	} {
		if got := [3]bool{Pagemap.Begins(name), Pagemap.Has(name), IsIncidental(name)}; got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
}

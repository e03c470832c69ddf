package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"regexp"
	"sync"

	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"

	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// knownImages are the images of CRIU 3.3 and later that a container can have.
//
// Not among them are those of older versions (creds-*, sigacts-*, reg-files, …),
// which CRIU still reads, in place of what is checked here; and those that change
// the host: binfmt-misc-* (programs that the kernel starts), apparmor (policies
// that CRIU loads), autofs-*, and what plugins read.
var knownImages = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^(` +
		`inventory|pstree|seccomp|files|cgroup|filelocks|remap-fpath|pipes-data|fifo-data|sk-queues|tty-info|tty-data|memfd|bpfmap-data|cpuinfo` +
		`|(core|ids|mm|fs|fdinfo|pagemap|pages|mountpoints|utsns|userns|pidns|timens|netns|netdev)-\d+` +
		`|(ipcns-(var|shm|msg|sem)|pagemap-shmem)-\d+` +
		`|(ifaddr|route|route6|rule|iptables|ip6tables|nftables|netns-ct|netns-exp)-\d+` +
		`|(tcp-stream|ghost-file)-[0-9a-f]+` +
		`|tmpfs-(dev-)?\d+\.tar\.gz)\.img$`)
})

var imageName = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`\.img$`) })

func (c *checker) checkNames() error {
	for _, name := range c.ckpt.Names() {
		if imageName().MatchString(name) && !knownImages().MatchString(name) {
			c.refuse("image %s is of a kind that no container needs", quote(name))
		}
	}
	return nil
}

// checkDescriptors looks at descriptors.json, by which the OCI runtime gives its
// own descriptors to the processes: from the fourth on, that would be its socket
// to CRIU, and its namespaces.
func (c *checker) checkDescriptors() error {
	f, err := c.ckpt.OpenFile(layout.Descriptors)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, 64<<10+1))
	if err != nil {
		return err
	}
	var list []string
	if err := json.Unmarshal(data, &list); err != nil || len(data) > 64<<10 {
		return fault.Invalid("descriptors.json: not a list of strings: %v", err)
	}
	if len(list) > 3 {
		c.refuse("descriptors.json lists %d descriptors, where a container has 3", len(list))
	}
	return nil
}

// inventoryFacts is what inventory.img says of the host.
type inventoryFacts struct {
	root     *core.TaskKobjIdsEntry // the namespaces of CRIU itself: the host's
	appArmor bool                   // was in force
}

var runID = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[0-9A-Fa-f-]{1,64}$`) })

func (c *checker) checkInventory() error {
	var inv inventory.InventoryEntry
	if err := c.need(layout.Inventory, "INVENTORY", &inv); err != nil {
		return err
	}
	c.inventory.root = inv.GetRootIds()
	if c.inventory.root == nil {
		return fault.Invalid("inventory.img does not say which namespaces are the host's; the checkpoint was made by a CRIU older than 1.0")
	}
	c.inventory.appArmor = inv.GetLsmtype() == inventory.Lsmtype_APPARMOR
	if id := inv.DumpCriuRunId; id != nil && !runID().MatchString(*id) {
		// It becomes part of a command of nft.
		c.refuse("inventory.img: the run ID %s is none of CRIU's", quote(*id))
	}
	if !inv.GetFdinfoPerId() || !inv.GetNsPerId() {
		return fault.Invalid("inventory.img: a format of CRIU before 1.1, which cannot be checked")
	}
	return nil
}

// comm is how an error names a process.
func (t *task) String() string { return fmt.Sprintf("process %d (%s)", t.pid, t.comm) }

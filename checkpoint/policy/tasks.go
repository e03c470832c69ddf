package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/creds"
	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint"
	"github.com/stasis-run/stasis/checkpoint/fault"
	"github.com/stasis-run/stasis/checkpoint/layout"
)

// task is one process of the checkpoint.
type task struct {
	pid     uint32
	comm    string
	alive   bool
	threads []uint32
	ids     *core.TaskKobjIdsEntry // nil for a zombie
	memory  addressSpace
}

// Task states, CRIU's compel/include/uapi/task-state.h. In the latter two there is
// nothing but an exit code.
const (
	taskAlive   = 1
	taskDead    = 2
	taskStopped = 3
	taskZombie  = 6
)

func (c *checker) checkTasks() error {
	if err := c.readFilters(); err != nil {
		return err
	}
	seen := map[uint32]bool{}
	err := c.each(layout.ProcessTree, "PSTREE", func(msg []byte) error {
		var p pstree.PstreeEntry
		if err := c.decode(msg, &p); err != nil {
			return err
		}
		if seen[p.GetPid()] {
			return fault.Invalid("process %d is listed twice", p.GetPid())
		}
		seen[p.GetPid()] = true
		t, err := c.checkTask(&p)
		c.tasks = append(c.tasks, t)
		return err
	})
	if err == nil && len(c.tasks) == 0 {
		err = fault.Invalid("pstree.img: lists no process")
	}
	return err
}

func (c *checker) checkTask(p *pstree.PstreeEntry) (task, error) {
	t := task{pid: p.GetPid()}
	var e core.CoreEntry
	name := layout.Core.Name(t.pid)
	if err := c.need(name, "CORE", &e); err != nil {
		return t, err
	}
	tc := e.GetTc()
	if tc == nil {
		return t, fault.Invalid("%s: says nothing of process %d", name, t.pid)
	}
	t.comm = strings.Trim(quote(tc.GetComm()), `"`)
	switch tc.GetTaskState() {
	case taskDead, taskZombie:
		return t, nil
	case taskAlive, taskStopped:
		t.alive = true
	default:
		return t, fault.Invalid("%s: unknown state %d", name, tc.GetTaskState())
	}
	t.threads = p.GetThreads()
	if !slices.Contains(t.threads, t.pid) {
		return t, fault.Invalid("pstree.img: process %d is not among its own threads", t.pid)
	}
	c.checkTaskCore(&t, tc)
	for _, tid := range t.threads {
		if c.threads[tid] {
			return t, fault.Invalid("pstree.img: thread %d of process %d is listed twice", tid, t.pid)
		}
		c.threads[tid] = true
		thread := e.GetThreadCore()
		if tid != t.pid {
			var other core.CoreEntry
			if err := c.need(layout.Core.Name(tid), "CORE", &other); err != nil {
				return t, err
			}
			thread = other.GetThreadCore()
		}
		c.checkThread(&t, tid, thread, e.GetThreadCore())
	}
	if e.Ids != nil {
		return t, fault.Invalid("%s: has the namespaces of process %d, as in CRIU before 1.0", name, t.pid)
	}
	t.ids = &core.TaskKobjIdsEntry{}
	if err := c.need(layout.IDs.Name(t.pid), "IDS", t.ids); err != nil {
		return t, err
	}
	return t, c.checkMemoryMap(&t)
}

// unsetLoginUID is that of a process that no login has led to.
const unsetLoginUID = ^uint32(0)

func (c *checker) checkTaskCore(t *task, tc *core.TaskCoreEntry) {
	if tc.OldSeccompMode != nil || tc.OldSeccompFilter != nil {
		// CRIU would take them in place of those of the threads.
		c.refuse("%s: has the seccomp mode of a CRIU older than 3.11", t)
	}
	if id := tc.Loginuid; id != nil && *id != unsetLoginUID && *id != ownLoginUID() && !c.grant.any("CAP_AUDIT_CONTROL") {
		c.refuse("%s: loginuid %d, which would be its name in the host's audit log", t, *id)
	}
	if score := tc.OomScoreAdj; score != nil && *score < c.lowestOOMScore() && !c.grant.any("CAP_SYS_RESOURCE") {
		c.refuse("%s: OOM score %d, the spec has %d", t, *score, c.lowestOOMScore())
	}
	for i, limit := range tc.GetRlimits().GetRlimits() {
		if most, known := c.rlimit(i); known && limit.GetMax() > most && !c.grant.any("CAP_SYS_RESOURCE") {
			c.refuse("%s: resource limit %s %d is above %d, and CAP_SYS_RESOURCE is not granted", t, rlimitNames[i], limit.GetMax(), most)
		}
	}
}

// checkThread is for each thread: each has credentials of its own.
func (c *checker) checkThread(t *task, tid uint32, th, leader *core.ThreadCoreEntry) {
	who := t.String()
	if tid != t.pid {
		who += fmt.Sprintf(" thread %d", tid)
	}
	// Without them, CRIU would leave it its own: root's, with all capabilities.
	if th == nil || th.GetCreds() == nil {
		c.refuse("%s: has no credentials in the checkpoint", who)
		return
	}
	c.checkCreds(who, th.GetCreds())
	c.checkSeccomp(who, th, leader)
	switch th.GetSchedPolicy() {
	case unix.SCHED_NORMAL, unix.SCHED_BATCH, unix.SCHED_IDLE:
	default:
		if !c.grant.any("CAP_SYS_NICE") {
			c.refuse("%s: real-time scheduling policy %d needs CAP_SYS_NICE", who, th.GetSchedPolicy())
		}
	}
	if nice := th.GetSchedNice(); nice < ownNice() && !c.grant.any("CAP_SYS_NICE") {
		c.refuse("%s: nice value %d needs CAP_SYS_NICE", who, nice)
	}
}

// secureKeepCaps is the one of the securebits that needs no capability.
const secureKeepCaps = 1 << 4

func (c *checker) checkCreds(who string, e *creds.CredsEntry) {
	g := &c.grant
	for _, id := range []struct {
		name string
		id   uint32
		user bool
	}{
		{"uid", e.GetUid(), true}, {"euid", e.GetEuid(), true}, {"suid", e.GetSuid(), true}, {"fsuid", e.GetFsuid(), true},
		{"gid", e.GetGid(), false}, {"egid", e.GetEgid(), false}, {"sgid", e.GetSgid(), false}, {"fsgid", e.GetFsgid(), false},
	} {
		switch {
		case id.user && !g.uid(id.id):
			c.refuse("%s: %s %d, the spec grants %v", who, id.name, id.id, sortedIDs(g.uids))
		case !id.user && !g.gid(id.id):
			c.refuse("%s: %s %d, the spec grants %v", who, id.name, id.id, sortedIDs(g.gids))
		}
	}
	for _, gid := range e.GetGroups() {
		if !g.gid(gid) {
			c.refuse("%s: group %d, the spec grants %v", who, gid, sortedIDs(g.gids))
		}
	}
	for _, set := range []struct {
		name    string
		words   []uint32
		granted capset
	}{
		{"bounding", e.GetCapBnd(), g.bounding}, {"permitted", e.GetCapPrm(), g.caps}, {"effective", e.GetCapEff(), g.caps},
		{"inheritable", e.GetCapInh(), g.inheritable}, {"ambient", e.GetCapAmb(), g.caps},
	} {
		have, ok := capsIn(set.words)
		if excess := have &^ set.granted; excess != 0 || !ok {
			c.refuse("%s: %s capabilities beyond the spec's: %s", who, set.name, excess)
		}
	}
	if bits := e.GetSecbits() &^ secureKeepCaps; bits != 0 && !g.any("CAP_SETPCAP") {
		c.refuse("%s: securebits %#x need CAP_SETPCAP", who, e.GetSecbits())
	}
	if g.noNewPrivs && e.GetNoNewPrivs() == 0 {
		c.refuse("%s: no_new_privs is not set, and the spec sets it", who)
	}
	c.checkLSM(who, e)
}

// checkLSM compares the profile with the spec's. CRIU gives each process the one
// that its image names, and none if it names none; but with AppArmor, a process
// that had one gets the spec's.
func (c *checker) checkLSM(who string, e *creds.CredsEntry) {
	var want string
	if p := c.spec.Process; p != nil {
		switch {
		case p.SelinuxLabel != "":
			want = p.SelinuxLabel
		case p.ApparmorProfile != checkpoint.Unconfined:
			want = p.ApparmorProfile
		}
	}
	have := e.GetLsmProfile()
	if c.inventory.appArmor && want != "" && c.spec.Process.SelinuxLabel == "" && have != "" && have != checkpoint.Unconfined {
		have = want
	}
	if have != want && !(want == "" && have == checkpoint.Unconfined) {
		c.refuse("%s: LSM profile %s, the spec has %s", who, quote(have), quote(want))
	}
	if have := e.GetLsmSockcreate(); have != "" && have != want {
		c.refuse("%s: label for new sockets %s, the spec has %s", who, quote(have), quote(want))
	}
	if len(e.GetApparmorData()) > 0 {
		c.refuse("%s: brings AppArmor policies", who)
	}
}

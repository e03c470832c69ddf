package policy

import (
	"context"
	"fmt"

	core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	seccompimg "github.com/checkpoint-restore/go-criu/v8/crit/images/seccomp"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/checkpoint/layout"
	"github.com/stasis-run/stasis/checkpoint/policy/seccomp"
)

// The OCI runtime does not apply the spec's seccomp profile in a restore: a
// process has the filters that its images hold, and nothing else. So one of them
// must be at least as strict as the profile, for each system call of each
// architecture. How libseccomp wrote it down does not matter, which differs
// between its versions.

// maxFilters bounds the filters of one process: a chain in an image may have a loop.
const maxFilters = 256

// readFilters reads seccomp.img, and judges each chain of filters.
func (c *checker) readFilters() error {
	var e seccompimg.SeccompEntry
	if _, err := c.one(layout.Seccomp, "SECCOMP", &e); err != nil {
		return err
	}
	for _, f := range e.GetSeccompFilters() {
		if flags := f.GetFlags() &^ (unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_LOG | unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW); flags != 0 {
			c.refuse("seccomp.img: a filter with flags %#x", f.GetFlags())
		}
	}
	if c.spec.Linux == nil || c.spec.Linux.Seccomp == nil {
		return nil
	}
	p, err := seccomp.NewProfile(c.spec.Linux.Seccomp)
	if err != nil {
		return err
	}
	list := e.GetSeccompFilters()
	judged := map[string]string{} // CRIU writes the same filter for every process anew
	for first := range list {
		v := verdict{bad: "there is no filter"}
		at := uint32(first)
		for range maxFilters {
			if at >= uint32(len(list)) {
				v.bad = fmt.Sprintf("filter %d is missing", at)
				break
			}
			filter := string(list[at].GetFilter())
			if _, known := judged[filter]; !known {
				if err := context.Cause(c.ctx); err != nil {
					return err
				}
				judged[filter] = p.Beyond(list[at].GetFilter())
			}
			// The last of the chain was the first to be installed, by the
			// runtime, and so says it best.
			v = verdict{judged[filter], list[at].GetFlags()&unix.SECCOMP_FILTER_FLAG_TSYNC != 0}
			if v.bad == "" || list[at].Prev == nil {
				break
			}
			at = list[at].GetPrev()
		}
		c.filters[uint32(first)] = v
	}
	return nil
}

// verdict is that on a chain of filters: what it permits and the profile does not,
// and whether the filter that is as strict holds for all threads of a process.
type verdict struct {
	bad        string
	allThreads bool
}

// checkSeccomp is for a thread. CRIU writes down no filter for those that have
// their leader's, which it then restores for all threads.
func (c *checker) checkSeccomp(who string, th, leader *core.ThreadCoreEntry) {
	if c.spec.Linux == nil || c.spec.Linux.Seccomp == nil || th.GetSeccompMode() == core.SeccompMode_strict {
		return
	}
	if th.GetSeccompMode() != core.SeccompMode_filter || th.SeccompFilter == nil {
		if leader.GetSeccompMode() == core.SeccompMode_filter && leader.SeccompFilter != nil {
			if v := c.filters[leader.GetSeccompFilter()]; v.allThreads {
				return // and if it is bad, that was said of the leader
			}
		}
		c.refuse("%s: has no seccomp filter, and the spec has a profile", who)
		return
	}
	v, ok := c.filters[th.GetSeccompFilter()]
	if !ok {
		v.bad = fmt.Sprintf("filter %d is missing", th.GetSeccompFilter())
	}
	if v.bad != "" {
		c.refuse("%s: its seccomp filters permit more than the spec's profile: %s", who, v.bad)
	}
}

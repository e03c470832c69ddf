package trust

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/cgroup"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// CRIU moves each process into the control group that its image names, and makes
// those that are missing, as root in the host's hierarchies. The runtime gives it
// the container's own group in place of the one that the image lists for a
// controller; a path that is not below that one stays as it is.

var (
	controllerName = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^(name=)?[A-Za-z0-9_.-]*$`) })
	propertyName   = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[a-z0-9_]+(\.[A-Za-z0-9_-]+)*$`) })
)

func (c *checker) checkCgroups() error {
	var e cgroup.CgroupEntry
	if _, err := c.one("cgroup.img", "CGROUP", &e); err != nil {
		return err
	}
	if c.img.Options().CgroupsMode == "ignore" {
		return nil // CRIU leaves them where the runtime has put them
	}
	roots := map[string]string{} // the group of each controller
	for _, ctl := range e.GetControllers() {
		for _, name := range ctl.GetCnames() {
			if _, twice := roots[name]; twice || !controllerName().MatchString(name) || name == ".." {
				c.refuse("cgroup.img: controller %s is listed twice, or none", quote(name))
			}
			switch dirs := ctl.GetDirs(); {
			case len(dirs) == 1:
				roots[name] = "/" + strings.TrimPrefix(dirs[0].GetDirName(), "/")
			case len(dirs) > 1:
				common := commonGroup(name, dirs, e.GetSets())
				if common == "" {
					c.refuse("cgroup.img: processes are in several groups of controller %s that have no common one", quote(name))
				}
				roots[name] = common
			}
		}
		for _, dir := range ctl.GetDirs() {
			c.checkCgroupFolder(dir, true, strings.Join(ctl.GetCnames(), ","))
		}
	}
	for _, set := range e.GetSets() {
		for _, m := range set.GetCtls() {
			c.checkMember(m, roots)
		}
	}
	return nil
}

// commonGroup is for a container that has made groups below its own and has moved
// all its processes into them: CRIU then lists only those. It returns the group
// above them, which is the root of the container's cgroup namespace, if CRIU puts
// every one of them below the new container's group, as its rewrite_cgsets does:
// it takes the listed groups in turn, and gives the new root to each member whose
// path begins with that group's and has none yet, and to the group if there is one.
func commonGroup(controller string, dirs []*cgroup.CgroupDirEntry, sets []*cgroup.CgSetEntry) string {
	var members []string
	root := ""
	for _, set := range sets {
		for _, m := range set.GetCtls() {
			if m.GetName() != controller {
				continue
			}
			p, prefix := m.GetPath(), int(m.GetCgnsPrefix())
			if prefix <= 1 || prefix > len(p) || root != "" && p[:prefix] != root {
				return ""
			}
			root = p[:prefix]
			if climbs(p) || root != path.Clean(root) || !isBelow(p, root) {
				return ""
			}
			members = append(members, p)
		}
	}
	for _, dir := range dirs {
		name := "/" + dir.GetDirName()
		if root == "" || climbs(name) || !isBelow(name, root) {
			return ""
		}
		left := slices.DeleteFunc(slices.Clone(members), func(p string) bool { return strings.HasPrefix(p, name) })
		if len(left) == len(members) {
			return ""
		}
		members = left
	}
	if len(members) > 0 {
		return ""
	}
	return root
}

func (c *checker) checkMember(m *cgroup.CgMemberEntry, roots map[string]string) {
	where, known := roots[m.GetName()]
	p := m.GetPath()
	if !known {
		c.refuse("cgroup.img: group %s of controller %s, which the image does not list", quote(p), quote(m.GetName()))
		return
	}
	if climbs(p) || !isBelow(p, where) {
		c.refuse("cgroup.img: group %s of controller %s is outside of the container's", quote(p), quote(m.GetName()))
		return
	}
	prefix := int(m.GetCgnsPrefix())
	at := func(s string) bool { return prefix <= len(s) && (prefix == len(s) || s[prefix] == '/') }
	switch {
	case prefix < 0 || prefix > 0 && (!at(p) || !at(where) || p[:prefix] != where[:prefix]):
		c.refuse("cgroup.img: group %s of controller %s has a namespace that ends in the middle of a name (%d)", quote(p), quote(m.GetName()), prefix)
	case prefix == 0 && p != "/" && c.namespace(specs.CgroupNamespace) != nil:
		c.refuse("cgroup.img: group %s of controller %s is not in the cgroup namespace that the spec has", quote(p), quote(m.GetName()))
	}
}

func (c *checker) checkCgroupFolder(dir *cgroup.CgroupDirEntry, top bool, controller string) {
	name := dir.GetDirName()
	if climbs(name) || !top && (strings.Contains(name, "/") || name == "" || name == ".") {
		c.refuse("cgroup.img: group %s of controller %s climbs out of the container's", quote(name), quote(controller))
	}
	if p := dir.GetDirPerms(); p != nil && (p.GetUid() != 0 && !c.grant.uid(p.GetUid()) || p.GetGid() != 0 && !c.grant.gid(p.GetGid())) {
		c.refuse("cgroup.img: group %s belongs to %d:%d, which the spec does not grant", quote(name), p.GetUid(), p.GetGid())
	}
	for _, prop := range dir.GetProperties() {
		if !propertyName().MatchString(prop.GetName()) || prop.GetName() == "release_agent" {
			c.refuse("cgroup.img: %s is no property of a control group", quote(prop.GetName()))
		}
		if top {
			c.checkProperty(prop)
		}
	}
	for _, child := range dir.GetChildren() {
		c.checkCgroupFolder(child, false, controller)
	}
}

// checkProperty is for the container's own group. CRIU sets its properties only if
// it is told to (cgroups_mode full), which the manifest of the checkpoint decides.
// That the limits are those of then is what the mode is for; access to devices
// beyond the spec's is not.
func (c *checker) checkProperty(prop *cgroup.CgroupPropEntry) {
	if mode := c.img.Options().CgroupsMode; mode != "full" && mode != "strict" || prop.GetName() != "devices.list" {
		return
	}
	for line := range strings.Lines(prop.GetValue()) {
		if line = strings.TrimSpace(line); !c.mayUseDevices(line) {
			c.refuse("cgroup.img: access to devices %s is beyond the spec's", quote(line))
		}
	}
}

// runtimeDevices are what the OCI runtimes allow every container.
var runtimeDevices = []string{"c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm", "c 5:0 rwm",
	"c 5:1 rwm", "c 5:2 rwm", "c 10:200 rwm", "c 136:* rwm"}

// mayUseDevices tells whether the spec has a line of devices.list.
func (c *checker) mayUseDevices(line string) bool {
	if slices.Contains(runtimeDevices, line) || allDevicesOf(c.spec) {
		return true
	}
	if c.spec.Linux == nil || c.spec.Linux.Resources == nil {
		return false
	}
	number := func(n *int64) string {
		if n == nil || *n < 0 {
			return "*"
		}
		return fmt.Sprint(*n)
	}
	kind, rest, _ := strings.Cut(line, " ")
	node, access, _ := strings.Cut(rest, " ")
	for _, r := range c.spec.Linux.Resources.Devices {
		if !r.Allow || r.Type != kind && r.Type != "" && r.Type != "a" {
			continue
		}
		missing := strings.ContainsFunc(access, func(a rune) bool { return !strings.ContainsRune(r.Access, a) })
		if !missing && node == number(r.Major)+":"+number(r.Minor) {
			return true
		}
	}
	return false
}

// annotationSandboxID is on every container of a pod.
const annotationSandboxID = "io.kubernetes.cri.sandbox-id"

// checkMode refuses that a checkpoint brings limits of its own into a pod.
func (c *checker) checkMode() error {
	mode := c.img.Options().CgroupsMode
	if _, pod := c.spec.Annotations[annotationSandboxID]; pod && (mode == "full" || mode == "strict") {
		c.refuse("the checkpoint's own limits (cgroups_mode %s) in place of the pod's", mode)
	}
	return nil
}

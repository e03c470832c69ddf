package policy

import (
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/cgroup"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/stasis-run/stasis/checkpoint/layout"
)

// CRIU moves each process into the control group that its image names, and makes
// those that are missing, as root in the host's hierarchies. The runtime gives it
// the container's own group in place of the one that the image lists for a
// controller; a path that is not below that one stays as it is.

var (
	controllerName = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^(name=)?[A-Za-z0-9_.-]*$`) })
)

func (c *checker) checkCgroups() error {
	var e cgroup.CgroupEntry
	if _, err := c.one(layout.Cgroups, "CGROUP", &e); err != nil {
		return err
	}
	if c.ckpt.Options().CgroupsMode == "ignore" {
		return nil // CRIU leaves them where the runtime has put them
	}
	roots := map[string]string{} // the group of each controller
	hierarchies, err := hostHierarchies()
	if err != nil {
		return err
	}
	for _, ctl := range e.GetControllers() {
		// CRIU mounts each, which makes one that is not there, for the host.
		if names := hierarchy(ctl.GetCnames()); !hierarchies[names] || len(ctl.GetCnames()) == 0 {
			c.refuse("cgroup.img: controller %s is none that this host has", quote(names))
		}
		for _, name := range ctl.GetCnames() {
			if _, twice := roots[name]; twice || !controllerName().MatchString(name) || name == ".." {
				c.refuse("cgroup.img: controller %s is listed twice, or none", quote(name))
				continue
			}
			switch dirs := ctl.GetDirs(); {
			case len(dirs) == 1:
				roots[name] = "/" + strings.TrimPrefix(dirs[0].GetDirName(), "/")
			case len(dirs) > maxGroups:
				c.refuse("cgroup.img: processes are in %d groups of controller %s", len(dirs), quote(name))
			case len(dirs) > 1:
				common, err := c.commonGroup(name, dirs, e.GetSets())
				if err != nil {
					return err
				}
				if common == "" {
					c.refuse("cgroup.img: processes are in several groups of controller %s that have no common one", quote(name))
				}
				roots[name] = common
			}
		}
		for _, dir := range ctl.GetDirs() {
			c.checkCgroupFolder(dir, true, hierarchy(ctl.GetCnames()))
		}
	}
	for _, set := range e.GetSets() {
		for _, m := range set.GetCtls() {
			c.checkMember(m, roots)
		}
	}
	return nil
}

// maxGroups bounds those that CRIU lists for one controller.
const maxGroups = 1024

// commonGroup is for a container that has made groups below its own and has moved
// all its processes into them: CRIU then lists only those. It returns the group
// above them, which is the root of the container's cgroup namespace, if CRIU puts
// every one of them below the new container's group, as its rewrite_cgsets does:
// it takes the listed groups in turn, and gives the new root to each member whose
// path begins with that group's and has none yet, and to the group if there is one.
func (c *checker) commonGroup(controller string, dirs []*cgroup.CgroupDirEntry, sets []*cgroup.CgSetEntry) (string, error) {
	var members []string
	root := ""
	for _, set := range sets {
		if err := c.budget.spend(len(set.GetCtls()), 0); err != nil {
			return "", err
		}
		for _, m := range set.GetCtls() {
			if m.GetName() != controller {
				continue
			}
			p, prefix := m.GetPath(), int(m.GetCgnsPrefix())
			if prefix <= 1 || prefix > len(p) || root != "" && p[:prefix] != root {
				return "", nil
			}
			root = p[:prefix]
			if climbs(p) || root != path.Clean(root) || !isBelow(p, root) {
				return "", nil
			}
			members = append(members, p)
		}
	}
	for _, dir := range dirs {
		if err := c.budget.spend(len(members), 0); err != nil {
			return "", err
		}
		name := "/" + dir.GetDirName()
		if root == "" || climbs(name) || !isBelow(name, root) {
			return "", nil
		}
		left := slices.DeleteFunc(slices.Clone(members), func(p string) bool { return strings.HasPrefix(p, name) })
		if len(left) == len(members) {
			return "", nil
		}
		members = left
	}
	if len(members) > 0 {
		return "", nil
	}
	return root, nil
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
	c.checkCgroupPerms(quote(name), dir.GetDirPerms(), maxFolderMode)
	for _, prop := range dir.GetProperties() {
		c.checkProperty(prop, top)
	}
	for _, child := range dir.GetChildren() {
		c.checkCgroupFolder(child, false, controller)
	}
}

// annotationSandboxID is on every container of a pod.
const annotationSandboxID = "io.kubernetes.cri.sandbox-id"

// checkMode refuses that a checkpoint brings limits of its own into a pod.
func (c *checker) checkMode() error {
	mode := c.ckpt.Options().CgroupsMode
	if _, pod := c.spec.Annotations[annotationSandboxID]; pod && (mode == "full" || mode == "strict") {
		c.refuse("the checkpoint's own limits (cgroups_mode %s) in place of the pod's", mode)
	}
	return nil
}

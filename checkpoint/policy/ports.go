package policy

import (
	"strconv"
	"strings"

	inet "github.com/checkpoint-restore/go-criu/v8/crit/images/sk-inet"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-run/stasis/process"
)

const (
	portStart        = "net.ipv4.ip_unprivileged_port_start"
	defaultPortStart = 1024
)

// checkPort is for a socket that CRIU binds, as root, to the port that the image has.
func (c *checker) checkPort(who opened, sk *inet.InetSkEntry) {
	switch sk.GetProto() {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_UDPLITE, unix.IPPROTO_SCTP, unix.IPPROTO_DCCP, unix.IPPROTO_MPTCP, 0:
	default:
		return // of others it is a number that the kernel gave
	}
	switch port := sk.GetSrcPort(); {
	case port > 0xffff:
		c.refuse("%s: src_port %d is no port", who, port)
	case port == 0 || c.grant.any("CAP_NET_BIND_SERVICE"):
	case int(port) < c.unprivilegedPorts():
		c.refuse("%s: src_port %d is below %s (%d), which needs CAP_NET_BIND_SERVICE", who, port, portStart, c.unprivilegedPorts())
	}
}

// specPortStart is what the spec sets, or -1.
func (c *checker) specPortStart() int {
	if c.spec.Linux != nil {
		if n, err := strconv.Atoi(strings.TrimSpace(c.spec.Linux.Sysctl[portStart])); err == nil {
			return n
		}
	}
	return -1
}

// unprivilegedPorts returns the first port that needs no capability in the network
// namespace that the container is going to be in.
func (c *checker) unprivilegedPorts() int {
	if c.portStart >= 0 {
		return c.portStart
	}
	c.portStart = defaultPortStart
	if n := c.specPortStart(); n >= 0 {
		c.portStart = n
		return n
	}
	ns := c.namespace(specs.NetworkNamespace)
	if ns != nil && ns.Path == "" {
		return c.portStart // of a namespace that is to be made
	}
	read := func() error {
		n, err := readNumber("/proc/sys/net/ipv4/ip_unprivileged_port_start")
		if err == nil && n <= 1<<16 {
			c.portStart = int(n)
		}
		return err
	}
	// A namespace that is not there, the runtime will not find either.
	if ns == nil {
		_ = read()
	} else {
		_ = process.InNamespace(ns.Path, unix.CLONE_NEWNET, read)
	}
	return c.portStart
}

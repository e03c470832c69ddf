package stack

import (
	"encoding/binary"
	"strings"

	"golang.org/x/sys/unix"
)

// nftTables returns the names of the tables of nftables in the network
// namespace that we are in. CRIU, and iptables too, make theirs there. It asks
// the kernel, as the host may not have nft.
func nftTables() []string {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	// A netlink header, then struct nfgenmsg: any family, version 0.
	req := make([]byte, unix.SizeofNlMsghdr+4)
	binary.NativeEndian.PutUint32(req[0:], uint32(len(req)))
	binary.NativeEndian.PutUint16(req[4:], unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETTABLE)
	binary.NativeEndian.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	if err := unix.Sendto(fd, req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil
	}
	var names []string
	buf := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return names
		}
		for msgs := buf[:n]; len(msgs) >= unix.SizeofNlMsghdr; {
			size := int(binary.NativeEndian.Uint32(msgs))
			kind := binary.NativeEndian.Uint16(msgs[4:])
			if kind == unix.NLMSG_DONE || kind == unix.NLMSG_ERROR || size < unix.SizeofNlMsghdr || size > len(msgs) {
				return names
			}
			if size >= len(req) {
				names = append(names, nftName(msgs[len(req):size])...)
			}
			msgs = msgs[min((size+3)&^3, len(msgs)):]
		}
	}
}

// nftName returns the table's name out of the attributes of one table.
func nftName(attrs []byte) []string {
	for len(attrs) >= unix.SizeofNlAttr {
		size := int(binary.NativeEndian.Uint16(attrs))
		kind := binary.NativeEndian.Uint16(attrs[2:])
		if size < unix.SizeofNlAttr || size > len(attrs) {
			return nil
		}
		if kind == unix.NFTA_TABLE_NAME {
			return []string{strings.TrimRight(string(attrs[unix.SizeofNlAttr:size]), "\x00")}
		}
		attrs = attrs[min((size+3)&^3, len(attrs)):]
	}
	return nil
}

package flow

import (
	"net"

	"golang.org/x/sys/unix"
)

// closed says whether c is in the state CLOSED of RFC 9293, as after a RST.
func closed(c *net.TCPConn) (is bool) {
	rc, err := c.SyscallConn()
	if err != nil {
		return false
	}
	const tcpClose = 7 // TCP_CLOSE of linux/include/net/tcp_states.h
	_ = rc.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		is = err == nil && info.State == tcpClose
	})
	return is
}

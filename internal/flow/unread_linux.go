package flow

import (
	"net"

	"golang.org/x/sys/unix"
)

// unread is how many bytes have come that can be read at once, if that is asked.
func unread(c *net.TCPConn, ask bool) (n int) {
	if !ask {
		return 0
	}
	rc, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	if rc.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }) != nil || err != nil {
		return 0
	}
	return n
}

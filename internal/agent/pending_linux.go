package agent

import (
	"net"

	"golang.org/x/sys/unix"
)

// pending says whether something has come that nobody has read, be it the end.
func pending(c *net.TCPConn) (is bool) {
	rc, err := c.SyscallConn()
	if err != nil {
		return true
	}
	err = rc.Control(func(fd uintptr) {
		_, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		is = err != unix.EAGAIN
	})
	return is || err != nil
}

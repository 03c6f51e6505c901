package localapi

import (
	"net"
	"syscall"
)

// peerPID is the process that listens at the other end of c (unix(7), SO_PEERCRED), or 0.
func peerPID(c *net.UnixConn) (pid int32) {
	rc, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	_ = rc.Control(func(fd uintptr) {
		if cred, err := syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); err == nil {
			pid = cred.Pid
		}
	})
	return pid
}

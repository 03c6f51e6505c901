//go:build !unix

package flow

import (
	"net"
	"syscall"
)

func readWhenReady(c *net.TCPConn, _ syscall.RawConn) (*[bufferSize]byte, int, error) {
	buf := buffers.Get().(*[bufferSize]byte)
	n, err := c.Read(buf[:])
	return buf, n, err
}

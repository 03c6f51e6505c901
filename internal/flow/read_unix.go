//go:build unix

package flow

import (
	"io"
	"net"
	"os"
	"syscall"
)

// readWhenReady waits until c can be read and only then takes a buffer from the pool, which the caller returns.
func readWhenReady(_ *net.TCPConn, rc syscall.RawConn) (buf *[bufferSize]byte, n int, err error) {
	rerr := rc.Read(func(fd uintptr) bool {
		if buf == nil {
			buf = buffers.Get().(*[bufferSize]byte)
		}
		for {
			n, err = syscall.Read(int(fd), buf[:])
			if err != syscall.EINTR { //nolint:errorlint // a system call's own error
				break
			}
		}
		if err == syscall.EAGAIN { //nolint:errorlint // a system call's own error
			buffers.Put(buf)
			buf, n, err = nil, 0, nil
			return false
		}
		return true
	})
	switch {
	case rerr != nil:
		return buf, 0, rerr
	case err != nil:
		return buf, 0, os.NewSyscallError("read", err)
	case n == 0:
		return buf, 0, io.EOF
	}
	return buf, n, nil
}

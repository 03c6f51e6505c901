//go:build unix

package flow

import (
	"io"
	"net"
	"os"
	"syscall"
)

// readiness reads from a connection with a buffer that it takes from the pool only when there is something to read.
type readiness struct {
	rc  syscall.RawConn
	try func(fd uintptr) bool
	buf *[bufferSize]byte
	n   int
	err error
}

func newReadiness(c *net.TCPConn) (*readiness, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	r := &readiness{rc: rc}
	r.try = r.tryRead
	return r, nil
}

func (r *readiness) tryRead(fd uintptr) bool {
	r.buf = buffers.Get().(*[bufferSize]byte)
	for {
		r.n, r.err = syscall.Read(int(fd), r.buf[:])
		switch r.err { //nolint:errorlint // a system call's own error
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
			buffers.Put(r.buf)
			r.buf, r.n, r.err = nil, 0, nil
			return false
		}
		return true
	}
}

// read returns a buffer, which the caller puts back, and how many bytes of it were read. At the end of the stream err is io.EOF.
func (r *readiness) read() (*[bufferSize]byte, int, error) {
	r.buf = nil
	err := r.rc.Read(r.try)
	switch {
	case err != nil:
		return r.buf, 0, err
	case r.err != nil:
		return r.buf, 0, os.NewSyscallError("read", r.err)
	case r.n == 0:
		return r.buf, 0, io.EOF
	}
	return r.buf, r.n, nil
}

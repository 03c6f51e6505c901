//go:build unix

package flow

import (
	"io"
	"os"
	"syscall"
)

// readiness reads from a connection with a buffer that it takes from the pool only when there is something to read.
type readiness struct {
	rc   syscall.RawConn
	size int // of what is read at once
	try  func(fd uintptr) bool
	buf  *[bufferSize]byte
	n    int
	err  error
}

func newReadiness(c syscall.Conn, size int) (*readiness, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	r := &readiness{rc: rc, size: size}
	r.try = r.tryRead
	return r, nil
}

func (r *readiness) tryRead(fd uintptr) bool {
	r.buf = buffers.Get().(*[bufferSize]byte)
	for {
		r.n, r.err = syscall.Read(int(fd), r.buf[:r.size])
		switch r.err {
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

// nonblocking is what a TCP stream needs for writes that never block. It is for one goroutine, the tunnel's reader.
type nonblocking struct {
	rc  syscall.RawConn
	try func(fd uintptr) bool
	p   []byte
	n   int
	err error
}

func (t *tcpStream) init() {
	t.rc, _ = t.c.SyscallConn() // fails only for a nil connection
	t.try = t.writeOnce
}

// TryWrite writes what fits into the socket's buffer. It must not run beside Write: that one may hold the socket until it has room.
func (t *tcpStream) TryWrite(p []byte) (int, error) {
	t.p = p
	err := t.rc.Write(t.try)
	t.p = nil
	if err != nil {
		return 0, err
	}
	if t.err != nil {
		return 0, os.NewSyscallError("write", t.err)
	}
	return t.n, nil
}

func (t *tcpStream) writeOnce(fd uintptr) bool {
	t.n, t.err = syscall.Write(int(fd), t.p)
	if t.err == syscall.EAGAIN || t.err == syscall.EINTR {
		t.n, t.err = 0, nil
	}
	return true
}

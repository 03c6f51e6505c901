//go:build unix

package flow

import (
	"io"
	"os"
	"syscall"

	"github.com/doppel-dev/doppel/internal/rawio"
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
	if r.n, r.err = rawio.Read(fd, r.buf[:r.size]); r.err != syscall.EAGAIN {
		return true
	}
	buffers.Put(r.buf)
	r.buf, r.n, r.err = nil, 0, nil
	return false
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

// writes are a TCP stream's, one at a time: those that wait, and those of the tunnel's reader that never do.
type writes struct {
	rc         syscall.RawConn
	whole, try func(fd uintptr) bool
	p          []byte
	n          int
	err        error
}

func (t *tcpStream) init() {
	t.rc, _ = t.c.SyscallConn() // fails only for a nil connection
	t.whole, t.try = t.writeWhole, t.writeOnce
}

func (t *tcpStream) Write(p []byte) (int, error) {
	t.p, t.n, t.err = p, 0, nil
	err := t.rc.Write(t.whole)
	t.p = nil
	if err == nil {
		err = os.NewSyscallError("write", t.err)
	}
	return t.n, err
}

func (t *tcpStream) writeWhole(fd uintptr) bool {
	for {
		n, err := rawio.Write(fd, t.p[t.n:])
		t.n += n
		switch {
		case err == syscall.EAGAIN:
			return false
		case err != nil || t.n == len(t.p):
			t.err = err
			return true
		}
	}
}

// TryWrite writes what fits into the socket's buffer. It must not run beside Write: that one may hold the socket until it has room.
func (t *tcpStream) TryWrite(p []byte) (int, error) {
	t.p, t.n, t.err = p, 0, nil
	err := t.rc.Write(t.try)
	t.p = nil
	if err == nil {
		err = os.NewSyscallError("write", t.err)
	}
	return t.n, err
}

func (t *tcpStream) writeOnce(fd uintptr) bool {
	if t.n, t.err = rawio.Write(fd, t.p); t.err == syscall.EAGAIN {
		t.err = nil
	}
	return true
}

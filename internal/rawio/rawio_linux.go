package rawio

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"
)

// ordered is what the race detector knows by that a read comes after the write of what it has read, as package syscall lets it know.
var ordered atomic.Uint32

// Read is read(2). fd must not block.
func Read(fd uintptr, p []byte) (int, error) {
	n, err := call(syscall.SYS_READ, fd, p)
	if race {
		ordered.Load()
	}
	return n, err
}

// Write is write(2). fd must not block.
func Write(fd uintptr, p []byte) (int, error) {
	if race {
		ordered.Add(1)
	}
	return call(syscall.SYS_WRITE, fd, p)
}

func call(trap, fd uintptr, p []byte) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
		switch errno {
		case 0:
			return int(n), nil
		case syscall.EINTR:
		default:
			return 0, errno
		}
	}
}

// conn is a TCP connection that reads and writes by this package.
type conn struct {
	*net.TCPConn
	rd, wr op
}

// New returns c as a connection that reads and writes in this way, if it is one of TCP.
func New(c net.Conn) net.Conn {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return c
	}
	rc, err := t.SyscallConn()
	if err != nil {
		return c
	}
	out := &conn{TCPConn: t}
	out.rd.init("read", rc.Read, Read)
	out.wr.init("write", rc.Write, Write)
	return out
}

// op is one direction of a connection.
type op struct {
	name string
	wait func(func(fd uintptr) bool) error
	do   func(fd uintptr, p []byte) (int, error)
	try  func(fd uintptr) bool

	mu sync.Mutex
	// guarded by mu:
	p   []byte
	n   int
	err error
}

func (o *op) init(name string, wait func(func(fd uintptr) bool) error, do func(fd uintptr, p []byte) (int, error)) {
	o.name, o.wait, o.do, o.try = name, wait, do, o.once
}

func (o *op) once(fd uintptr) bool {
	o.n, o.err = o.do(fd, o.p)
	return !errors.Is(o.err, syscall.EAGAIN)
}

// run does it once, when it can be done.
func (o *op) run(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.p = p
	err := o.wait(o.try)
	o.p = nil
	switch {
	case err != nil:
		return 0, err
	case o.err != nil:
		return 0, os.NewSyscallError(o.name, o.err)
	}
	return o.n, nil
}

func (c *conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	n, err := c.rd.run(p)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

func (c *conn) Write(p []byte) (int, error) {
	for sent := 0; ; {
		n, err := c.wr.run(p[sent:])
		if sent += n; err != nil || sent == len(p) {
			return sent, err
		}
	}
}

// ReadFrom is io.Copy: the connection's own would go past Write.
func (c *conn) ReadFrom(r io.Reader) (int64, error) { return io.Copy(struct{ io.Writer }{c}, r) }

// WriteTo is io.Copy, as ReadFrom.
func (c *conn) WriteTo(w io.Writer) (int64, error) { return io.Copy(w, struct{ io.Reader }{c}) }

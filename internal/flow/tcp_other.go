//go:build !unix

package flow

import "net"

// readiness reads with a buffer from the pool; elsewhere it is taken only when there is something to read.
type readiness struct {
	c net.Conn
}

func newReadiness(c net.Conn) (*readiness, error) { return &readiness{c}, nil }

func (r *readiness) read() (*[bufferSize]byte, int, error) {
	buf := buffers.Get().(*[bufferSize]byte)
	n, err := r.c.Read(buf[:])
	return buf, n, err
}

type nonblocking struct{}

func (*tcpStream) init() {}

// TryWrite takes nothing: everything goes through Write.
func (*tcpStream) TryWrite([]byte) (int, error) { return 0, nil }

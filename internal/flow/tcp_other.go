//go:build !unix

package flow

import "net"

// readiness reads with a buffer from the pool; elsewhere it is taken only when there is something to read.
type readiness struct {
	c    net.Conn
	size int // of what is read at once
}

func newReadiness(c net.Conn, size int) (*readiness, error) { return &readiness{c, size}, nil }

func (r *readiness) read() (*[bufferSize]byte, int, error) {
	buf := buffers.Get().(*[bufferSize]byte)
	n, err := r.c.Read(buf[:r.size])
	return buf, n, err
}

type writes struct{}

func (*tcpStream) init() {}

func (t *tcpStream) Write(p []byte) (int, error) { return t.c.Write(p) }

// TryWrite takes nothing: everything goes through Write.
func (*tcpStream) TryWrite([]byte) (int, error) { return 0, nil }

package flow

import (
	"errors"
	"io"
	"net"
)

// FromTCP makes a flow's end of a TCP connection. Reset is a RST on the wire (SO_LINGER 0, socket(7)).
func FromTCP(c *net.TCPConn) Stream {
	t := &tcpStream{c: c}
	t.init()
	return t
}

// tcpStream does not embed the connection: net.TCPConn's own ReadFrom and WriteTo would take the place of the faster ways here.
type tcpStream struct {
	c *net.TCPConn
	writes
}

func (t *tcpStream) Read(p []byte) (int, error) { return t.c.Read(p) }
func (t *tcpStream) CloseWrite() error          { return t.c.CloseWrite() }
func (t *tcpStream) Close() error               { return t.c.Close() }

// Over says that the peer has reset the connection or is gone.
func (t *tcpStream) Over() bool { return closed(t.c) }

// Reset sends RST and closes.
func (t *tcpStream) Reset() {
	_ = t.c.SetLinger(0)
	_ = t.c.Close()
}

// WriteTo copies to w until EOF. No buffer is held while the connection is idle: ten thousand idle flows cost none.
func (t *tcpStream) WriteTo(w io.Writer) (int64, error) {
	r, err := newReadiness(t.c, streamSize)
	if err != nil {
		return 0, err
	}
	var total int64
	for {
		buf, n, err := r.read()
		if n > 0 {
			m, werr := w.Write(buf[:n])
			total += int64(m)
			if werr != nil {
				err = werr
			}
		}
		if buf != nil {
			buffers.Put(buf)
		}
		if err == io.EOF { //nolint:errorlint // read returns io.EOF itself
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// splice lets the kernel copy up to limit bytes between two TCP connections (splice(2) on Linux); a negative limit is none.
func splice(dst, src Stream, limit int64) (n int64, ok bool, err error) {
	if t, ok := dst.(*tee); ok { // what is written is not looked at
		dst = t.Stream
	}
	d, ok1 := dst.(*tcpStream)
	s, ok2 := src.(*tcpStream)
	if !ok1 || !ok2 {
		return 0, false, nil
	}
	var from io.Reader = s.c
	if limit >= 0 {
		from = &io.LimitedReader{R: s.c, N: limit}
	}
	n, err = d.c.ReadFrom(from)
	return n, true, err
}

// FromUDP makes a flow's end of a connected UDP socket.
func FromUDP(c *net.UDPConn) Packets { return &udpPackets{c: c} }

type udpPackets struct {
	c *net.UDPConn
	r *readiness // NextPacket's
}

func (u *udpPackets) ReadPacket(p []byte) (int, error) { return u.c.Read(p) }

// NextPacket implements PacketSource, for one goroutine: an idle flow holds no buffer.
func (u *udpPackets) NextPacket(fn func(p []byte) error) error {
	if u.r == nil {
		r, err := newReadiness(u.c, bufferSize)
		if err != nil {
			return err
		}
		u.r = r
	}
	buf, n, err := u.r.read()
	if buf == nil {
		return err
	}
	defer buffers.Put(buf)
	if err != nil && !errors.Is(err, io.EOF) { // io.EOF: an empty datagram
		return err
	}
	return fn(buf[:n])
}

func (u *udpPackets) WritePacket(p []byte) error {
	_, err := u.c.Write(p)
	return err
}

func (u *udpPackets) Close() error { return u.c.Close() }

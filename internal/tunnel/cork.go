package tunnel

import (
	"crypto/tls"
	"io"
	"net"
	"sync"
	"time"
)

// readAhead is how much is taken from a socket at once while much is waiting: crypto/tls asks for a record's header and then for its rest, two system calls for
// 16 KiB. A connection on which little comes has readLittle instead: a manager has thousands of them. It has the larger buffer from the first read on that
// fills the smaller, and for as long as one of fewReads in a row would.
const (
	readAhead  = 64 << 10
	readLittle = 2 << 10
	fewReads   = 64
)

// ahead reads ahead. It is for one goroutine.
type ahead struct {
	from io.Reader
	buf  []byte // its length is the size
	r, w int    // what of it was not taken yet
	few  int    // reads in a row that would have fitted into readLittle
}

func newAhead(from io.Reader) *ahead { return &ahead{from: from, buf: make([]byte, readLittle)} }

func (a *ahead) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if a.r == a.w {
		if len(p) >= len(a.buf) {
			return a.from.Read(p)
		}
		n, err := a.from.Read(a.buf)
		a.r, a.w = 0, n
		if n == 0 {
			return 0, err // an error that comes with bytes comes again (io.Reader)
		}
		a.fit(n)
	}
	n := copy(p, a.buf[a.r:a.w])
	a.r += n
	return n, nil
}

// fit changes the size for the next read, which is not before the n bytes of this one were taken.
func (a *ahead) fit(n int) {
	if a.few++; n >= readLittle {
		a.few = 0
	}
	size := len(a.buf)
	switch {
	case n == len(a.buf):
		size = readAhead
	case a.few >= fewReads:
		size = readLittle
	}
	if size != len(a.buf) {
		next := make([]byte, size) // what has come fits into both
		copy(next, a.buf[:n])
		a.buf = next
	}
}

// closeTimeout is how long TLS may try to send its last record.
const closeTimeout = 100 * time.Millisecond

// corkSize holds what one write of the session becomes under TLS: a full frame, small frames before it, and 22 bytes for each record.
const corkSize = 96 << 10

var corkPool = sync.Pool{New: func() any { return new([corkSize]byte) }}

// cork is the connection under TLS. crypto/tls writes each record (16 KiB) on its own; between hold and release the records
// are collected and leave in one write: a quarter of the system calls and of the peer's wake-ups. It reads ahead for the same reason.
type cork struct {
	net.Conn
	r *ahead // nil: what is under it reads ahead

	mu sync.Mutex // crypto/tls also writes by itself: alerts, key updates
	// guarded by mu:
	buf *[corkSize]byte // nil: not held
	n   int
	err error // a half-written record: nothing may follow
}

// newCork returns a cork. A connection that came out of an Upgrade has a Socket below it, which reads ahead.
func newCork(c net.Conn) *cork {
	k := &cork{Conn: c}
	if _, ok := c.(*upgradedConn); !ok {
		k.r = newAhead(c)
	}
	return k
}

func (c *cork) Read(p []byte) (int, error) {
	if c.r == nil {
		return c.Conn.Read(p)
	}
	return c.r.Read(p)
}

func (c *cork) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.buf == nil {
		return c.Conn.Write(p)
	}
	if c.n+len(p) > corkSize {
		if err := c.flushLocked(); err != nil {
			return 0, err
		}
		if len(p) > corkSize {
			return c.Conn.Write(p)
		}
	}
	c.n += copy(c.buf[c.n:], p)
	return len(p), nil
}

func (c *cork) hold() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf = corkPool.Get().(*[corkSize]byte)
}

func (c *cork) release() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.flushLocked()
	corkPool.Put(c.buf)
	c.buf = nil
	return err
}

func (c *cork) flushLocked() error {
	if c.err == nil && c.n > 0 {
		_, c.err = c.Conn.Write(c.buf[:c.n])
	}
	c.n = 0
	return c.err
}

// Socket is the connection under a TLS that is not the tunnel's own, the API server's. What is written at once to a connection over it
// leaves at once if Over is around that one.
type Socket struct{ cork }

// NewSocket takes c over.
func NewSocket(c net.Conn) *Socket {
	return &Socket{cork{Conn: c, r: newAhead(c)}}
}

// NetConn is the connection itself.
func (s *Socket) NetConn() net.Conn { return s.Conn }

// Over returns c, an upgraded connection over s, whose writes reach s as one each.
func (s *Socket) Over(c net.Conn) net.Conn {
	if u, ok := c.(*upgradedConn); ok {
		u.under = &s.cork
	}
	return c
}

// conn is a TLS connection over a cork. One goroutine writes at a time: the session sees to that.
type conn struct {
	*tls.Conn
	cork *cork
}

func (c *conn) Write(p []byte) (int, error) {
	c.cork.hold()
	n, err := c.Conn.Write(p)
	if ferr := c.cork.release(); err == nil {
		err = ferr
	}
	return n, err
}

// Close does not wait as tls.Conn's own does, which tries for 5 s to send its last record.
func (c *conn) Close() error {
	t := time.AfterFunc(closeTimeout, func() { _ = c.cork.Conn.Close() })
	defer t.Stop()
	return c.Conn.Close()
}

package tunnel

import (
	"crypto/tls"
	"net"
	"sync"
	"time"
)

// corkSize holds what one write of the session becomes under TLS: a full frame, small frames before it, and 22 bytes for each record.
const corkSize = 96 << 10

var corkPool = sync.Pool{New: func() any { return new([corkSize]byte) }}

// cork is the connection under TLS. crypto/tls writes each record (16 KiB) on its own; between hold and release the records
// are collected and leave in one write: a quarter of the system calls and of the peer's wake-ups.
type cork struct {
	net.Conn

	mu sync.Mutex // crypto/tls also writes by itself: alerts, key updates
	// guarded by mu:
	buf *[corkSize]byte // nil: not held
	n   int
	err error // a half-written record: nothing may follow
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
	t := time.AfterFunc(100*time.Millisecond, func() { _ = c.cork.Conn.Close() })
	defer t.Stop()
	return c.Conn.Close()
}

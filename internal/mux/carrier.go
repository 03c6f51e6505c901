package mux

import (
	"fmt"
	"net"
	"sync"

	"github.com/doppel-dev/doppel/internal/wire"
)

// carrier is the byte stream under the frames. With a limit it outlives its connections: it keeps what the peer has not
// acknowledged, and goes on over another connection exactly where each end stopped receiving.
//
//	carrying ──connection fails, detach──► suspended ──attach──► carrying
//	    └───────────── close ──────────────────┴──► ended
//
// One goroutine reads, one at a time writes (the owner of writer.busy).
type carrier struct {
	limit  int         // of what is kept, in bytes; 0: the first failure is the end
	lost   func(error) // called, unlocked, when a connection was lost and another may come
	ackDue func()      // called, unlocked, when the peer should be told what was received
	heard  func(n int) // called, unlocked, when so many bytes were received

	mu   sync.Mutex
	cond *sync.Cond
	// guarded by mu:
	conn     net.Conn // nil: suspended, or ended
	err      error    // ended
	final    bool     // no other connection will be taken
	epoch    uint64   // counts what attach and detach did
	reading  bool     // somebody is in conn.Read
	losing   bool     // lost is being called
	sent     uint64   // bytes that were to be sent
	received uint64   // bytes taken from all connections
	told     uint64   // of these, what the peer knows
	kept     chunks   // sent, not acknowledged
	base     uint64   // the number of kept's first byte
	next     uint64   // the number of the next byte for the connection
}

func newCarrier(conn net.Conn, limit int) *carrier {
	c := &carrier{conn: conn, limit: limit}
	c.cond = sync.NewCond(&c.mu)
	return c
}

// Read waits for a connection, if need be.
func (c *carrier) Read(p []byte) (int, error) {
	for {
		c.mu.Lock()
		for c.conn == nil && c.err == nil {
			c.cond.Wait()
		}
		if c.err != nil {
			c.mu.Unlock()
			return 0, c.err
		}
		conn := c.conn
		c.reading = true
		c.mu.Unlock()
		n, err := conn.Read(p)
		c.mu.Lock()
		c.reading = false
		c.received += uint64(n)
		due := c.limit > 0 && c.received-c.told >= uint64(c.limit/8)
		if c.conn != conn {
			c.cond.Broadcast() // whoever took it away waits for us
		}
		c.mu.Unlock()
		switch {
		case n > 0:
			c.heard(n)
			if due {
				c.ackDue()
			}
			return n, nil // an error comes again
		case err != nil && !c.fail(conn, err):
			return 0, err
		}
	}
}

// write sends p, or keeps it for the next connection.
func (c *carrier) write(p []byte) error {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return c.err
	}
	conn := c.conn
	c.sent += uint64(len(p))
	if c.limit > 0 {
		at := c.endLocked()
		c.keepLocked(p)
		if conn == nil {
			c.mu.Unlock()
			return nil
		}
		if c.next != at {
			c.mu.Unlock()
			return c.resend()
		}
		c.next += uint64(len(p))
	}
	c.mu.Unlock()
	if _, err := conn.Write(p); err != nil && !c.fail(conn, err) {
		return err
	}
	return nil
}

// resend sends what is kept and was not yet sent over this connection.
func (c *carrier) resend() error {
	buf := getChunk(wire.MaxFrame)
	defer buf.recycle()
	for {
		c.mu.Lock()
		conn, n := c.conn, 0
		if conn != nil {
			n = c.copyLocked(buf.b, c.next)
			c.next += uint64(n)
		}
		c.mu.Unlock()
		if n == 0 {
			return nil
		}
		if _, err := conn.Write(buf.b[:n]); err != nil && !c.fail(conn, err) {
			return err
		}
	}
}

// traffic counts the bytes of both directions.
func (c *carrier) traffic() (sent, received uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.sent, c.received
}

func (c *carrier) endLocked() uint64 { return c.base + uint64(c.kept.bytes) }

func (c *carrier) keepLocked(p []byte) {
	for len(p) > 0 {
		t := c.kept.tail
		if t == nil || t.room() == 0 {
			t = getChunk(min(max(len(p), c.kept.bytes), 1<<maxChunkLog))
			c.kept.push(t)
		}
		n := copy(t.b[t.w:], p)
		t.w += n
		c.kept.bytes += n
		p = p[n:]
	}
}

// copyLocked copies what is kept from the byte of that number on.
func (c *carrier) copyLocked(p []byte, from uint64) (n int) {
	skip := int(from - c.base)
	for k := c.kept.head; k != nil && n < len(p); k = k.next {
		b := k.b[k.r:k.w]
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		n += copy(p[n:], b[skip:])
		skip = 0
	}
	return n
}

// forgetLocked drops what is kept before the byte of that number.
func (c *carrier) forgetLocked(to uint64) {
	n := int(to - c.base)
	c.base = to
	for n > 0 {
		k := c.kept.head
		if size := k.w - k.r; n < size {
			k.r += n
			c.kept.bytes -= n
			return
		} else {
			n -= size
		}
		c.kept.pop().recycle()
	}
}

// acked takes the peer's word for what it has received. It reports whether there is room again.
func (c *carrier) acked(n uint64) (room bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil { // ended meanwhile: nothing is kept
		return false, nil
	}
	if c.limit == 0 || n > c.next {
		return false, fmt.Errorf("%w: ACK of %d bytes", wire.ErrProtocol, n)
	}
	full := c.kept.bytes >= c.limit
	if n > c.base { // an older one was on its way when the connection was lost
		c.forgetLocked(n)
	}
	return full && c.kept.bytes < c.limit, nil
}

// appendAck appends an ACK frame.
func (c *carrier) appendAck(b []byte) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.told = c.received
	return wire.AppendAck(b, c.received)
}

// look says whether something has to be sent again, and whether no more may be sent before the peer acknowledges.
func (c *carrier) look() (behind, full bool) {
	if c.limit == 0 {
		return false, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.conn != nil && c.next < c.endLocked(), c.kept.bytes >= c.limit
}

// untold says whether anything was received that the peer does not know of.
func (c *carrier) untold() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.limit > 0 && c.conn != nil && c.received > c.told
}

// fail gives up a connection, and reports whether another may come.
func (c *carrier) fail(conn net.Conn, err error) bool {
	c.mu.Lock()
	if c.limit == 0 || c.final {
		c.mu.Unlock()
		return false
	}
	mine := c.conn == conn && conn != nil
	if mine {
		c.conn, c.losing = nil, true
		c.epoch++
	}
	c.mu.Unlock()
	if mine {
		_ = conn.Close()
		c.lost(err)
		c.mu.Lock()
		c.losing = false
		c.cond.Broadcast()
		c.mu.Unlock()
	}
	return true
}

// drop gives up the connection of the moment.
func (c *carrier) drop(err error) {
	c.mu.Lock()
	conn := c.conn
	c.mu.Unlock()
	c.fail(conn, err)
}

// detach gives up the connection and waits until nobody reads from it, and its loss has been told: told later it would pass for the next one's.
func (c *carrier) detach(err error) (received, epoch uint64, ok bool) {
	c.drop(err)
	c.mu.Lock()
	defer c.mu.Unlock()
	for (c.reading || c.losing) && !c.final {
		c.cond.Wait()
	}
	if c.limit == 0 || c.final || c.conn != nil {
		return 0, 0, false
	}
	return c.received, c.epoch, true
}

// keeps says whether what the peer lacks, having received so many bytes, is still here.
func (c *carrier) keeps(received uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return received >= c.base && received <= c.endLocked()
}

// attach goes on over conn with a peer that has received so many bytes, if nothing has happened since detach.
func (c *carrier) attach(conn net.Conn, epoch, peer uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.final || c.epoch != epoch || peer < c.base || peer > c.endLocked() {
		return false
	}
	c.forgetLocked(peer)
	c.epoch++
	c.conn, c.next, c.told = conn, peer, c.received
	c.cond.Broadcast()
	return true
}

// finish says that no other connection will be taken, and reports whether there is one.
func (c *carrier) finish() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.final = true
	c.cond.Broadcast()
	return c.conn != nil
}

// close ends the stream.
func (c *carrier) close(err error) {
	c.mu.Lock()
	conn := c.conn
	c.conn, c.final = nil, true
	if c.err == nil {
		c.err = err
	}
	c.cond.Broadcast()
	c.kept.drop()
	c.mu.Unlock()
	if conn != nil {
		_ = conn.Close()
	}
}

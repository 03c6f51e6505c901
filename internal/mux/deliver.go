package mux

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/doppel-dev/doppel/internal/wire"
)

// refuse answers a peer that sends to a closed stream.
func (st *Stream) refuse() {
	_ = st.sendRst(false, wire.CodeReset) // behind what was written before Close
	st.end(net.ErrClosed, true)
}

// readBytesFrom reads n bytes straight into a buffer of the stream. On a slow connection it hands on what has come.
func (st *Stream) readBytesFrom(br *bufio.Reader, n int) error {
	c := getChunk(n)
	for start := time.Now(); ; {
		m, err := br.Read(c.b[c.w : c.w+n])
		c.w += m
		n -= m
		if n == 0 {
			st.deliverChunk(c, wire.HeaderLen)
			return nil
		}
		if err != nil {
			c.recycle()
			return err
		}
		now := time.Now()
		if now.Sub(start) > slowRead {
			c = st.deliverPart(c, n)
		}
		start = now
	}
}

func (st *Stream) readMessageFrom(br *bufio.Reader, n int) error {
	c := getChunk(n + 2)
	c.b[0], c.b[1] = byte(n>>8), byte(n)
	if _, err := io.ReadFull(br, c.b[2:2+n]); err != nil {
		c.recycle()
		return err
	}
	c.w, c.messages = 2+n, true
	st.deliverChunk(c, 0)
	return nil
}

// arriving takes the credit for a DATA frame. keep is false if nobody wants the data any more. A stream has messages or not: the two by turns would need a
// chunk each, however short they are.
func (st *Stream) arriving(cost int, message bool) (keep bool, err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	switch {
	case st.closed:
		return false, nil
	case st.pending && st.mine:
		return false, fmt.Errorf("%w: DATA before the answer on stream %d", wire.ErrProtocol, st.id)
	case st.rx.fin:
		return false, fmt.Errorf("%w: DATA after FIN on stream %d", wire.ErrProtocol, st.id)
	case st.rx.begun && st.rx.messages != message:
		return false, fmt.Errorf("%w: messages and bytes on stream %d", wire.ErrProtocol, st.id)
	case cost > st.rx.credit:
		return false, fmt.Errorf("%w: %d bytes on stream %d with %d bytes of credit", wire.ErrProtocol, cost, st.id, st.rx.credit)
	}
	st.rx.begun, st.rx.messages = true, message
	st.rx.credit -= cost
	st.rx.touched = true
	st.rx.stalled = false
	return true, nil
}

// deliver adds a small frame's payload to the buffer, or gives it straight to the destination.
func (st *Stream) deliver(p []byte, message bool) error {
	st.mu.Lock()
	st.talkLocked()
	g := 0
	if !message && !st.freed {
		st.rx.owed += wire.HeaderLen // headers are not stored
		p, g = st.deliverDirectLocked(p)
	}
	if !st.freed && (message || len(p) > 0) {
		if message {
			st.rx.buf.addMessage(p)
		} else {
			st.rx.buf.add(p)
		}
		st.arrivedLocked()
	}
	st.mu.Unlock()
	if g == 0 {
		return nil
	}
	return st.s.reply(func(b []byte) []byte { return wire.AppendUint32(b, wire.TypeWindow, st.id, uint32(g)) })
}

// deliverDirectLocked gives the destination what it takes of p at once, if the receiver is WriteTo and has nothing in its
// hands, and returns the rest, and what credit to grant. It saves a small request the wake-up of one more goroutine. It
// unlocks meanwhile: only the reader goroutine adds to the buffer, and the receiver leaves an empty one alone.
func (st *Stream) deliverDirectLocked(p []byte) (rest []byte, grant int) {
	if st.rx.direct == nil || !st.rx.waiting || st.rx.buf.head != nil {
		return p, 0
	}
	d := st.rx.direct
	st.mu.Unlock()
	n, err := d.TryWrite(p)
	st.mu.Lock()
	if err != nil {
		st.rx.directErr = err
		st.arrivedLocked()
		return nil, 0
	}
	st.rx.owed += n
	st.rx.pace.bytes += n
	return p[n:], st.grantLocked()
}

// deliverChunk adds a chunk to the buffer; overhead is what is not stored of the frame.
func (st *Stream) deliverChunk(c *chunk, overhead int) {
	st.mu.Lock()
	if st.freed {
		st.mu.Unlock()
		c.recycle()
		return
	}
	st.rx.largeAt = moment()
	st.rx.owed += overhead
	st.rx.buf.push(c)
	st.arrivedLocked()
	st.mu.Unlock()
}

// deliverPart hands on what has come of a frame, and returns a chunk for the n bytes that are still to come. What fills little of its chunk is copied: else
// a peer that sends byte by byte would have us hold a chunk for each.
func (st *Stream) deliverPart(c *chunk, n int) *chunk {
	if c.w >= len(c.b)/2 {
		st.deliverChunk(c, 0)
		return getChunk(n)
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.freed {
		st.rx.largeAt = moment()
		st.rx.buf.add(c.b[:c.w])
		st.arrivedLocked()
	}
	c.w = 0
	return c
}

// onFin notes the end of the peer's direction.
func (st *Stream) onFin() error {
	st.mu.Lock()
	if st.rx.fin || st.pending {
		st.mu.Unlock()
		return fmt.Errorf("%w: FIN out of order on stream %d", wire.ErrProtocol, st.id)
	}
	st.rx.fin = true
	both := st.tx.fin && !st.pending
	st.arrivedLocked()
	st.mu.Unlock()
	if both {
		st.s.remove(st)
	}
	return nil
}

// onWant notes that the peer lacks credit.
func (st *Stream) onWant(n uint32) error {
	if n > wire.MaxFrame {
		return fmt.Errorf("%w: WANT of %d bytes on stream %d", wire.ErrProtocol, n, st.id)
	}
	st.mu.Lock()
	if st.closed { // nobody will ever grant more
		st.mu.Unlock()
		st.refuse()
		return nil
	}
	st.rx.wanted, st.rx.stalled, st.rx.pace.due = int(n), true, true
	return st.replyGrantAndUnlock()
}

// replyGrantAndUnlock sends what credit there is to send now.
func (st *Stream) replyGrantAndUnlock() error {
	g := st.grantLocked()
	st.mu.Unlock()
	if g == 0 {
		return nil
	}
	return st.s.reply(func(b []byte) []byte { return wire.AppendUint32(b, wire.TypeWindow, st.id, uint32(g)) })
}

// onReturn takes back credit that the peer does not use.
func (st *Stream) onReturn(n uint32) error {
	st.mu.Lock()
	if !st.rx.asked || int64(n) > int64(st.rx.credit) {
		st.mu.Unlock()
		return fmt.Errorf("%w: RETURN of %d bytes on stream %d", wire.ErrProtocol, n, st.id)
	}
	st.rx.asked = false
	st.rx.credit -= int(n)
	if !st.freed {
		back := min(int(n), st.rx.window-minWindow)
		st.rx.window -= back
		st.rx.owed += int(n) - back
		st.s.budget.release(back)
	}
	if st.rx.wanted == 0 {
		st.mu.Unlock()
		return nil
	}
	return st.replyGrantAndUnlock() // a WANT of before was about the credit that is back now
}

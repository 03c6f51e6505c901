package mux

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"time"

	"github.com/doppel-dev/doppel/internal/wire"
)

// errEmpty says that nothing is there now.
var errEmpty = errors.New("nothing has arrived")

// arrivedLocked tells whoever receives that there is something new: data, or an end.
func (st *Stream) arrivedLocked() {
	if wake := st.rx.wake; wake != nil {
		st.rx.wake, st.rx.waiting = nil, false
		wake()
	}
	st.readable.Broadcast()
}

// next waits for received data and makes it st.cur. readMu is held. io.EOF is the end of the peer's direction. With wake it does not wait: errEmpty
// says that wake will be called.
func (st *Stream) next(wake func()) error {
	st.mu.Lock()
	for {
		if st.closed || st.readDeadline.expired {
			err := net.ErrClosed
			if !st.closed {
				err = errTimeout
			}
			st.mu.Unlock()
			return err
		}
		if c := st.rx.buf.pop(); c != nil {
			st.cur = c
			st.rx.waiting = false
			st.mu.Unlock()
			return nil
		}
		if st.rx.directErr != nil {
			err := st.rx.directErr
			st.mu.Unlock()
			return err
		}
		if st.rx.fin { // also if a RST came later: the data is complete
			if st.gone {
				st.freeLocked()
			}
			st.mu.Unlock()
			return io.EOF
		}
		if st.err != nil {
			err := st.err
			st.mu.Unlock()
			return err
		}
		st.rx.waiting = true
		if wake != nil {
			st.rx.wake = wake
			st.mu.Unlock()
			return errEmpty
		}
		st.readable.Wait()
	}
}

// consumed gives the peer credit for n bytes that were taken from the buffer, in portions of a quarter of the window.
func (st *Stream) consumed(n int) {
	st.mu.Lock()
	st.rx.owed += n
	st.rx.pace.bytes += n
	g := st.grantLocked()
	st.mu.Unlock()
	st.sendGrant(g)
}

// grantLocked returns how much credit to send now, which the caller does.
func (st *Stream) grantLocked() int {
	if st.rx.fin || st.freed || st.err != nil {
		return 0
	}
	// The peer ran out of credit, and the reader has nearly run out of data before more came: it is the window that is too
	// small, not the reader that is slow. How much is stored when WANT comes does not tell: a whole window may arrive before
	// the reader runs. A message that is larger than the window needs a larger one in any case.
	waits := st.rx.stalled || st.rx.wanted > 0
	short := waits && st.rx.buf.bytes <= st.rx.window/4 || st.rx.wanted > st.rx.window
	if st.rx.owed < st.rx.window/4 && !short {
		return 0
	}
	// More than the path takes, or than the share by now: give up what was read.
	over := st.s.budget.excess(st.rx.window)
	if st.rx.shrinkTo > 0 {
		over = max(over, st.rx.window-st.rx.shrinkTo)
	}
	limit, talks := st.s.cfg.Window, st.s.talks()
	if talks {
		limit = min(limit, talkWindow)
		over = max(over, st.rx.window-limit)
	}
	if over = min(st.rx.owed, over); over > 0 && st.rx.wanted <= st.rx.window-over {
		st.giveUpLocked(over)
	}
	if short {
		st.rx.stalled = false // answered; while too little is free, wanted stays
		need := st.rx.wanted > st.rx.window
		want := st.rx.pace.fits(st.rx.window, st.s.path.trip())
		if st.rx.window < st.s.cfg.InitialWindow {
			want = 2 * st.rx.window
		}
		want = min(want, limit)
		switch {
		case need || want > st.rx.window:
			st.rx.shrinkTo = 0
			st.growLocked(min(max(want, st.rx.wanted), st.s.cfg.Window), need)
		case talks: // its window is that of the moment
		case 3*want < 2*st.rx.window && st.rx.pace.tooLarge > 1 && st.s.path.queues(): // the path is slower than it was, or shared
			st.rx.shrinkTo = max(want, st.s.cfg.InitialWindow)
		}
		if st.rx.window >= st.s.cfg.InitialWindow {
			st.s.measure()
		}
	}
	g := st.rx.owed
	st.rx.owed = 0
	st.rx.credit += g
	if st.rx.credit >= st.rx.wanted && !st.rx.asked { // what was asked back may be gone already
		st.rx.wanted = 0
	}
	return g
}

// pace measures how fast a stream is read.
type pace struct {
	due   bool      // a WANT came that was not judged yet
	since time.Time // when counting began
	bytes int       // that were read since then
	// tooLarge counts judgements in a row that the window is far too large. One may be of a pause of the sender.
	tooLarge int
}

// fits says, at most once for each WANT, which window the stream should have: twice what is under way in one round trip of the idle path at the rate at
// which it is read. A smaller one would not fill the path, since credit comes back in portions; more would only wait on the way, and every small request
// behind it. It counts over a whole window at least: between portions of credit, each with a WANT behind it, there is no round trip. While the round
// trip is not known (0), it is twice the window.
func (p *pace) fits(window int, rtt time.Duration) int {
	if !p.due || p.bytes < window && !p.since.IsZero() {
		return window
	}
	now := time.Now()
	first, took, bytes := p.since.IsZero(), now.Sub(p.since), p.bytes
	p.due, p.since, p.bytes = false, now, 0
	switch {
	case first:
		return window
	case rtt == 0:
		return 2 * window
	}
	want := int(min(float64(window), float64(bytes)*rtt.Seconds()/took.Seconds()) * 2)
	if p.tooLarge++; 3*want >= 2*window {
		p.tooLarge = 0
	}
	return want
}

// growLocked raises the window towards want as far as the budget allows.
func (st *Stream) growLocked(want int, need bool) {
	n := st.s.budget.grow(st.rx.window, want, need)
	st.rx.window += n
	st.rx.owed += n
}

// giveUpLocked takes n bytes that are owed off the window.
func (st *Stream) giveUpLocked(n int) {
	st.rx.owed -= n
	st.rx.window -= n
	st.s.budget.release(n)
}

func (st *Stream) sendGrant(g int) {
	if g > 0 {
		_ = st.s.w.control(true, func(b []byte) []byte { return wire.AppendUint32(b, wire.TypeWindow, st.id, uint32(g)) })
	}
}

// Read reads from the stream. After the peer's FIN it returns io.EOF; after its RST, once the buffer is empty, a *ResetError.
func (st *Stream) Read(p []byte) (int, error) {
	st.readMu.Lock()
	defer st.readMu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	if st.cur == nil {
		if err := st.next(nil); err != nil {
			return 0, err
		}
	}
	c := st.cur
	if c.messages { // a message read as bytes: without its length
		return st.readMessage(p)
	}
	n := copy(p, c.b[c.r:c.w])
	c.r += n
	if c.r == c.w {
		st.cur = nil
		c.recycle()
	}
	st.consumed(n)
	return n, nil
}

// ReadPacket reads one message. What does not fit into p is lost, as with a UDP socket.
func (st *Stream) ReadPacket(p []byte) (int, error) {
	st.readMu.Lock()
	defer st.readMu.Unlock()
	if st.cur == nil {
		if err := st.next(nil); err != nil {
			return 0, err
		}
	}
	if c := st.cur; !c.messages { // bytes read as a message
		n := copy(p, c.b[c.r:c.w])
		size := c.w - c.r
		st.cur = nil
		c.recycle()
		st.consumed(size)
		return n, nil
	}
	return st.readMessage(p)
}

// NextPacket waits for one message and calls fn with it, which must not keep it. Nothing is held while it waits.
func (st *Stream) NextPacket(fn func(p []byte) error) error {
	st.readMu.Lock()
	defer st.readMu.Unlock()
	if st.cur == nil {
		if err := st.next(nil); err != nil {
			return err
		}
	}
	c := st.cur
	if !c.messages { // bytes read as a message
		st.cur = nil
		err := fn(c.b[c.r:c.w])
		size := c.w - c.r
		c.recycle()
		st.consumed(size)
		return err
	}
	size := int(binary.BigEndian.Uint16(c.b[c.r:]))
	err := fn(c.b[c.r+2 : c.r+2+size])
	c.r += 2 + size
	if c.r == c.w {
		st.cur = nil
		c.recycle()
	}
	st.consumed(wire.HeaderLen + size)
	return err
}

func (st *Stream) readMessage(p []byte) (int, error) {
	c := st.cur
	size := int(binary.BigEndian.Uint16(c.b[c.r:]))
	n := copy(p, c.b[c.r+2:c.r+2+size])
	c.r += 2 + size
	if c.r == c.w {
		st.cur = nil
		c.recycle()
	}
	st.consumed(wire.HeaderLen + size)
	return n, nil
}

// TryWriter is a destination that can take bytes without ever blocking: it takes what it can and reports how many, 0 if it is
// full. Only an end of the destination is an error.
type TryWriter interface {
	TryWrite(p []byte) (int, error)
}

// WriteTo writes what arrives to w until the peer's FIN; it saves io.Copy a copy. If w is a TryWriter, small frames that
// find the stream empty go to it straight from the session's reader, without waking this goroutine.
func (st *Stream) WriteTo(w io.Writer) (int64, error) {
	n, _, err := st.pour(w, nil)
	return n, err
}

// WriteSome is WriteTo that no goroutine has to wait in: when nothing has arrived it returns true, and wake is called, once, when it should be called
// again. wake must not block, or call the stream. What goes straight to w goes there meanwhile, too.
func (st *Stream) WriteSome(w io.Writer, wake func()) (more bool, err error) {
	_, more, err = st.pour(w, wake)
	return more, err
}

func (st *Stream) pour(w io.Writer, wake func()) (total int64, more bool, err error) {
	st.readMu.Lock()
	defer st.readMu.Unlock()
	if tw, ok := w.(TryWriter); ok {
		st.mu.Lock()
		if st.rx.direct == nil {
			st.rx.direct, st.rx.directErr = tw, nil
		}
		st.mu.Unlock()
		defer func() {
			if more {
				return
			}
			st.mu.Lock()
			st.rx.direct = nil
			st.mu.Unlock()
		}()
	}
	for {
		if st.cur == nil {
			switch err := st.next(wake); {
			case err == io.EOF: //nolint:errorlint // next returns io.EOF itself
				return total, false, nil
			case err == errEmpty: //nolint:errorlint // as io.EOF
				return total, true, nil
			case err != nil:
				return total, false, err
			}
		}
		c := st.cur
		st.cur = nil
		if c.messages {
			c.recycle()
			return total, false, errors.New("messages cannot be copied as bytes")
		}
		size := c.w - c.r
		n, err := w.Write(c.b[c.r:c.w])
		c.recycle()
		st.consumed(size)
		total += int64(n)
		if err != nil {
			return total, false, err
		}
	}
}

package mux

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/wire"
)

var _ net.Conn = (*Stream)(nil)

// Stream is one of a session's streams. It is a byte stream (Read, Write) or a sequence of messages (ReadPacket,
// WritePacket); both ends must use it in the same way. It is also a net.Conn. Deadlines concern this stream only.
//
//	        OPEN sent / received
//	               │
//	            pending ── ERR, RST, session's end ──► ended
//	               │ OK
//	              open  ─── RST, session's end ──────► ended
//	FIN sent │           │ FIN received
//	  half-closed    half-closed
//	         └── both ───┘──► finished: out of the session's table; what was received can still be read
//
// Close sends FIN and discards what still comes; a peer that sends more gets RST.
type Stream struct {
	id   uint32
	s    *Session
	mine bool // this end opened it

	first  uint8       // opener: the window in OPEN
	answer chan answer // opener: OK or ERR; capacity 1

	writeMu sync.Mutex // held by one sender at a time, so that frames keep their order; taken before mu
	turn    turn       // guarded by writeMu

	readMu sync.Mutex // held by one receiver at a time; taken before mu
	cur    *chunk     // guarded by readMu: being read

	mu       sync.Mutex
	readable sync.Cond
	writable sync.Cond
	// guarded by mu:
	err      error // why the stream ended abnormally
	pending  bool  // not yet answered
	gone     bool  // out of the session's table
	freed    bool  // window given back, buffers dropped
	closed   bool  // Close or Reset was called
	finSent  bool
	finDue   bool // FIN waits for a Write to end
	finRecvd bool
	request  *Request // acceptor, while somebody may want its context

	direct    TryWriter // WriteTo's destination
	directErr error     // why it ended
	waiting   bool      // the receiver waits in next with nothing in its hands

	in       chunks
	window   int  // share of the budget: credit + buffered + unread overhead + owed
	credit   int  // what the peer may still send
	owed     int  // read, not yet granted again
	wanted   int  // bytes the peer said are waiting; 0: none
	asked    bool // the peer was asked to give credit back
	touched  bool // data came since the housekeeper last looked
	sendCred int  // what this end may still send
	wantSent bool

	readDeadline, writeDeadline deadline
	linger                      *time.Timer
}

type answer struct {
	payload []byte
	err     error
}

func newStream(s *Session, id uint32, mine bool, window int) *Stream {
	st := &Stream{id: id, s: s, mine: mine, pending: true, window: max(window, minWindow), credit: window}
	st.readable.L, st.writable.L = &st.mu, &st.mu
	st.readDeadline.cond, st.writeDeadline.cond = &st.readable, &st.writable
	return st
}

// ID returns the stream's number, unique in its session while the stream lives.
func (st *Stream) ID() uint32 { return st.id }

// Err returns why the stream ended abnormally (reset, session lost), or nil.
func (st *Stream) Err() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.err
}

// sendErrLocked says why nothing can be sent, or nil.
func (st *Stream) sendErrLocked() error {
	switch {
	case st.err != nil:
		return st.err
	case st.closed:
		return net.ErrClosed
	case st.finSent:
		return io.ErrClosedPipe
	}
	return nil
}

// takeCredit waits until something may be sent and takes credit for up to n bytes of payload (for all n if whole). It
// returns how many payload bytes may be sent.
func (st *Stream) takeCredit(n int, whole bool) (int, error) {
	// Not for a few bytes: small credit would be spent on headers (RFC 1122, section 4.2.3.4: silly window syndrome).
	least := wire.HeaderLen + min(n, 512)
	if whole {
		least = wire.HeaderLen + n
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	for {
		if err := st.sendErrLocked(); err != nil {
			return 0, err
		}
		if st.writeDeadline.expired {
			return 0, errTimeout
		}
		if st.sendCred >= least {
			n = min(n, st.sendCred-wire.HeaderLen, wire.MaxPayload)
			st.sendCred -= wire.HeaderLen + n
			return n, nil
		}
		if !st.wantSent {
			st.wantSent = true
			st.mu.Unlock()
			err := st.sendWant(min(wire.HeaderLen+n, wire.MaxFrame))
			st.mu.Lock()
			if err != nil && st.err == nil {
				return 0, sessionError(err)
			}
			continue
		}
		st.writable.Wait()
	}
}

// sendWant tells the peer that n bytes, with their header, wait for credit. It goes behind the data that used the credit up.
func (st *Stream) sendWant(n int) error {
	var p [4]byte
	binary.BigEndian.PutUint32(p[:], uint32(n))
	return st.s.w.inOrder(true, &st.turn, wire.Header{Type: wire.TypeWant, Stream: st.id}, p[:])
}

// Write sends p and returns when all of it is queued or sent.
func (st *Stream) Write(p []byte) (int, error) {
	st.writeMu.Lock()
	defer st.unlockWrite()
	sent := 0
	for sent < len(p) {
		n, err := st.takeCredit(len(p)-sent, false)
		if err != nil {
			return sent, err
		}
		if err := st.send(0, p[sent:sent+n]); err != nil {
			return sent, err
		}
		sent += n
	}
	return sent, nil
}

// WritePacket sends p as one message of at most MaxPacket bytes; it may be empty. It waits while the peer grants no credit.
func (st *Stream) WritePacket(p []byte) error {
	if len(p) > MaxPacket {
		return ErrTooLarge
	}
	st.writeMu.Lock()
	defer st.unlockWrite()
	if _, err := st.takeCredit(len(p), true); err != nil {
		return err
	}
	return st.send(wire.FlagMessage, p)
}

// send queues one DATA frame for which credit was taken. writeMu is held.
func (st *Stream) send(flags uint8, p []byte) error {
	err := st.s.w.put(&st.turn, wire.Header{Type: wire.TypeData, Flags: flags, Stream: st.id}, p, st.writeDeadline.channel(&st.mu))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errTimeout):
		st.mu.Lock()
		st.sendCred += wire.HeaderLen + len(p)
		st.mu.Unlock()
		return err
	}
	return st.transportError(err)
}

func (st *Stream) transportError(err error) error {
	if e := st.s.Err(); e != nil {
		err = e
	}
	return sessionError(err)
}

// ReadFrom sends what r returns until EOF; it saves io.Copy a buffer. While r is idle it holds a small buffer only.
func (st *Stream) ReadFrom(r io.Reader) (int64, error) {
	const least = 4 << 10
	var total int64
	for size := least; ; {
		buf := getChunk(size)
		n, err := r.Read(buf.b[:min(len(buf.b), wire.MaxPayload)])
		if n > 0 {
			m, werr := st.Write(buf.b[:n])
			total += int64(m)
			if werr != nil {
				err = werr
			}
		}
		buf.recycle()
		switch {
		case err == io.EOF: //nolint:errorlint // io.Reader returns io.EOF itself
			return total, nil
		case err != nil:
			return total, err
		case n >= size-wire.HeaderLen:
			size = min(4*size, wire.MaxFrame)
		case n < size/4:
			size = max(size/4, least)
		}
	}
}

// next waits for received data and makes it st.cur. readMu is held. io.EOF is the end of the peer's direction.
func (st *Stream) next() error {
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
		if c := st.in.pop(); c != nil {
			st.cur = c
			st.waiting = false
			st.mu.Unlock()
			return nil
		}
		if st.directErr != nil {
			err := st.directErr
			st.mu.Unlock()
			return err
		}
		if st.finRecvd { // also if a RST came later: the data is complete
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
		st.waiting = true
		st.readable.Wait()
	}
}

// consumed gives the peer credit for n bytes that were taken from the buffer, in portions of a quarter of the window.
func (st *Stream) consumed(n int) {
	st.mu.Lock()
	st.owed += n
	g := st.grantLocked()
	st.mu.Unlock()
	st.sendGrant(g)
}

// grantLocked returns how much credit to send now, which the caller does.
func (st *Stream) grantLocked() int {
	if st.finRecvd || st.freed || st.err != nil {
		return 0
	}
	// The peer waits although nearly all was read: it is the window that is too small, not the reader that is slow. A
	// message that is larger than the window needs a larger one in any case.
	short := st.wanted > 0 && (st.in.bytes <= st.window/4 || st.wanted > st.window)
	if st.owed < st.window/4 && !short {
		return 0
	}
	// More than the share by now: give up what was read.
	if over := min(st.owed, st.s.budget.excess(st.window)); over > 0 && st.wanted <= st.window-over {
		st.owed -= over
		st.window -= over
		st.s.budget.release(over)
	}
	if short {
		st.growLocked(min(max(2*st.window, st.wanted), st.s.cfg.Window), st.wanted > st.window)
	}
	g := st.owed
	st.owed = 0
	st.credit += g
	if st.credit >= st.wanted {
		st.wanted = 0
	}
	return g
}

// growLocked raises the window towards want as far as the budget allows.
func (st *Stream) growLocked(want int, need bool) {
	n := st.s.budget.grow(st.window, want, need)
	st.window += n
	st.owed += n
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
	for {
		if st.cur == nil {
			if err := st.next(); err != nil {
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
}

// ReadPacket reads one message. What does not fit into p is lost, as with a UDP socket.
func (st *Stream) ReadPacket(p []byte) (int, error) {
	st.readMu.Lock()
	defer st.readMu.Unlock()
	if st.cur == nil {
		if err := st.next(); err != nil {
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
	st.readMu.Lock()
	defer st.readMu.Unlock()
	var total int64
	if tw, ok := w.(TryWriter); ok {
		st.mu.Lock()
		st.direct, st.directErr = tw, nil
		st.mu.Unlock()
		defer func() {
			st.mu.Lock()
			st.direct = nil
			st.mu.Unlock()
		}()
	}
	for {
		if st.cur == nil {
			if err := st.next(); err == io.EOF { //nolint:errorlint // next returns io.EOF itself
				return total, nil
			} else if err != nil {
				return total, err
			}
		}
		c := st.cur
		st.cur = nil
		if c.messages {
			c.recycle()
			return total, errors.New("messages cannot be copied as bytes")
		}
		size := c.w - c.r
		n, err := w.Write(c.b[c.r:c.w])
		c.recycle()
		st.consumed(size)
		total += int64(n)
		if err != nil {
			return total, err
		}
	}
}

// CloseWrite sends FIN after what was written; reading goes on.
func (st *Stream) CloseWrite() error {
	st.mu.Lock()
	err := st.sendErrLocked()
	st.mu.Unlock()
	if err != nil {
		if errors.Is(err, io.ErrClosedPipe) {
			return nil
		}
		return err
	}
	return st.fin()
}

// fin sends FIN once, behind the stream's data. If a Write is under way that one sends it.
func (st *Stream) fin() error {
	st.mu.Lock()
	if st.finSent || st.err != nil {
		st.mu.Unlock()
		return nil
	}
	st.finSent, st.finDue = true, true
	st.writable.Broadcast() // a Write that waits for credit ends
	st.mu.Unlock()
	return st.sendFin()
}

// unlockWrite ends a sender's time and sends the FIN that became due meanwhile.
func (st *Stream) unlockWrite() {
	st.writeMu.Unlock()
	_ = st.sendFin() // an error has ended the session
}

func (st *Stream) sendFin() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	// Whoever holds writeMu looks at finDue after he released it.
	if !st.finDue || !st.writeMu.TryLock() {
		return nil
	}
	st.finDue = false
	st.mu.Unlock()
	err := st.s.w.inOrder(true, &st.turn, wire.Header{Type: wire.TypeFin, Stream: st.id}, nil)
	st.writeMu.Unlock()
	st.mu.Lock()
	if err != nil {
		return sessionError(err)
	}
	if st.finRecvd && !st.gone {
		st.mu.Unlock()
		st.s.remove(st)
		st.mu.Lock()
	}
	return nil
}

// Close sends FIN if that was not done and gives up reading. A peer that still has something to say gets RST behind the FIN
// (RFC 1122, section 4.2.2.13), after which it can read what was written before.
func (st *Stream) Close() error {
	st.mu.Lock()
	if st.closed {
		st.mu.Unlock()
		return nil
	}
	st.closed = true
	unread := !st.finRecvd && (st.in.head != nil || st.wanted > 0)
	st.readable.Broadcast()
	st.writable.Broadcast()
	st.freeLocked()
	st.mu.Unlock()
	err := st.fin()
	if unread {
		st.abort(wire.CodeReset)
		return err
	}
	st.mu.Lock()
	if !st.gone && st.err == nil {
		st.linger = time.AfterFunc(st.s.cfg.Linger, func() { st.abort(wire.CodeCanceled) })
	}
	st.mu.Unlock()
	return err
}

// Reset ends both directions at once; the peer's Read returns ECONNRESET.
func (st *Stream) Reset() { st.ResetCode(wire.CodeReset) }

// ResetCode is Reset with a reason.
func (st *Stream) ResetCode(code wire.Code) {
	st.mu.Lock()
	st.closed = true
	st.mu.Unlock()
	st.abort(code)
}

// abort sends RST, unless the stream ended before, and frees everything.
func (st *Stream) abort(code wire.Code) {
	st.mu.Lock()
	gone := st.gone
	if st.err == nil {
		st.err = net.ErrClosed
	}
	st.mu.Unlock()
	if !gone {
		_ = st.sendRst(true, code)
	}
	st.end(net.ErrClosed, true)
}

func (st *Stream) sendRst(inline bool, code wire.Code) error {
	p := []byte{byte(code >> 8), byte(code)}
	return st.s.w.inOrder(inline, &st.turn, wire.Header{Type: wire.TypeRst, Stream: st.id}, p)
}

// end takes the stream out of the session. If drop is set the buffer goes too, else it can still be read.
func (st *Stream) end(err error, drop bool) {
	st.s.remove(st)
	st.mu.Lock()
	if st.err == nil {
		st.err = err
	}
	if st.pending && st.mine {
		st.pending = false
		select {
		case st.answer <- answer{err: err}:
		default:
		}
	}
	req := st.request
	if drop || st.closed || st.in.head == nil {
		st.freeLocked()
	}
	st.readable.Broadcast()
	st.writable.Broadcast()
	st.mu.Unlock()
	if req != nil {
		req.cancel(err)
	}
}

// freeLocked drops the buffer and gives the window back. The chunk that a reader works on stays the reader's.
func (st *Stream) freeLocked() {
	if st.freed {
		return
	}
	st.freed = true
	st.in.drop()
	st.s.budget.release(st.window - minWindow)
	st.window = minWindow
	if st.gone {
		st.s.live.Add(-1)
	}
}

// leaveLocked notes that the stream is out of the session's table.
func (st *Stream) leaveLocked() {
	if st.gone {
		return
	}
	st.gone = true
	if st.linger != nil {
		st.linger.Stop()
	}
	if st.freed {
		st.s.live.Add(-1)
	}
}

// LocalAddr returns a name for logs; streams have no address of their own.
func (st *Stream) LocalAddr() net.Addr { return addr("tunnel") }

// RemoteAddr returns a name for logs.
func (st *Stream) RemoteAddr() net.Addr { return addr("tunnel") }

type addr string

func (addr) Network() string  { return "doppel" }
func (a addr) String() string { return string(a) }

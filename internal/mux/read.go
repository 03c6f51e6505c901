package mux

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/doppel-dev/doppel/internal/wire"
)

const (
	readBuffer = 16 << 10 // one TLS record
	// slowRead is how long a piece of a frame may take before what has come is handed on without the rest.
	slowRead = 500 * time.Microsecond
)

// read is the reader goroutine: it takes frames from the connection until it ends. It never writes and never waits for
// anything but the connection.
func (s *Session) read() {
	br := bufio.NewReaderSize(s.conn, readBuffer)
	var err error
	for err == nil {
		err = s.readFrame(br)
	}
	var away *GoAwayError
	switch {
	case errors.Is(err, wire.ErrProtocol):
		s.violate(err)
		_, _ = io.Copy(io.Discard, s.conn) // until the peer hangs up, or the time for that is over
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		s.terminate(errors.New("connection closed by peer"), nil)
	case errors.As(err, &away):
		s.terminate(err, nil)
	default:
		s.terminate(fmt.Errorf("read: %w", err), nil)
	}
	s.mu.Lock()
	if s.cut != nil {
		s.cut.Stop()
	}
	s.mu.Unlock()
	s.w.fail(ErrClosed) // if it is still writing
	_ = s.conn.Close()
}

func (s *Session) readFrame(br *bufio.Reader) error {
	b, err := br.Peek(wire.HeaderLen)
	if err != nil {
		return err
	}
	h, err := wire.ParseHeader(b)
	if err != nil {
		return err
	}
	_, _ = br.Discard(wire.HeaderLen)
	s.frames.Add(1)
	switch h.Type {
	case wire.TypeData:
		return s.readData(br, h)
	case wire.TypeOpen, wire.TypeOK:
		p := make([]byte, h.Len) // kept by whoever gets it
		if _, err := io.ReadFull(br, p); err != nil {
			return err
		}
		if h.Type == wire.TypeOpen {
			return s.onOpen(h, p)
		}
		return s.onAnswer(h, answer{payload: p})
	}
	p, err := br.Peek(h.Len) // at most 1 KiB and a little: fits into the buffer
	if err != nil {
		return err
	}
	err = s.onControl(h, p)
	_, _ = br.Discard(h.Len)
	return err
}

func (s *Session) onControl(h wire.Header, p []byte) error {
	switch h.Type {
	case wire.TypePing:
		return s.reply(func(b []byte) []byte {
			return append(wire.Header{Type: wire.TypePong, Len: len(p)}.Append(b), p...)
		})
	case wire.TypePong:
		s.onPong(p)
		return nil
	case wire.TypeGoAway:
		code, msg, err := wire.ParseError(p)
		if err != nil {
			return err
		}
		return &GoAwayError{Code: code, Msg: msg}
	case wire.TypeErr:
		code, msg, err := wire.ParseError(p)
		if err != nil {
			return err
		}
		return s.onAnswer(h, answer{err: &RejectError{Code: code, Msg: msg}})
	}
	st := s.lookup(h.Stream)
	if st == nil {
		return nil // it ended here while the frame was under way
	}
	switch h.Type {
	case wire.TypeFin:
		return st.onFin()
	case wire.TypeRst:
		code, err := wire.ParseRst(p)
		if err != nil {
			return err
		}
		st.end(&ResetError{Code: code}, false)
		return nil
	}
	n, err := wire.ParseUint32(p)
	if err != nil {
		return err
	}
	switch h.Type {
	case wire.TypeWindow:
		return st.onWindow(n)
	case wire.TypeWant:
		return st.onWant(n)
	case wire.TypeReclaim:
		return st.onReclaim(n)
	case wire.TypeReturn:
		return st.onReturn(n)
	}
	return fmt.Errorf("%w: unexpected %s", wire.ErrProtocol, h.Type)
}

// reply queues a small frame from the reader goroutine.
func (s *Session) reply(appendTo func([]byte) []byte) error {
	err := s.w.control(false, appendTo)
	if errors.Is(err, errNotReading) {
		return err
	}
	return nil // a writer that failed ends the session itself
}

func (s *Session) onPong(p []byte) {
	n := uint64(0)
	for _, c := range p {
		n = n<<8 | uint64(c)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if ch := s.pings[n]; ch != nil {
		delete(s.pings, n)
		close(ch)
	}
}

func (s *Session) mine(id uint32) bool { return (id%2 == 1) == s.cfg.Initiator }

func (s *Session) onOpen(h wire.Header, p []byte) error {
	if s.mine(h.Stream) {
		return fmt.Errorf("%w: OPEN of stream %d, a number of the other end", wire.ErrProtocol, h.Stream)
	}
	st := newStream(s, h.Stream, false, 0)
	st.sendCred = h.Window()
	st.finRecvd = h.Flags&wire.FlagFin != 0
	req := &Request{st: st, header: p}
	st.request = req

	s.mu.Lock()
	if s.streams[h.Stream] != nil {
		s.mu.Unlock()
		return fmt.Errorf("%w: OPEN of stream %d, which is open", wire.ErrProtocol, h.Stream)
	}
	busy := s.err != nil || int(s.live.Load()) >= s.cfg.MaxStreams || s.openBytes+len(p) > maxOpenBytes
	if !busy {
		select {
		case s.accept <- req:
			s.streams[h.Stream] = st
			s.live.Add(1)
			s.openBytes += len(p)
		default:
			busy = true
		}
	}
	s.mu.Unlock()
	if busy {
		return s.reply(func(b []byte) []byte {
			return wire.AppendError(b, wire.TypeErr, h.Stream, wire.CodeBusy, "too many streams")
		})
	}
	return nil
}

func (s *Session) onAnswer(h wire.Header, a answer) error {
	if !s.mine(h.Stream) {
		return fmt.Errorf("%w: %s on stream %d, which the sender opened", wire.ErrProtocol, h.Type, h.Stream)
	}
	st := s.lookup(h.Stream)
	if st == nil {
		return nil // given up while the answer was under way
	}
	st.mu.Lock()
	if !st.pending {
		st.mu.Unlock()
		return fmt.Errorf("%w: second answer on stream %d", wire.ErrProtocol, h.Stream)
	}
	st.pending = false
	if a.err != nil {
		st.mu.Unlock()
		st.answer <- a
		st.end(a.err, true)
		return nil
	}
	st.sendCred = h.Window()
	st.finRecvd = h.Flags&wire.FlagFin != 0
	both := st.finRecvd && st.finSent
	st.mu.Unlock()
	if both {
		s.remove(st)
	}
	st.answer <- a
	return nil
}

// readData takes a DATA frame from br into its stream's buffer.
func (s *Session) readData(br *bufio.Reader, h wire.Header) error {
	st := s.lookup(h.Stream)
	if st == nil {
		_, err := br.Discard(h.Len)
		return err
	}
	keep, err := st.arriving(wire.HeaderLen + h.Len)
	if err != nil {
		return err
	}
	if !keep {
		st.refuse()
		_, err := br.Discard(h.Len)
		return err
	}
	message := h.Flags&wire.FlagMessage != 0
	if h.Len <= smallFrame {
		p, err := br.Peek(h.Len)
		if err != nil {
			return err
		}
		err = st.deliver(p, message)
		_, _ = br.Discard(h.Len)
		return err
	}
	if message {
		return st.readMessageFrom(br, h.Len)
	}
	return st.readBytesFrom(br, h.Len)
}

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
			st.deliverChunk(c, 0)
			c = getChunk(n)
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

// arriving takes the credit for a DATA frame. keep is false if nobody wants the data any more.
func (st *Stream) arriving(cost int) (keep bool, err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	switch {
	case st.closed:
		return false, nil
	case st.pending && st.mine:
		return false, fmt.Errorf("%w: DATA before the answer on stream %d", wire.ErrProtocol, st.id)
	case st.finRecvd:
		return false, fmt.Errorf("%w: DATA after FIN on stream %d", wire.ErrProtocol, st.id)
	case cost > st.credit:
		return false, fmt.Errorf("%w: %d bytes on stream %d with %d bytes of credit", wire.ErrProtocol, cost, st.id, st.credit)
	}
	st.credit -= cost
	st.touched = true
	return true, nil
}

// deliver adds a small frame's payload to the buffer, or gives it straight to the destination.
func (st *Stream) deliver(p []byte, message bool) error {
	st.mu.Lock()
	g := 0
	if !message && !st.freed {
		st.owed += wire.HeaderLen // headers are not stored
		p, g = st.deliverDirectLocked(p)
	}
	if !st.freed && (message || len(p) > 0) {
		if message {
			st.in.addMessage(p)
		} else {
			st.in.add(p)
		}
		st.readable.Signal()
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
	if st.direct == nil || !st.waiting || st.in.head != nil {
		return p, 0
	}
	d := st.direct
	st.mu.Unlock()
	n, err := d.TryWrite(p)
	st.mu.Lock()
	if err != nil {
		st.directErr = err
		st.readable.Signal()
		return nil, 0
	}
	st.owed += n
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
	st.owed += overhead
	st.in.push(c)
	st.readable.Signal()
	st.mu.Unlock()
}

func (st *Stream) onFin() error {
	st.mu.Lock()
	if st.finRecvd || st.pending {
		st.mu.Unlock()
		return fmt.Errorf("%w: FIN out of order on stream %d", wire.ErrProtocol, st.id)
	}
	st.finRecvd = true
	both := st.finSent && !st.pending
	st.readable.Broadcast()
	st.mu.Unlock()
	if both {
		st.s.remove(st)
	}
	return nil
}

func (st *Stream) onWindow(n uint32) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if int64(st.sendCred)+int64(n) > wire.MaxCredit {
		return fmt.Errorf("%w: credit of stream %d overflows", wire.ErrProtocol, st.id)
	}
	st.sendCred += int(n)
	st.wantSent = false
	st.writable.Signal()
	return nil
}

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
	st.wanted = int(n)
	g := st.grantLocked()
	st.mu.Unlock()
	if g == 0 {
		return nil
	}
	return st.s.reply(func(b []byte) []byte { return wire.AppendUint32(b, wire.TypeWindow, st.id, uint32(g)) })
}

func (st *Stream) onReclaim(keep uint32) error {
	st.mu.Lock()
	n := st.sendCred - int(min(keep, wire.MaxCredit))
	if n > 0 {
		st.sendCred -= n
	}
	st.mu.Unlock()
	if n <= 0 {
		n = 0
	}
	return st.s.reply(func(b []byte) []byte { return wire.AppendUint32(b, wire.TypeReturn, st.id, uint32(n)) })
}

func (st *Stream) onReturn(n uint32) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.asked || int64(n) > int64(st.credit) {
		return fmt.Errorf("%w: RETURN of %d bytes on stream %d", wire.ErrProtocol, n, st.id)
	}
	st.asked = false
	st.credit -= int(n)
	if !st.freed {
		back := min(int(n), st.window-minWindow)
		st.window -= back
		st.owed += int(n) - back
		st.s.budget.release(back)
	}
	return nil
}

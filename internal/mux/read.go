package mux

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/doppel-dev/doppel/internal/wire"
)

const (
	readBuffer = smallFrame // what is longer is read where it is to be; a manager has thousands of these
	// slowRead is how long a piece of a frame may take before what has come is handed on without the rest.
	slowRead = 500 * time.Microsecond
)

// read is the reader goroutine: it takes frames from the connection until it ends. It never writes and never waits for
// anything but the connection.
func (s *Session) read() {
	br := bufio.NewReaderSize(s.c, readBuffer)
	var err error
	for err == nil {
		err = s.readFrame(br)
	}
	var away *GoAwayError
	switch {
	case errors.Is(err, wire.ErrProtocol):
		s.violate(err)
		_, _ = io.Copy(io.Discard, s.c) // until the peer hangs up, or the time for that is over
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
	s.c.close(ErrClosed)
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
	default: // a control frame
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
		return replied(s.w.pong(func(b []byte) []byte {
			return append(wire.Header{Type: wire.TypePong, Len: len(p)}.Append(b), p...)
		}))
	case wire.TypePong:
		s.onPong(p)
		return nil
	case wire.TypeAck:
		n, err := wire.ParseAck(p)
		if err != nil {
			return err
		}
		room, err := s.c.acked(n)
		if room {
			s.w.awake()
		}
		return err
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
	default: // a frame of one stream
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
	default: // a frame with one number
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
	default:
		return fmt.Errorf("%w: unexpected %s", wire.ErrProtocol, h.Type)
	}
}

// reply queues a small frame from the reader goroutine.
func (s *Session) reply(appendTo func([]byte) []byte) error {
	return replied(s.w.control(false, appendTo))
}

// replied is what an error of the writer means to the reader goroutine.
func replied(err error) error {
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
	was, ok := s.pings[n]
	delete(s.pings, n)
	s.mu.Unlock()
	if !ok {
		return
	}
	s.path.sample(was.sent, s.moved()-was.from, was.watched)
	if was.pong != nil {
		close(was.pong)
	}
}

func (s *Session) mine(id uint32) bool { return (id%2 == 1) == s.cfg.Initiator }

func (s *Session) onOpen(h wire.Header, p []byte) error {
	if s.mine(h.Stream) {
		return fmt.Errorf("%w: OPEN of stream %d, a number of the other end", wire.ErrProtocol, h.Stream)
	}
	st := newStream(s, h.Stream, false, 0)
	st.tx.credit = h.Window()
	st.rx.fin = h.Flags&wire.FlagFin != 0
	req := &Request{st: st, header: p}
	st.request = req

	s.mu.Lock()
	if s.streams[h.Stream] != nil {
		s.mu.Unlock()
		return fmt.Errorf("%w: OPEN of stream %d, which is open", wire.ErrProtocol, h.Stream)
	}
	busy := s.err != nil || int(s.live.Load()) >= s.cfg.MaxStreams || s.openBytes+len(p) > maxOpenBytes
	if busy = busy || !s.accept.put(req); !busy {
		s.streams[h.Stream] = st
		s.live.Add(1)
		s.openBytes += len(p)
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
	if st.err != nil { // given up just now
		st.mu.Unlock()
		return nil
	}
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
	st.tx.credit = h.Window()
	st.rx.fin = h.Flags&wire.FlagFin != 0
	both := st.rx.fin && st.tx.fin
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
	message := h.Flags&wire.FlagMessage != 0
	keep, err := st.arriving(wire.HeaderLen+h.Len, message)
	if err != nil {
		return err
	}
	if !keep {
		st.refuse()
		_, err := br.Discard(h.Len)
		return err
	}
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

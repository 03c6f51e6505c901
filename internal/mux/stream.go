package mux

import (
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
	err     error // why the stream ended abnormally
	pending bool  // not yet answered
	gone    bool  // out of the session's table
	freed   bool  // window given back, buffers dropped
	closed  bool  // Close or Reset was called
	rx      incoming
	tx      outgoing
	request *Request // acceptor, while somebody may want its context
	linger  *time.Timer

	readDeadline, writeDeadline deadline
}

// incoming is the peer's direction of a stream.
type incoming struct {
	fin      bool // received
	begun    bool // something was received,
	messages bool // which was one of messages
	buf      chunks
	window   int   // share of the budget: credit, what is stored, and owed
	credit   int   // what the peer may still send
	owed     int   // read, not yet granted again
	wanted   int   // bytes the peer said are waiting; 0: none, or granted since
	stalled  bool  // the peer lacked credit, and none of the data it sent since has come
	asked    bool  // the peer was asked to give credit back
	touched  bool  // data came since the housekeeper last looked
	largeAt  int64 // as moment has it: when a large frame last came; 0: never
	shrinkTo int   // what the window is to become as credit is due; 0: it stays
	pace     pace

	direct    TryWriter // WriteTo's destination
	directErr error     // why it ended
	waiting   bool      // the receiver waits in next, or for wake, with nothing in its hands
	wake      func()    // WriteSome's; nil: nobody waits for it
}

// outgoing is this end's direction of a stream.
type outgoing struct {
	fin      bool // sent, or due
	finDue   bool // FIN waits for a Write to end
	credit   int  // what this end may still send
	wantSent bool
}

type answer struct {
	payload []byte
	err     error
}

func newStream(s *Session, id uint32, mine bool, window int) *Stream {
	st := &Stream{id: id, s: s, mine: mine, pending: true, rx: incoming{window: max(window, minWindow), credit: window}}
	st.readable.L, st.writable.L = &st.mu, &st.mu
	st.readDeadline.cond, st.writeDeadline.cond = &st.readable, &st.writable
	st.writeDeadline.passed = st.giveUp
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
	if st.tx.fin || st.err != nil {
		st.mu.Unlock()
		return nil
	}
	st.tx.fin, st.tx.finDue = true, true
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
	if !st.tx.finDue || !st.writeMu.TryLock() {
		return nil
	}
	st.tx.finDue = false
	st.mu.Unlock()
	err := st.s.w.inOrder(true, &st.turn, wire.Header{Type: wire.TypeFin, Stream: st.id}, nil)
	st.writeMu.Unlock()
	st.mu.Lock()
	if err != nil {
		return sessionError(err)
	}
	if st.rx.fin && !st.gone {
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
	unread := !st.rx.fin && (st.rx.buf.head != nil || st.rx.wanted > 0)
	st.arrivedLocked()
	st.writable.Broadcast()
	st.giveUp()
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
	// Whoever hears of the end by the request's context finds the stream ended, and why.
	st.mu.Lock()
	if st.err == nil {
		st.err = err
	}
	req := st.request
	st.mu.Unlock()
	if req != nil {
		req.cancel(err)
	}
	st.s.remove(st)
	st.mu.Lock()
	if st.pending && st.mine {
		st.pending = false
		select {
		case st.answer <- answer{err: err}:
		default:
		}
	}
	if drop || st.closed || st.rx.buf.head == nil {
		st.freeLocked()
	}
	st.arrivedLocked()
	st.writable.Broadcast()
	st.giveUp()
	st.mu.Unlock()
}

// freeLocked drops the buffer and gives the window back. The chunk that a reader works on stays the reader's.
func (st *Stream) freeLocked() {
	if st.freed {
		return
	}
	st.freed = true
	st.rx.buf.drop()
	st.s.budget.release(st.rx.window - minWindow)
	st.rx.window = minWindow
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

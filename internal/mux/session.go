package mux

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/wire"
)

// closeTimeout bounds how long an ending session tries to send what is queued and its GOAWAY, and waits for the peer to hang
// up: a connection that is closed with unread data is reset, and what was sent last is lost with it (RFC 2525, section 2.17).
const closeTimeout = time.Second

// maxOpenBytes bounds the headers of the peer's streams that are not yet answered.
const maxOpenBytes = 4 << 20

// Session is one end of a multiplexed connection. All methods may be called at any time from any goroutine.
type Session struct {
	cfg    Config
	c      *carrier
	w      *writer
	budget *budget
	group  *lifecycle.Group
	accept *backlog
	kick   chan struct{} // wakes the housekeeper
	done   chan struct{}
	live   atomic.Int64  // streams in the table, or out of it with their buffer not yet freed
	frames atomic.Uint64 // received
	talked atomic.Int64  // as moment has it: when a small message last came; 0: never
	path   path
	probes chan struct{} // has the housekeeper measure the path

	mu sync.Mutex
	// guarded by mu:
	err       error
	why       error         // why there is no connection; nil: there is one
	down      chan struct{} // closed with the connection
	grace     *time.Timer   // ends a session without connection
	streams   map[uint32]*Stream
	nextID    uint32
	openBytes int // headers of unanswered requests
	pings     map[uint64]ping
	nextPing  uint64
	cut       *time.Timer // closes the connection of an ending session
}

// New starts a session over conn, which it owns from now on.
func New(conn net.Conn, cfg Config) (*Session, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("mux config: %w", err)
	}
	s := &Session{
		cfg: cfg, c: newCarrier(conn, cfg.Resend), down: make(chan struct{}),
		group:  lifecycle.New(context.Background(), cfg.Log),
		accept: newBacklog(cfg.Backlog), kick: make(chan struct{}, 1), probes: make(chan struct{}, 1), done: make(chan struct{}),
		streams: make(map[uint32]*Stream), nextID: 2, pings: make(map[uint64]ping),
	}
	if cfg.Initiator {
		s.nextID = 1
	}
	s.w = newWriter(s.c, func(err error) { s.terminate(fmt.Errorf("write: %w", err), nil) })
	s.c.lost, s.c.ackDue = s.suspend, s.w.acknowledge
	s.c.heard = func(n int) {
		s.w.heard()
		s.path.arrived(n)
	}
	s.budget = newBudget(cfg.Budget-cfg.Resend, cfg.MaxStreams, s.poke)
	s.run("mux writer", s.w.run)
	s.run("mux reader", s.read)
	s.run("mux housekeeper", s.keepHouse)
	return s, nil
}

// run starts one of the session's goroutines; a panic of one ends the session.
func (s *Session) run(name string, fn func()) {
	s.group.Go(name, func(context.Context) error {
		defer s.terminate(errInternal, nil) // without effect if the session has ended
		fn()
		return nil
	})
}

// Open opens a stream with hdr as its header and waits for the peer's answer, whose payload it returns. A refusal is a
// *RejectError. When ctx ends first the peer is told.
func (s *Session) Open(ctx context.Context, hdr []byte) (*Stream, []byte, error) {
	return s.open(ctx, hdr, 0)
}

// Call sends hdr as a request and returns the peer's answer of at most MaxReply bytes.
func (s *Session) Call(ctx context.Context, hdr []byte) ([]byte, error) {
	st, reply, err := s.open(ctx, hdr, wire.FlagFin)
	if err != nil {
		return nil, err
	}
	st.mu.Lock()
	whole := st.rx.fin && st.rx.buf.head == nil
	st.mu.Unlock()
	if whole {
		return reply, st.Close()
	}
	stop := context.AfterFunc(ctx, func() { st.ResetCode(wire.CodeCanceled) })
	defer stop()
	reply, err = st.readAll(reply)
	if ctx.Err() != nil && err != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, err
	}
	return reply, st.Close()
}

func (s *Session) open(ctx context.Context, hdr []byte, flags uint8) (*Stream, []byte, error) {
	if len(hdr) == 0 || len(hdr) > MaxHeader {
		return nil, nil, fmt.Errorf("header of %d bytes: %w", len(hdr), ErrTooLarge)
	}
	if err := ctx.Err(); err != nil {
		return nil, nil, context.Cause(ctx)
	}
	st, err := s.newOutgoing(flags)
	if err != nil {
		return nil, nil, err
	}
	st.writeMu.Lock()
	err = s.w.put(st, wire.Header{Type: wire.TypeOpen, Flags: flags | st.first, Stream: st.id}, hdr, ctx.Done())
	st.writeMu.Unlock()
	switch {
	case errors.Is(err, errTimeout): // not sent
		st.end(net.ErrClosed, true)
		return nil, nil, context.Cause(ctx)
	case err != nil:
		err = st.transportError(err)
		st.end(err, true)
		return nil, nil, err
	}
	select {
	case a := <-st.answer:
		if a.err != nil {
			return nil, nil, a.err
		}
		return st, a.payload, nil
	case <-ctx.Done():
		st.ResetCode(wire.CodeCanceled)
		return nil, nil, context.Cause(ctx)
	}
}

func (s *Session) newOutgoing(flags uint8) (*Stream, error) {
	window := s.budget.initial(s.cfg.InitialWindow)
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.err
	if err != nil {
		err = sessionError(err)
	} else if int(s.live.Load()) >= s.cfg.MaxStreams {
		err = ErrTooManyStreams
	}
	if err != nil {
		s.budget.release(window - minWindow)
		return nil, err
	}
	for s.streams[s.nextID] != nil || s.nextID == 0 { // after 2^31 streams numbers are used again
		s.nextID += 2
	}
	st := newStream(s, s.nextID, true, window)
	st.first = windowLog(window)
	st.answer = make(chan answer, 1)
	st.tx.fin = flags&wire.FlagFin != 0
	s.nextID += 2
	s.streams[st.id] = st
	s.live.Add(1)
	return st, nil
}

// Accept waits for the next stream that the peer wants to open.
func (s *Session) Accept(ctx context.Context) (*Request, error) {
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if r := s.accept.take(); r != nil {
			if r.st.Err() != nil { // given up while it waited
				_ = r.answer()
				continue
			}
			return r, nil
		}
		select {
		case <-s.accept.more:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-s.done:
			return nil, sessionError(s.Err())
		}
	}
}

// Traffic counts the bytes that were sent and received so far, whatever they were.
func (s *Session) Traffic() (sent, received uint64) { return s.c.traffic() }

// Silent is how long the peer has said nothing to what it was sent first since it said something, answers left aside; 0: it was sent nothing.
func (s *Session) Silent() time.Duration { return s.w.silent() }

// ping is one that was not answered yet.
type ping struct {
	sent    time.Time
	from    uint64        // bytes that had moved by then
	watched bool          // the path is watched until it is answered
	pong    chan struct{} // closed by the answer; nil: nobody waits for it
}

// Ping measures the way to the peer and back, through both ends' queues.
func (s *Session) Ping(ctx context.Context) (time.Duration, error) {
	p := ping{sent: time.Now(), pong: make(chan struct{})}
	n := s.notePing(p)
	defer func() {
		s.mu.Lock()
		delete(s.pings, n)
		s.mu.Unlock()
	}()
	if err := s.sendPing(n, true); err != nil {
		return 0, sessionError(err)
	}
	select {
	case <-p.pong:
		return time.Since(p.sent), nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	case <-s.done:
		return 0, sessionError(s.Err())
	}
}

// probe measures the round trip, and has a peer that lives say so.
func (s *Session) probe() {
	sent, watched := s.path.watch()
	_ = s.sendPing(s.notePing(ping{sent: sent, watched: watched}), false) // not inline: a connection whose buffers are full must not stop the housekeeper
}

// measure has the path measured soon, unless that was done just now: a window may be too small because the path is longer than it was.
func (s *Session) measure() {
	if s.cfg.KeepAlive > 0 && s.path.due() {
		select {
		case s.probes <- struct{}{}:
		default:
		}
	}
}

// notePing gives a ping its number.
func (s *Session) notePing(p ping) uint64 {
	p.from = s.moved()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nextPing++
	s.pings[s.nextPing] = p
	return s.nextPing
}

// moved counts the bytes of both directions.
func (s *Session) moved() uint64 {
	sent, received := s.c.traffic()
	return sent + received
}

func (s *Session) sendPing(n uint64, inline bool) error {
	err := s.w.control(inline, func(b []byte) []byte {
		b = wire.Header{Type: wire.TypePing, Len: 8}.Append(b)
		return binary.BigEndian.AppendUint64(b, n)
	})
	if e := s.Err(); err != nil && e != nil {
		return e
	}
	return err
}

// Close sends what is queued (for at most a second), tells the peer, ends all streams and closes the connection. It returns
// when all of the session's goroutines have ended.
func (s *Session) Close() error {
	s.terminate(ErrClosed, wire.AppendError(nil, wire.TypeGoAway, 0, wire.CodeNone, ""))
	return s.group.Wait()
}

// CloseWith is Close with a reason for the peer.
func (s *Session) CloseWith(code wire.Code, msg string) error {
	s.terminate(ErrClosed, wire.AppendError(nil, wire.TypeGoAway, 0, code, msg))
	return s.group.Wait()
}

// Done is closed when the session has ended; Err says why.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err returns why the session ended, or nil.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// NumStreams returns the number of streams that are open or being opened.
func (s *Session) NumStreams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.streams)
}

// terminate ends the session with err, once. A GOAWAY frame, if any, is sent after what is queued; nil closes at once.
func (s *Session) terminate(err error, goAway []byte) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	s.err = err
	lost := sessionError(err)
	if connected := s.c.finish(); !connected {
		goAway = nil
	}
	if goAway != nil {
		s.w.finish(goAway) // the reader goroutine closes the connection when the peer has
		s.cut = time.AfterFunc(closeTimeout, func() { s.w.fail(lost); s.c.close(lost) })
	}
	if s.why == nil {
		close(s.down)
	} else {
		s.grace.Stop()
	}
	streams := make([]*Stream, 0, len(s.streams))
	for _, st := range s.streams {
		streams = append(streams, st)
	}
	s.mu.Unlock()
	close(s.done)

	if goAway == nil {
		s.w.fail(lost)
		s.c.close(lost)
	}
	for _, st := range streams {
		st.end(lost, false)
	}
}

// afterGrace ends the session when it was without connection for too long.
func (s *Session) afterGrace(err error) *time.Timer {
	return time.AfterFunc(s.cfg.Resume, func() { s.terminate(fmt.Errorf("no connection for %s: %w", s.cfg.Resume, err), nil) })
}

// violate ends the session because of what the peer sent.
func (s *Session) violate(err error) {
	s.cfg.Log.Warn("tunnel peer broke the protocol", "err", err)
	s.terminate(err, wire.AppendError(nil, wire.TypeGoAway, 0, wire.CodeProtocol, err.Error()))
}

func (s *Session) lookup(id uint32) *Stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.streams[id]
}

// remove takes a stream out of the table: no frame of the peer concerns it any more.
func (s *Session) remove(st *Stream) {
	s.mu.Lock()
	if s.streams[st.id] == st {
		delete(s.streams, st.id)
	}
	s.mu.Unlock()
	st.mu.Lock()
	st.leaveLocked()
	if st.rx.fin && st.rx.buf.head == nil {
		st.freeLocked()
	}
	req := st.request
	st.mu.Unlock()
	if req != nil {
		req.cancel(errFinished)
	}
}

// answered notes that a request with a header of n bytes is answered.
func (s *Session) answered(n int) {
	s.mu.Lock()
	s.openBytes -= n
	s.mu.Unlock()
}

// poke wakes the housekeeper.
func (s *Session) poke() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

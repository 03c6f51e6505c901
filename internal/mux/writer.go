package mux

import (
	"cmp"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/doppel-dev/doppel/internal/wire"
)

const (
	bulkQueue    = wire.MaxFrame // bytes of large frames that wait behind the write in progress
	smallFrame   = 4 << 10       // payloads up to this go before waiting large frames
	smallQueue   = 32 << 10      // bytes of small frames of streams that may wait
	controlQueue = 256 << 10     // bytes of waiting small frames at which a peer counts as not reading
	// patience is how long after a write something must have been received for callers to go on writing themselves. A silent
	// transport may block, and nobody but the writer goroutine may then be held up beyond his own deadline.
	patience = 250 * time.Millisecond
	headroom = 16 << 10 // in front of the large frames, so that small and large leave in one write
)

var (
	errNotReading = errors.New("peer does not read")
	errGivenUp    = errors.New("nobody wants to send it any more")
)

// bulkBuf is the buffer of large frames: headroom, then up to bulkQueue bytes.
type bulkBuf struct {
	b [headroom + bulkQueue]byte
}

var bulkPool = sync.Pool{New: func() any { return new(bulkBuf) }}

// turn is one stream's place in the queue of those that wait to send a large frame. It is used by one caller at a time.
type turn struct {
	ready chan struct{} // capacity 1; made when first needed

	// guarded by writer.mu:
	gen        uint64 // the batch that holds the stream's last large frame: later frames must not overtake it
	next, prev *turn
	queued     bool
	hdr        wire.Header
	p          []byte
}

// writer puts frames on the transport.
//
// Whoever has a frame and finds the transport idle writes it himself: no other goroutine has to wake up (unless the peer has
// been silent: then the writer goroutine writes). While a write is in
// progress, frames collect in two queues, small and bulk; they leave together in the next write, small ones first. Large
// frames that do not fit wait in turn, one per stream, so that streams alternate; whoever starts a write also copies the next
// waiting frame into the queue, so that the transport never waits for a goroutine. What is left when an inline write ends is
// handed to the writer goroutine (run).
//
// The reader goroutine uses control only, which never writes itself and never blocks: two readers that wait for each other's
// transport would deadlock.
type writer struct {
	c      *carrier
	failed func(error) // called once, unlocked, when the transport fails

	// As moment has them; 0: none.
	unheard atomic.Int64 // when the first write since the last read began
	unsaid  atomic.Int64 // when the first write began since then that the peer will say something to

	mu   sync.Mutex
	wake *sync.Cond // the writer goroutine waits here
	// guarded by mu:
	busy    bool   // somebody owns the transport: writes, or has handed it to the writer goroutine
	handed  bool   // the writer goroutine is to go on
	closing bool   // no more frames; the writer goroutine ends when all is written
	goAway  []byte // the last frame, while closing
	err     error
	ack     bool // an ACK is due
	asks    bool // what is queued is more than answers, to which the peer says nothing
	gen     uint64
	small   []byte
	spare   []byte // small's other buffer
	later   []byte // small frames that must come behind bulk: the next batch's
	bulk    *bulkBuf
	bulkLen int
	first   *turn // waiting for room in bulk
	last    *turn
}

func newWriter(c *carrier, failed func(error)) *writer {
	w := &writer{c: c, failed: failed, gen: 1}
	w.wake = sync.NewCond(&w.mu)
	return w
}

// run is the writer goroutine.
func (w *writer) run() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		switch {
		case w.err != nil:
			return
		case w.handed:
			w.handed = false
			w.flushLocked(false)
		case w.closing && !w.busy:
			if len(w.small) == 0 && w.bulkLen == 0 {
				if w.goAway == nil {
					return
				}
				w.small, w.goAway = append(w.small, w.goAway...), nil
			}
			w.busy = true
			w.flushLocked(false)
		default:
			w.wake.Wait()
		}
	}
}

// put queues one frame of a stream, and writes it if the transport is idle. It blocks while the queue is full and gives up when cancel is closed, or
// (errGivenUp) when the stream says so.
func (w *writer) put(st *Stream, hdr wire.Header, p []byte, cancel <-chan struct{}) error {
	t := &st.turn
	hdr.Len = len(p)
	n := wire.HeaderLen + len(p)
	w.mu.Lock()
	if err := w.errLocked(); err != nil {
		w.mu.Unlock()
		return err
	}
	switch {
	case len(p) <= smallFrame && t.gen != w.gen && len(w.small)+n <= smallQueue:
		w.small = append(hdr.Append(w.small), p...)
	case w.first == nil && w.bulkLen+n <= bulkQueue:
		w.appendBulkLocked(t, hdr, p)
	default:
		return w.waitLocked(st, hdr, p, cancel)
	}
	w.asks = true
	w.kickLocked(true)
	w.mu.Unlock()
	return nil
}

// control queues a whole small frame that must not wait. inline says that the caller may write it himself.
func (w *writer) control(inline bool, appendTo func([]byte) []byte) error {
	return w.queue(inline, true, appendTo)
}

// pong is control of the reader's goroutine, of a frame to which the peer says nothing: two ends would ask each other for ever.
func (w *writer) pong(appendTo func([]byte) []byte) error { return w.queue(false, false, appendTo) }

func (w *writer) queue(inline, asks bool, appendTo func([]byte) []byte) error {
	w.mu.Lock()
	if err := w.errLocked(); err != nil {
		w.mu.Unlock()
		return err
	}
	if len(w.small) > controlQueue {
		w.mu.Unlock()
		w.failed(errNotReading)
		return errNotReading
	}
	w.small = appendTo(w.small)
	w.asks = w.asks || asks
	w.kickLocked(inline)
	w.mu.Unlock()
	return nil
}

// inOrder queues a small frame that must not overtake what its stream has queued: FIN, RST, WANT. It does not wait.
// inline says that the caller may write it himself.
func (w *writer) inOrder(inline bool, t *turn, hdr wire.Header, p []byte) error {
	hdr.Len = len(p)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.errLocked(); err != nil {
		return err
	}
	switch {
	case t.gen != w.gen:
		w.small = append(hdr.Append(w.small), p...)
	case w.bulkLen+wire.HeaderLen+len(p) <= bulkQueue:
		w.appendBulkLocked(t, hdr, p)
	default:
		w.later = append(hdr.Append(w.later), p...)
	}
	w.asks = true
	w.kickLocked(inline)
	return nil
}

func (w *writer) errLocked() error {
	if w.err == nil && w.closing {
		return ErrClosed
	}
	return w.err
}

func (w *writer) appendBulkLocked(t *turn, hdr wire.Header, p []byte) {
	if w.bulk == nil {
		w.bulk = bulkPool.Get().(*bulkBuf)
	}
	b := hdr.Append(w.bulk.b[:headroom+w.bulkLen])
	w.bulkLen = len(append(b, p...)) - headroom
	t.gen = w.gen
}

// kickLocked makes sure that somebody writes what is queued.
func (w *writer) kickLocked(inline bool) {
	switch {
	case w.busy:
	case inline && w.lively():
		w.busy = true
		w.flushLocked(true)
	default:
		w.busy = true
		w.handed = true
		w.wake.Signal()
	}
}

// origin is where moments count from.
var origin = time.Now()

// moment is now, in nanoseconds. It is not 0, and does not care about somebody who sets the clock.
func moment() int64 { return int64(time.Since(origin)) + 1 }

// lively reports whether the peer was heard of lately.
func (w *writer) lively() bool {
	t := w.unheard.Load()
	return t == 0 || moment()-t < int64(patience)
}

// heard notes that something was received.
func (w *writer) heard() {
	if w.unheard.Load() != 0 {
		w.unheard.Store(0)
	}
	if w.unsaid.Load() != 0 {
		w.unsaid.Store(0)
	}
}

// silent is how long the peer has said nothing to what it should; 0: there is nothing.
func (w *writer) silent() time.Duration {
	if t := w.unsaid.Load(); t != 0 {
		return time.Duration(moment() - t)
	}
	return 0
}

// waitLocked waits in turn until somebody has copied the frame into the queue. It unlocks.
func (w *writer) waitLocked(st *Stream, hdr wire.Header, p []byte, cancel <-chan struct{}) error {
	t := &st.turn
	if t.ready == nil {
		t.ready = make(chan struct{}, 1)
	}
	t.hdr, t.p = hdr, p
	w.enqueueLocked(t)
	w.mu.Unlock()
	if st.over() { // since it was looked at last
		w.giveUp(t)
	}
	select {
	case <-t.ready:
	case <-cancel:
		w.mu.Lock()
		if t.queued {
			w.dequeueLocked(t)
			w.mu.Unlock()
			return errTimeout
		}
		w.mu.Unlock()
		<-t.ready // it was taken, or the writer failed, just now
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if t.p == nil && t.hdr.Type == 0 { // taken
		return nil
	}
	t.p = nil
	return cmp.Or(w.errLocked(), errGivenUp)
}

// giveUp ends the wait of whoever waits in turn with the stream's frame.
func (w *writer) giveUp(t *turn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if t.queued {
		w.dequeueLocked(t)
		t.ready <- struct{}{}
	}
}

func (w *writer) enqueueLocked(t *turn) {
	t.queued, t.prev, t.next = true, w.last, nil
	if w.last == nil {
		w.first = t
	} else {
		w.last.next = t
	}
	w.last = t
}

func (w *writer) dequeueLocked(t *turn) {
	if t.prev == nil {
		w.first = t.next
	} else {
		t.prev.next = t.next
	}
	if t.next == nil {
		w.last = t.prev
	} else {
		t.next.prev = t.prev
	}
	t.queued, t.next, t.prev = false, nil, nil
}

// fillLocked copies frames of those who wait into the queue while they fit.
func (w *writer) fillLocked() {
	for t := w.first; t != nil && w.bulkLen+wire.HeaderLen+len(t.p) <= bulkQueue; t = w.first {
		w.dequeueLocked(t)
		w.appendBulkLocked(t, t.hdr, t.p)
		t.hdr, t.p = wire.Header{}, nil
		t.ready <- struct{}{}
	}
}

// flushLocked writes what is queued until nothing is left; the caller has set busy. An inline caller stops when it would
// have to write other people's bulk, or a third time, and hands over to the writer goroutine.
func (w *writer) flushLocked(inline bool) {
	for round := 0; ; round++ {
		behind, full := w.c.look()
		if w.err != nil || len(w.small) == 0 && w.bulkLen == 0 && !w.ack && !behind {
			w.busy = false
			if w.closing {
				w.wake.Signal()
			}
			return
		}
		if inline && (round == 1 && w.bulkLen > 0 || round == 2 || behind || full) {
			w.handed = true
			w.wake.Signal()
			return
		}
		if behind || full {
			w.catchUpLocked(behind)
			continue
		}
		if w.ack {
			w.ack = false
			w.small = w.c.appendAck(w.small)
		}
		small, bulk, n, asks := w.small, w.bulk, w.bulkLen, w.asks
		w.small, w.spare, w.bulk, w.bulkLen, w.asks = append(w.spare[:0], w.later...), nil, nil, 0, len(w.later) > 0
		w.later = w.later[:0]
		w.gen++
		w.fillLocked()
		w.mu.Unlock()
		w.writing(asks || n > 0)
		err := w.transmit(small, bulk, n)
		if bulk != nil {
			bulkPool.Put(bulk)
		}
		w.mu.Lock()
		if cap(small) <= smallQueue+headroom {
			w.spare = small[:0]
		}
		w.failedLocked(err)
	}
}

// failedLocked ends the writer if there is an error. It unlocks meanwhile.
func (w *writer) failedLocked(err error) {
	if err != nil {
		w.failLocked(err)
		w.mu.Unlock()
		w.failed(err)
		w.mu.Lock()
	}
}

// catchUpLocked does one thing before anything new may be sent: it sends again what the last connection lost, or waits, as for
// a full transport, until the peer acknowledges. An ACK does not wait: two ends may wait for each other's. Only the writer
// goroutine calls it.
func (w *writer) catchUpLocked(behind bool) {
	if !behind && !w.ack {
		w.wake.Wait()
		return
	}
	var ack []byte
	if !behind {
		w.ack = false
		ack = w.c.appendAck(nil)
	}
	w.mu.Unlock()
	var err error
	if behind {
		err = w.c.resend()
	} else {
		err = w.c.write(ack)
	}
	w.mu.Lock()
	w.failedLocked(err)
}

// acknowledge has the peer told what was received.
func (w *writer) acknowledge() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ack || w.err != nil || w.closing {
		return
	}
	w.ack = true
	w.awakeLocked()
}

// resume goes on after another connection was attached.
func (w *writer) resume() {
	w.heard()
	w.awake()
}

// awake has the writer goroutine look again.
func (w *writer) awake() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.awakeLocked()
}

func (w *writer) awakeLocked() {
	if !w.busy {
		w.busy, w.handed = true, true
	}
	w.wake.Signal()
}

// writing notes when a write begins; asks says that the peer will say something to it.
func (w *writer) writing(asks bool) {
	if w.unheard.Load() != 0 && (!asks || w.unsaid.Load() != 0) {
		return
	}
	now := moment()
	w.unheard.CompareAndSwap(0, now)
	if asks {
		w.unsaid.CompareAndSwap(0, now)
	}
}

// transmit writes small and then the first n bytes of bulk, in one write if it can: under TLS each write ends a record.
func (w *writer) transmit(small []byte, bulk *bulkBuf, n int) error {
	if n == 0 {
		return w.c.write(small)
	}
	from := headroom
	if len(small) <= headroom {
		from -= copy(bulk.b[headroom-len(small):], small)
	} else if err := w.c.write(small); err != nil {
		return err
	}
	return w.c.write(bulk.b[from : headroom+n])
}

func (w *writer) failLocked(err error) {
	if w.err == nil {
		w.err = err
	}
	for t := w.first; t != nil; t = w.first {
		w.dequeueLocked(t)
		t.ready <- struct{}{}
	}
	w.wake.Broadcast()
}

// fail ends the writer: all that wait get err.
func (w *writer) fail(err error) {
	w.mu.Lock()
	w.failLocked(err)
	w.mu.Unlock()
}

// finish lets nobody in any more and has the writer goroutine write what is queued, then last.
func (w *writer) finish(last []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closing || w.err != nil {
		return
	}
	w.closing = true
	w.goAway = last
	for t := w.first; t != nil; t = w.first { // their streams have ended
		w.dequeueLocked(t)
		t.ready <- struct{}{}
	}
	w.wake.Broadcast()
}

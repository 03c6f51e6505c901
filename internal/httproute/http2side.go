package httproute

import (
	"bufio"
	"bytes"
	"slices"
	"sync"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/doppel-dev/doppel/internal/flow"
)

const (
	// defaultWindow is what each window is at first (RFC 9113, section 6.9.2).
	defaultWindow = 65535
	// streamWindow is what a peer may send on a stream ahead of its destination: enough for a laptop that is far away.
	streamWindow = 256 << 10
	// connWindow is the most for a connection: 64 streams may be stuck before others are held up. ownWindow of it needs no budget.
	connWindow, ownWindow = 16 << 20, 1 << 20
	// maxWriteFrame is the longest frame that is written, whatever a peer would take.
	maxWriteFrame = 64 << 10
	// queueFull is the length of a queue at which no more content is put into it, and queueMax the one at which a peer that does not read is given up.
	queueFull, queueMax = 128 << 10, 2 << 20
)

// side is one HTTP/2 connection as its peer's other end.
type side struct {
	*frameReader
	s  flow.Stream
	on func() // called after the queue was written

	mu   sync.Mutex // of the queue, after splitter.mu
	cond sync.Cond
	// guarded by mu:
	queue   bytes.Buffer
	held    bool // nothing is written yet
	writing bool // by the writer, outside of the lock
	closed  bool
	reset   bool
	dead    bool // cannot be written to

	// guarded by splitter.mu:
	batch    *[]*side      // of the splitter; nil: nobody collects what is kicked
	w        *http2.Framer // writes into the queue
	fields   bytes.Buffer
	enc      *hpack.Encoder
	window   int64 // of the connection: what the peer takes now
	initial  int64 // of a new stream
	maxFrame uint32
	store    store // of what the peer has sent
}

func newSide(s flow.Stream, r *bufio.Reader, batch *[]*side, a *account, drained func()) *side {
	d := &side{
		batch: batch, frameReader: newFrameReader(r), s: s, on: drained, window: defaultWindow, initial: defaultWindow, maxFrame: 16 << 10,
		store: store{account: a, room: ownWindow},
	}
	d.cond.L = &d.mu
	d.w = http2.NewFramer(queueWriter{d}, nil)
	d.enc = hpack.NewEncoder(&d.fields)
	return d
}

// queueWriter puts whole frames into the queue.
type queueWriter struct{ d *side }

// Write implements io.Writer.
func (q queueWriter) Write(p []byte) (int, error) {
	d := q.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.dead && !d.closed {
		d.queue.Write(p)
	}
	if d.queue.Len() > queueMax { // floods of small frames to a peer that does not read
		d.dead = true
		d.queue = bytes.Buffer{}
		d.s.Reset()
	}
	return len(p), nil
}

func (d *side) full() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.queue.Len() >= queueFull
}

// release ends held: first is written, then what has been queued.
func (d *side) release(first func()) {
	d.mu.Lock()
	queued := bytes.Clone(d.queue.Bytes())
	d.queue.Reset()
	d.mu.Unlock()
	first()
	d.mu.Lock()
	d.queue.Write(queued)
	d.held = false
	d.mu.Unlock()
	d.kick()
}

// kick has what is queued written: at the end of the batch, or by the writer.
func (d *side) kick() {
	if b := *d.batch; b == nil {
		d.cond.Signal()
	} else if !slices.Contains(b, d) {
		*d.batch = append(b, d)
	}
}

// flush writes what is queued as far as the connection takes it now. The writer has the rest.
func (d *side) flush() {
	t, ok := d.s.(interface{ TryWrite(p []byte) (int, error) })
	d.mu.Lock()
	if !ok || d.writing || d.held || d.closed || d.dead {
		d.mu.Unlock()
		d.cond.Signal()
		return
	}
	full := d.queue.Len() >= queueFull  // somebody may wait for room
	n, _ := t.TryWrite(d.queue.Bytes()) // an error is the writer's to find
	d.queue.Next(n)
	left := d.queue.Len() > 0
	d.mu.Unlock()
	switch {
	case left:
		d.cond.Signal()
	case full:
		d.on()
	}
}

// closeLocked has the writer close the connection when all is written, or reset it now.
func (d *side) closeLocked(reset bool) {
	if d == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	if reset && !d.reset {
		d.reset = true
		d.s.Reset()
	}
	d.cond.Signal()
}

// run is the writer. It ends when the connection is closed.
func (d *side) run(failed func(error)) {
	var out bytes.Buffer
	for {
		d.mu.Lock()
		for (d.queue.Len() == 0 || d.held) && !d.closed && !d.dead {
			d.cond.Wait()
		}
		if d.dead || d.held || d.queue.Len() == 0 {
			end := !d.dead && !d.reset
			d.mu.Unlock()
			if end {
				_ = d.s.CloseWrite()
			}
			return
		}
		out, d.queue = d.queue, out
		d.writing = true
		d.mu.Unlock()
		_, err := d.s.Write(out.Bytes())
		out.Reset()
		if out.Cap() > queueFull+maxWriteFrame {
			out = bytes.Buffer{}
		}
		d.mu.Lock()
		d.writing = false
		d.dead = d.dead || err != nil
		d.mu.Unlock()
		if err != nil {
			failed(err)
			return
		}
		d.on()
	}
}

// grant gives the peer credit.
func (d *side) grant(id uint32, n int) {
	if n > 0 {
		_ = d.w.WriteWindowUpdate(id, uint32(n))
		d.kick()
	}
}

// arrived counts DATA of the peer, until passed does.
func (d *side) arrived(n int) error {
	grant, err := d.store.arrived(n)
	d.grant(0, grant)
	return err
}

func (d *side) passed(n int) { d.grant(0, d.store.passed(n)) }

func (d *side) pong(f *http2.PingFrame) {
	if !f.IsAck() {
		_ = d.w.WritePing(true, f.Data)
		d.kick()
	}
}

// writeFields writes a header list, in several frames if it is long.
func (d *side) writeFields(id uint32, list []hpack.HeaderField, end bool) {
	d.fields.Reset()
	for _, f := range list {
		_ = d.enc.WriteField(f) // into memory
	}
	b := d.fields.Bytes()
	for first := true; first || len(b) > 0; first = false {
		n := min(len(b), int(d.maxFrame))
		if first {
			_ = d.w.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: b[:n], EndStream: end, EndHeaders: n == len(b)})
		} else {
			_ = d.w.WriteContinuation(id, n == len(b), b[:n])
		}
		b = b[n:]
	}
	d.kick()
}

package httproute

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/doppel-dev/doppel/internal/flow"
)

const (
	// maxStreams is the most that a client may have open, whatever the app would allow: more than any has. What they store is bounded by the windows.
	maxStreams = 4096
	// maxWaiting bounds the bytes of heads and trailers that no origin has taken yet, which no window does. ownWaiting of it needs no budget.
	maxWaiting, ownWaiting = 8 << 20, 256 << 10
	// maxFields bounds a header list (RFC 9113, section 6.5.2).
	maxFields = 256 << 10
	// helloTimeout is how long a laptop's process may take to show that it speaks HTTP/2, before the app gets its requests.
	helloTimeout = time.Second
	// closeTimeout is how long origins may take to close when the client has.
	closeTimeout = time.Second
	readAhead    = 16 << 10
)

// splitter carries one HTTP/2 connection of a client (RFC 9113): each stream goes to the app or to a laptop, with the flow control of each
// connection its own. Header lists are encoded anew, since each connection has a compression context; fields, their order, contents and trailers
// are as they came.
//
// There is one goroutine that reads and one that writes for each connection. What they share is under one lock, and nobody blocks under it. A reader
// writes what came of its frames itself, as far as the sockets take it at once: that saves a switch to the writer on the way of each request.
type splitter struct {
	cfg    Config
	ctx    context.Context
	cancel context.CancelCauseFunc
	client *side
	wg     sync.WaitGroup

	mu sync.Mutex
	// guarded by mu:
	streams map[uint32]*stream // by the client's number
	last    uint32             // the client's latest
	ups     map[string]*origin // those that take new streams
	greeted bool               // the client has our settings
	closing bool               // the client was told to go
	closed  bool               // a while ago: what comes after last is not looked at, and the connection ends with the last stream
	leaving *time.Timer        // from the one to the other: requests are under way that the client sent before it knew
	waiting int                // bytes of the heads that wait for an origin
	account account            // of the memory that is not its own
	batch   []*side            // what has something to write, while frames are taken that came together
	sides   [4]*side           // memory for batch
}

// origin is an HTTP/2 connection to the app or to a laptop.
type origin struct {
	to string
	*side

	// guarded by splitter.mu:
	ready   bool // its settings have come: it speaks HTTP/2
	gone    bool
	next    uint32
	streams map[uint32]*stream
	waiting []*stream // not sent yet
	limit   uint32    // streams that it takes at once
}

// stream is a request with its answer.
type stream struct {
	id     uint32 // at the client
	head   fields
	waits  int  // bytes of the head, if it waits
	end    bool // the head is all of the request
	origin *origin
	upID   uint32 // at the origin; 0 until the head is sent
	up     half
	down   half
	reset  *http2.ErrCode // what the client is told when it has the whole answer
	copy   *copy1         // of the request; nil: nobody's, or ended
}

// half is one direction of a stream: what came from its source and has not gone to its destination.
type half struct {
	begun    bool // the head has been passed on: what comes next is a trailer
	pending  []byte
	trailers []hpack.HeaderField
	over     bool  // the source has ended it
	sent     bool  // the destination was told so
	window   int64 // what the destination takes now
	owed     int   // bytes to grant the source again
}

var errPeer = errors.New("HTTP/2 connection error")

// serveHTTP2 carries a connection whose preface is the next that in has. raw is what the app said if it does not speak HTTP/2.
func serveHTTP2(ctx context.Context, client flow.Stream, in *reader, cfg Config) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	h := &splitter{cfg: cfg, ctx: ctx, cancel: cancel, streams: map[uint32]*stream{}, ups: map[string]*origin{}}
	h.account = account{budget: cfg.Budget, wake: h.more}
	h.client = newSide(client, bufio.NewReaderSize(&buffered{in: in, s: client}, readAhead), &h.batch, &h.account, func() { h.drained(h.client) })
	h.client.held = true
	stop := context.AfterFunc(ctx, func() { h.client.s.Reset() })
	defer stop()
	h.mu.Lock()
	h.use(h.cfg.Rest()) // its settings are the client's
	h.mu.Unlock()
	h.wg.Go(func() { h.client.run(h.fail) })
	err := h.readClient()
	h.finish(err)
	late := time.AfterFunc(closeTimeout, func() { h.cancel(errDone) })
	h.wg.Wait()
	late.Stop()
	h.mu.Lock()
	h.account.end()
	h.mu.Unlock()
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, errDone) {
		return cause
	}
	return eofIsNil(err)
}

// buffered reads what was read ahead, then the stream.
type buffered struct {
	in *reader
	s  io.Reader
}

// Read implements io.Reader.
func (b *buffered) Read(p []byte) (int, error) {
	if q := b.in.peek(); len(q) > 0 {
		n := copy(p, q)
		b.in.discard(n)
		return n, nil
	}
	b.in.release()
	return b.s.Read(p)
}

// fail cuts everything.
func (h *splitter) fail(err error) { h.cancel(err) }

// finish ends the origins when the client has, and lets the client's writer end.
func (h *splitter) finish(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	code := http2.ErrCodeNo
	var ce http2.ConnectionError
	if errors.As(err, &ce) {
		code = http2.ErrCode(ce)
	}
	_ = h.client.w.WriteGoAway(h.last, code, nil)
	h.client.closeLocked(false)
	h.closed = true
	if h.leaving != nil {
		h.leaving.Stop()
	}
	for _, o := range h.ups {
		o.gone = true
		o.closeLocked(err != nil && !errors.Is(err, io.EOF))
	}
	for _, st := range h.streams {
		if st.copy != nil {
			st.copy.End(false)
			st.copy = nil
		}
		if st.origin != nil {
			st.origin.closeLocked(true)
		}
	}
}

// readClient takes the client's frames.
func (h *splitter) readClient() error {
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(h.client.r, preface); err != nil {
		return err
	}
	for {
		f, err := h.client.readFrame()
		h.mu.Lock()
		h.begin()
		if err == nil {
			err = h.fromClient(f)
		} else if se, ok := streamError(err); ok {
			h.resetLocked(h.streams[se.StreamID], se.StreamID, se.Code)
			err = nil
		}
		h.end(h.client, err)
		if err != nil {
			return err
		}
	}
}

// begin collects what is to be written.
func (h *splitter) begin() {
	if h.batch == nil {
		h.batch = h.sides[:0]
	}
}

// end has it written if the side has no other frame ready, and unlocks.
func (h *splitter) end(from *side, err error) {
	if err == nil && frameReady(from.r) {
		h.mu.Unlock()
		return
	}
	var batch [4]*side
	all := append(batch[:0], h.batch...)
	h.batch = nil
	h.mu.Unlock()
	for _, d := range all {
		d.flush()
	}
}

// frameReady says whether a whole frame has been read ahead, and not the first one of several that make a header list.
func frameReady(r *bufio.Reader) bool {
	if r.Buffered() < 9 {
		return false
	}
	b, _ := r.Peek(9)
	headers := b[3] == byte(http2.FrameHeaders) || b[3] == byte(http2.FrameContinuation)
	if headers && http2.Flags(b[4])&http2.FlagHeadersEndHeaders == 0 {
		return false
	}
	return r.Buffered() >= 9+int(b[0])<<16+int(b[1])<<8+int(b[2])
}

func streamError(err error) (http2.StreamError, bool) {
	var se http2.StreamError
	ok := errors.As(err, &se)
	return se, ok
}

// fromClient takes one frame.
func (h *splitter) fromClient(f *frame) error {
	st := h.streams[f.StreamID]
	unwanted := st != nil && st.reset != nil // nobody takes the rest of the request, which the client learns behind the answer
	switch f.Type {
	case http2.FrameHeaders:
		if unwanted {
			return nil
		}
		return h.requestLocked(st, f)
	case http2.FrameData:
		if err := h.client.arrived(int(f.Length)); err != nil {
			return err
		}
		if st == nil || unwanted {
			h.client.passed(int(f.Length)) // it ended while the frame was under way
			return nil
		}
		return h.takeLocked(st, &st.up, h.client, f)
	default:
	}
	switch f := f.other.(type) {
	case *http2.WindowUpdateFrame:
		if f.StreamID == 0 {
			return h.widen(h.client, f.Increment)
		}
		if st != nil {
			st.down.window += int64(f.Increment)
			h.flushDown(st)
		}
	case *http2.RSTStreamFrame:
		if st != nil {
			h.forget(st)
			if st.upID != 0 {
				_ = st.origin.w.WriteRSTStream(st.upID, f.ErrCode)
				st.origin.kick()
			}
		}
	case *http2.SettingsFrame:
		return h.settings(h.client, f, func(d int64) {
			for _, st := range h.streams {
				st.down.window += d
			}
		})
	case *http2.PingFrame:
		h.client.pong(f)
	case *http2.PushPromiseFrame:
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	return nil // GOAWAY: the client opens no more streams and closes; PRIORITY and what is unknown mean nothing
}

// requestLocked takes a request's head, or its trailers.
func (h *splitter) requestLocked(st *stream, f *frame) error {
	if st != nil {
		if !f.ended() || st.up.over {
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
		st.up.trailers, st.up.over = slices.Clone(f.fields), true
		st.copyEnds(f.fields)
		if st.upID == 0 {
			if n := f.fields.size(); h.wait(n) {
				st.waits += n
			} else {
				h.resetLocked(st, st.id, http2.ErrCodeEnhanceYourCalm)
				return nil
			}
		}
		h.flushUp(st)
		return nil
	}
	if f.StreamID%2 == 0 || f.StreamID <= h.last {
		if f.StreamID <= h.last && f.StreamID%2 == 1 {
			return nil // ended; the fields have been decoded, which is all that they are for
		}
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	if h.closed {
		return nil // the client knows that it has to ask again
	}
	h.last = f.StreamID
	switch {
	case f.truncated:
		_ = h.client.w.WriteRSTStream(f.StreamID, http2.ErrCodeEnhanceYourCalm)
		h.client.kick()
		return nil
	case len(h.streams) >= maxStreams:
		_ = h.client.w.WriteRSTStream(f.StreamID, http2.ErrCodeRefusedStream)
		h.client.kick()
		return nil
	}
	st = &stream{id: f.StreamID, head: f.fields, end: f.ended()}
	st.up.over = st.end
	st.down.window = h.client.initial
	h.streams[st.id] = st
	if h.cfg.Copy != nil {
		if st.copy = newCopy1(f.fields, st.end, h.cfg.Copy); st.end {
			st.copyEnds(nil)
		}
	}
	h.place(st, h.cfg.Pick(&f.fields))
	return nil
}

// place gives a stream to an origin.
func (h *splitter) place(st *stream, to string) {
	o := h.use(to)
	st.origin = o
	if len(o.waiting) == 0 && o.takes() {
		h.send(o, st)
		return
	}
	if st.waits == 0 {
		n := st.head.size()
		if !h.wait(n) {
			h.resetLocked(st, st.id, http2.ErrCodeRefusedStream)
			return
		}
		st.head, st.waits = slices.Clone(st.head), n
	}
	o.waiting = append(o.waiting, st)
	h.sendWaiting(o)
}

// takes reports whether a stream can be sent now.
func (o *origin) takes() bool {
	return o.ready && !o.gone && uint32(len(o.streams)) < o.limit && !o.full()
}

// use returns the origin for "to" that takes new streams, connecting if there is none.
func (h *splitter) use(to string) *origin {
	if o := h.ups[to]; o != nil {
		return o
	}
	o := &origin{to: to, next: 1, streams: map[uint32]*stream{}, limit: maxStreams}
	h.ups[to] = o
	h.wg.Go(func() { h.serveOrigin(o) })
	return o
}

// sendWaiting sends the heads of streams that wait for o.
func (h *splitter) sendWaiting(o *origin) {
	for len(o.waiting) > 0 && o.takes() {
		st := o.waiting[0]
		o.waiting = o.waiting[1:]
		h.send(o, st)
	}
}

// send sends a stream's head and what else has come of it.
func (h *splitter) send(o *origin, st *stream) {
	st.upID = o.next
	o.next += 2
	o.streams[st.upID] = st
	st.up.window = o.initial
	st.up.begun, st.up.sent = true, st.end
	if h.cfg.Sent != nil {
		h.cfg.Sent(&st.head, o.to)
	}
	o.writeFields(st.upID, st.head, st.end)
	h.taken(st)
	h.flushUp(st)
}

// wait counts n bytes more that wait for an origin, if there is memory for them.
func (h *splitter) wait(n int) bool {
	more := max(0, h.waiting+n-ownWaiting) - max(0, h.waiting-ownWaiting)
	if h.waiting+n > maxWaiting || !h.account.take(more) {
		return false
	}
	h.waiting += n
	return true
}

// taken drops a stream's head.
func (h *splitter) taken(st *stream) {
	h.account.put(max(0, h.waiting-ownWaiting) - max(0, h.waiting-st.waits-ownWaiting))
	h.waiting -= st.waits
	st.head, st.waits = nil, 0
}

// takeLocked takes DATA into one direction of a stream.
func (h *splitter) takeLocked(st *stream, d *half, from *side, f *frame) error {
	if d.over {
		return http2.ConnectionError(http2.ErrCodeStreamClosed)
	}
	padding := int(f.Length) - len(f.data)
	d.owed += padding // it is flow-controlled too (RFC 9113, section 6.1)
	from.passed(padding)
	waits := len(d.pending) > 0
	if waits {
		d.pending = append(d.pending, f.data...)
	} else {
		d.pending = f.data
	}
	d.over = f.ended()
	if len(d.pending) > streamWindow {
		return http2.ConnectionError(http2.ErrCodeFlowControl)
	}
	if d == &st.up {
		st.copy.body(f.data)
		if d.over {
			st.copyEnds(nil)
		}
		h.flushUp(st)
	} else {
		h.flushDown(st)
	}
	if !waits {
		d.pending = bytes.Clone(d.pending) // what is left
	}
	return nil
}

// flushUp moves what it can of a request to its origin.
func (h *splitter) flushUp(st *stream) {
	if st.upID == 0 {
		return
	}
	if h.move(&st.up, st.origin.side, st.upID, h.client, st.id) {
		h.ended(st)
	}
}

// flushDown moves what it can of an answer to the client.
func (h *splitter) flushDown(st *stream) {
	if h.move(&st.down, h.client, st.id, st.origin.side, st.upID) {
		h.ended(st)
	}
}

// move writes what the windows and the queue allow, and grants the source as much again. It reports whether the direction has ended with that.
func (h *splitter) move(d *half, to *side, toID uint32, from *side, fromID uint32) bool {
	for len(d.pending) > 0 && !to.full() {
		n := min(int64(len(d.pending)), d.window, to.window, int64(to.maxFrame))
		if n <= 0 {
			break
		}
		last := d.over && d.trailers == nil && int(n) == len(d.pending)
		_ = to.w.WriteData(toID, last, d.pending[:n])
		d.pending = d.pending[n:]
		d.window -= n
		to.window -= n
		d.owed += int(n)
		from.passed(int(n))
		d.sent = d.sent || last
		to.kick()
	}
	if len(d.pending) == 0 {
		d.pending = nil
	}
	if d.owed >= streamWindow/4 && !d.over {
		from.grant(fromID, d.owed)
		d.owed = 0
	}
	if d.over && !d.sent && len(d.pending) == 0 {
		d.sent = true
		if d.trailers != nil {
			to.writeFields(toID, d.trailers, true)
		} else {
			_ = to.w.WriteData(toID, true, nil)
			to.kick()
		}
	}
	return d.sent
}

// ended forgets a stream whose directions have both ended.
func (h *splitter) ended(st *stream) {
	if !st.up.sent || !st.down.sent {
		return
	}
	if st.reset != nil {
		_ = h.client.w.WriteRSTStream(st.id, *st.reset)
		h.client.kick()
	}
	h.forget(st)
}

// forget takes a stream out of the tables.
func (h *splitter) forget(st *stream) {
	delete(h.streams, st.id)
	if st.copy != nil {
		st.copy.End(false)
		st.copy = nil
	}
	o := st.origin
	h.client.passed(len(st.up.pending))
	if o.side != nil {
		o.passed(len(st.down.pending))
	}
	st.up.pending, st.down.pending = nil, nil
	if st.upID == 0 {
		h.taken(st)
		if i := slices.Index(o.waiting, st); i >= 0 {
			o.waiting = slices.Delete(o.waiting, i, i+1)
		}
	} else {
		delete(o.streams, st.upID)
		h.sendWaiting(o)
	}
	if h.ups[o.to] != o && len(o.streams)+len(o.waiting) == 0 {
		o.closeLocked(false) // it wanted to go
	}
	h.idle()
}

// idle closes a client that knows that it has to go, after its last stream.
func (h *splitter) idle() {
	if h.closed && len(h.streams) == 0 {
		h.client.closeLocked(false)
	}
}

// close takes no more streams of a client that was told to go a while ago: it knows by now, and is told which was the last.
func (h *splitter) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return
	}
	h.closed = true
	_ = h.client.w.WriteGoAway(h.last, http2.ErrCodeNo, nil)
	h.client.kick()
	h.idle()
}

// resetLocked ends a stream for both.
func (h *splitter) resetLocked(st *stream, id uint32, code http2.ErrCode) {
	_ = h.client.w.WriteRSTStream(id, code)
	h.client.kick()
	if st == nil {
		return
	}
	h.forget(st)
	if st.upID != 0 && !st.origin.gone {
		_ = st.origin.w.WriteRSTStream(st.upID, http2.ErrCodeCancel)
		st.origin.kick()
	}
}

// widen adds to a connection's window and moves what waited for it.
func (h *splitter) widen(s *side, n uint32) error {
	if s.window += int64(n); s.window > 1<<31-1 {
		return http2.ConnectionError(http2.ErrCodeFlowControl)
	}
	h.flushTo(s)
	return nil
}

// flushTo moves what waits for room in s.
func (h *splitter) flushTo(s *side) {
	for _, st := range h.streams {
		switch {
		case s == h.client:
			h.flushDown(st)
		case st.origin.side == s:
			h.flushUp(st)
		}
	}
}

// more makes room where it is wanted: others have given memory back.
func (h *splitter) more() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.client.grant(0, h.client.store.more())
	for _, st := range h.streams {
		if o := st.origin; o.side != nil {
			o.grant(0, o.store.more())
		}
	}
}

// drained is called when s has written its queue.
func (h *splitter) drained(s *side) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.flushTo(s)
	for _, o := range h.ups {
		if o.side == s {
			h.sendWaiting(o)
		}
	}
}

// settings obeys a peer's settings; delta changes the windows of its streams.
func (h *splitter) settings(s *side, f *http2.SettingsFrame, delta func(int64)) error {
	if f.IsAck() {
		return nil
	}
	err := f.ForeachSetting(func(v http2.Setting) error {
		if err := v.Valid(); err != nil {
			return err
		}
		switch v.ID {
		case http2.SettingInitialWindowSize:
			delta(int64(v.Val) - s.initial)
			s.initial = int64(v.Val)
		case http2.SettingMaxFrameSize:
			s.maxFrame = min(v.Val, maxWriteFrame)
		case http2.SettingHeaderTableSize:
			s.enc.SetMaxDynamicTableSizeLimit(min(v.Val, 4096))
		default:
		}
		return nil
	})
	if err != nil {
		return err
	}
	_ = s.w.WriteSettingsAck()
	s.kick()
	h.flushTo(s)
	return nil
}

// greet sends the client our settings, which are the app's where they say what a request may be.
func (h *splitter) greet(extra ...http2.Setting) {
	if h.greeted {
		return
	}
	h.greeted = true
	streams := http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: maxStreams}
	list := http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: maxFields}
	all := []http2.Setting{}
	for _, s := range extra {
		switch s.ID {
		case http2.SettingMaxConcurrentStreams:
			streams.Val = min(streams.Val, s.Val)
		case http2.SettingMaxHeaderListSize:
			list.Val = min(list.Val, s.Val)
		case http2.SettingEnableConnectProtocol:
			all = append(all, s)
		default:
		}
	}
	h.client.release(func() { // they come before any other frame (RFC 9113, section 3.4)
		_ = h.client.w.WriteSettings(append(all, streams, list, http2.Setting{ID: http2.SettingInitialWindowSize, Val: streamWindow})...)
	})
	h.client.grant(0, ownWindow-defaultWindow)
}

// fields is a header list as match.Head.
type fields []hpack.HeaderField

func (l fields) get(name string) string {
	for _, f := range l {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}

// size is what l takes in memory, about.
func (l fields) size() (n int) {
	for _, f := range l {
		n += int(f.Size())
	}
	return n
}

// answers says whether l is the head of an answer, and of the final one. Of its pseudo fields it is known that they are not of both kinds, each once and first.
func (l fields) answers() (final, ok bool) {
	s := l.get(":status")
	if len(s) != 3 || s[0] < '1' {
		return false, false
	}
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false, false
		}
	}
	return s[0] != '1', true
}

// Method implements match.Head.
func (l fields) Method() string { return l.get(":method") }

// Path implements match.Head.
func (l fields) Path() string {
	p, _, _ := strings.Cut(l.get(":path"), "?")
	return p
}

// Any implements match.Head. The authority is the host, and the pieces of a cookie are one value (RFC 9113, sections 8.3.1 and 8.2.3).
func (l fields) Any(name string, is func(string) bool) bool {
	if name == "cookie" {
		c, ok := l.cookie()
		return ok && is(c)
	}
	found := false
	for _, f := range l {
		if f.Name == name {
			found = true
			if is(strings.Trim(f.Value, " \t")) {
				return true
			}
		}
	}
	a := ""
	if name == "host" && !found {
		a = l.get(":authority")
	}
	return a != "" && is(a)
}

func (l fields) cookie() (value string, ok bool) {
	var all []string
	for _, f := range l {
		if f.Name == "cookie" {
			all = append(all, f.Value)
		}
	}
	return strings.Join(all, "; "), all != nil
}

func errNotHTTP2(b []byte) error { return fmt.Errorf("no HTTP/2 but %.20q: %w", b, errPeer) }

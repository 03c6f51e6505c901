package httproute

import (
	"bytes"
	"encoding/binary"
	"sync"
	"time"

	"golang.org/x/net/http2"

	"github.com/doppel-dev/doppel/internal/flow"
)

// drainPause is how long a connection whose client was told to go has had no stream before it ends: requests are under way that the client sent before it knew.
const drainPause = time.Second

// Drainer is between the two ends of an HTTP/2 connection, and passes on what they say. Drain shuts it down gracefully (RFC 9113, section 6.8), as the
// server would that need not know of it: the client is told between two frames to open no more streams, those that run go on to their end, and then
// the connection ends.
type Drainer struct {
	client, server flow.Stream

	write sync.Mutex // held while the client is written to; nobody waits for it who may not block
	// guarded by write:
	down frames
	want bool // the client is to be told
	told bool // or knows from the server

	mu sync.Mutex // after write
	// guarded by mu:
	up    frames
	open  map[uint32]struct{} // streams that the server has not ended
	last  uint32              // the latest of the client
	ended bool                // the client was told that what comes after last was not looked at
	end   *time.Timer         // of the connection, unless another stream comes
}

// NewDrainer begins with the first bytes of the server, and of the client after its preface. It is stopped when the connection has ended.
func NewDrainer(client, server flow.Stream) *Drainer { return &Drainer{client: client, server: server} }

// BeginsHTTP2 reports whether the first bytes of a client say that it speaks HTTP/2.
func BeginsHTTP2(b []byte) bool { return bytes.HasPrefix(b, []byte(http2.ClientPreface)) }

// AnswersHTTP2 reports whether the first bytes of a server may be those of HTTP/2: a frame of SETTINGS (RFC 9113, section 3.4).
func AnswersHTTP2(b []byte) bool {
	return len(b) >= frameHead && length(b)%6 == 0 && length(b) <= 16<<10 && http2.FrameType(b[3]) == http2.FrameSettings && b[4] == 0 && streamOf(b) == 0
}

// length and streamOf are what a frame's head says.
func length(head []byte) int      { return int(head[0])<<16 | int(head[1])<<8 | int(head[2]) }
func streamOf(head []byte) uint32 { return binary.BigEndian.Uint32(head[5:]) & (1<<31 - 1) }

// Stop is called when the connection has ended.
func (d *Drainer) Stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ended = true
	if d.end != nil {
		d.end.Stop()
	}
}

// Drain begins, now or after the frame that is under way. It waits for a write to the client that runs.
func (d *Drainer) Drain() error {
	d.write.Lock()
	defer d.write.Unlock()
	d.want = true
	return d.tell()
}

// tell tells the client if nothing is under way to it.
func (d *Drainer) tell() error {
	if d.told || !d.down.between() {
		return nil
	}
	d.told = true
	d.mu.Lock()
	d.idle()
	d.mu.Unlock()
	return d.goAway(1<<31 - 1)
}

func (d *Drainer) goAway(last uint32) error {
	var b bytes.Buffer
	_ = http2.NewFramer(&b, nil).WriteGoAway(last, http2.ErrCodeNo, nil)
	_, err := d.client.Write(b.Bytes())
	return err
}

// idle has the connection end in a while if no stream is open.
func (d *Drainer) idle() {
	switch {
	case len(d.open) > 0 || d.ended:
	case d.end == nil:
		d.end = time.AfterFunc(drainPause, d.finish)
	default:
		d.end.Reset(drainPause)
	}
}

// finish ends the connection if no stream is open still.
func (d *Drainer) finish() {
	d.write.Lock()
	defer d.write.Unlock()
	d.mu.Lock()
	now, last := !d.ended && len(d.open) == 0 && d.down.between(), d.last
	d.ended = d.ended || now
	d.mu.Unlock()
	if now {
		_ = d.goAway(last)        // an error is found by whoever copies
		_ = d.server.CloseWrite() // it has nothing to say, and ends too
	}
}

// fromServer looks at what the server says.
func (d *Drainer) fromServer(p []byte, stop bool) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.down.walk(p, stop, func(head []byte) {
		switch http2.FrameType(head[3]) {
		case http2.FrameHeaders, http2.FrameData:
			if !http2.Flags(head[4]).Has(http2.FlagDataEndStream) {
				return
			}
		case http2.FrameRSTStream:
		case http2.FrameGoAway:
			d.told = true
			return
		default:
			return
		}
		delete(d.open, streamOf(head))
		if d.want && d.told {
			d.idle()
		}
	})
}

// fromClient looks at what the client says. It returns false for what is nobody's any more.
func (d *Drainer) fromClient(p []byte) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.up.walk(p, false, func(head []byte) {
		switch id := streamOf(head); http2.FrameType(head[3]) {
		case http2.FrameHeaders:
			if id > d.last && !d.ended {
				if d.last = id; d.open == nil {
					d.open = map[uint32]struct{}{}
				}
				d.open[id] = struct{}{}
			}
		case http2.FrameRSTStream:
			delete(d.open, id)
		default:
		}
	})
	return !d.ended
}

// Client is the client as the server's bytes are to be written to it.
func (d *Drainer) Client() flow.Stream { return drainClient{d.client, d} }

type drainClient struct {
	flow.Stream
	d *Drainer
}

// Write implements flow.Stream.
func (c drainClient) Write(p []byte) (n int, err error) {
	d := c.d
	d.write.Lock()
	defer d.write.Unlock()
	if d.want && !d.told {
		k := d.fromServer(p, true)
		if n, err = c.Stream.Write(p[:k]); err == nil {
			err = d.tell()
		}
		if err != nil {
			return n, err
		}
		p = p[k:]
	}
	d.fromServer(p, false)
	m, err := c.Stream.Write(p)
	return n + m, err
}

// TryWrite is Write that never blocks, and may take less than all.
func (c drainClient) TryWrite(p []byte) (int, error) {
	t, ok := c.Stream.(interface{ TryWrite(p []byte) (int, error) })
	if !ok || !c.d.write.TryLock() {
		return 0, nil
	}
	defer c.d.write.Unlock()
	if c.d.want && !c.d.told {
		return 0, nil // Write knows what to do
	}
	n, err := t.TryWrite(p)
	c.d.fromServer(p[:n], false)
	return n, err
}

// Preface passes on the client's first bytes, of which BeginsHTTP2 was true.
func (d *Drainer) Preface(p []byte) error {
	if _, err := d.server.Write(p[:len(http2.ClientPreface)]); err != nil {
		return err
	}
	_, err := d.Server().Write(p[len(http2.ClientPreface):])
	return err
}

// Server is the server as the client's bytes are to be written to it.
func (d *Drainer) Server() flow.Stream { return drainServer{d.server, d} }

type drainServer struct {
	flow.Stream
	d *Drainer
}

// Write implements flow.Stream.
func (s drainServer) Write(p []byte) (int, error) {
	if !s.d.fromClient(p) {
		return len(p), nil // the client knows that it has to ask again
	}
	return s.Stream.Write(p)
}

// frames follows the frames of one direction. Of what does not begin as HTTP/2 does it sees none.
type frames struct {
	head  [frameHead]byte // of the frame that comes
	got   int             // of head
	left  int             // of the frame's payload
	lists bool            // amid a header list: nothing may come between its frames
	begun bool            // a whole head has come
	other bool            // it is not HTTP/2
}

// between reports whether another frame may come now.
func (f *frames) between() bool { return f.begun && f.got == 0 && f.left == 0 && !f.lists }

// walk looks at p: all of it, or as far as another frame may come. It calls fn with each head.
func (f *frames) walk(p []byte, stop bool, fn func(head []byte)) (n int) {
	for n < len(p) && !f.other && (!stop || !f.between()) {
		if f.left > 0 {
			k := min(f.left, len(p)-n)
			f.left -= k
			n += k
			continue
		}
		k := copy(f.head[f.got:], p[n:])
		f.got += k
		n += k
		if f.got < frameHead {
			continue
		}
		if f.other = !f.begun && !AnswersHTTP2(f.head[:]); f.other { // a client's first frame is the same
			break
		}
		f.got, f.left, f.begun = 0, length(f.head[:]), true
		switch http2.FrameType(f.head[3]) {
		case http2.FrameHeaders, http2.FramePushPromise, http2.FrameContinuation: // END_HEADERS is the same bit in all
			f.lists = !http2.Flags(f.head[4]).Has(http2.FlagHeadersEndHeaders)
		default:
		}
		fn(f.head[:])
	}
	if f.other {
		return len(p)
	}
	return n
}

// Package muxtest owns in-memory connections with delay, limited buffers and a cut, for tests of what runs over a tunnel.
package muxtest

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// ErrCut is what both ends of a link return after Cut.
var ErrCut = errors.New("link cut")

// Link is a pair of connected in-memory net.Conns.
type Link struct {
	A, B net.Conn
	ab   *pipe
	ba   *pipe
}

// Config says how a link behaves; the zero value is a link without delay that buffers 256 KiB each way.
type Config struct {
	Delay  time.Duration // one way
	Buffer int           // bytes under way in one direction before Write blocks
	Chunk  int           // the most bytes one Read returns; 0: no limit
}

// NewLink returns a link.
func NewLink(cfg Config) *Link {
	if cfg.Buffer == 0 {
		cfg.Buffer = 256 << 10
	}
	ab, ba := newPipe(cfg), newPipe(cfg)
	return &Link{A: &conn{r: ba, w: ab, name: "a"}, B: &conn{r: ab, w: ba, name: "b"}, ab: ab, ba: ba}
}

// Cut ends the link as a connection reset does: what is under way is lost.
func (l *Link) Cut() {
	l.ab.fail(ErrCut)
	l.ba.fail(ErrCut)
}

// BlackHole lets everything that is written from now on vanish; nobody is told.
func (l *Link) BlackHole() {
	l.ab.swallow()
	l.ba.swallow()
}

// Stall stops (or starts again) delivery in both directions: writers run into full buffers.
func (l *Link) Stall(on bool) {
	l.ab.stall(on)
	l.ba.stall(on)
}

// Delay changes the one-way delay of what is sent from now on.
func (l *Link) Delay(d time.Duration) {
	for _, p := range []*pipe{l.ab, l.ba} {
		p.set(func() { p.cfg.Delay = d })
	}
}

// Bytes returns how many bytes were written from A to B and from B to A.
func (l *Link) Bytes() (ab, ba int64) { return l.ab.count(), l.ba.count() }

type segment struct {
	b  []byte
	at time.Time
}

type pipe struct {
	cfg  Config
	mu   sync.Mutex
	cond *sync.Cond
	// guarded by mu:
	q       []segment
	size    int
	total   int64
	eof     bool
	err     error
	hole    bool
	stalled bool
	rdead   time.Time
	wdead   time.Time
}

func newPipe(cfg Config) *pipe {
	p := &pipe{cfg: cfg}
	p.cond = sync.NewCond(&p.mu)
	return p
}

func (p *pipe) set(f func()) {
	p.mu.Lock()
	f()
	p.cond.Broadcast()
	p.mu.Unlock()
}

func (p *pipe) fail(err error) { p.set(func() { p.err, p.q, p.size = err, nil, 0 }) }
func (p *pipe) swallow()       { p.set(func() { p.hole, p.q, p.size = true, nil, 0 }) }
func (p *pipe) stall(on bool)  { p.set(func() { p.stalled = on }) }

func (p *pipe) count() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.total
}

// wakeAt makes those that wait look again at t.
func (p *pipe) wakeAt(t time.Time) {
	time.AfterFunc(time.Until(t), func() { p.set(func() {}) })
}

func (p *pipe) write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	sent := 0
	for sent < len(b) {
		switch {
		case p.err != nil:
			return sent, p.err
		case p.eof:
			return sent, io.ErrClosedPipe
		case !p.wdead.IsZero() && !time.Now().Before(p.wdead):
			return sent, os.ErrDeadlineExceeded
		case p.hole:
			return len(b), nil
		case p.size >= p.cfg.Buffer:
			p.cond.Wait()
			continue
		}
		n := min(len(b)-sent, p.cfg.Buffer-p.size)
		p.q = append(p.q, segment{append([]byte(nil), b[sent:sent+n]...), time.Now().Add(p.cfg.Delay)})
		p.size += n
		p.total += int64(n)
		sent += n
		if p.cfg.Delay > 0 {
			p.wakeAt(p.q[len(p.q)-1].at)
		} else {
			p.cond.Broadcast()
		}
	}
	return sent, nil
}

func (p *pipe) read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.err != nil:
			return 0, p.err
		case len(p.q) > 0 && !p.stalled && !p.hole && (p.cfg.Delay == 0 || !time.Now().Before(p.q[0].at)):
			if p.cfg.Chunk > 0 && len(b) > p.cfg.Chunk {
				b = b[:p.cfg.Chunk]
			}
			n := copy(b, p.q[0].b)
			p.q[0].b = p.q[0].b[n:]
			if len(p.q[0].b) == 0 {
				p.q = p.q[1:]
			}
			p.size -= n
			p.cond.Broadcast()
			return n, nil
		case len(p.q) == 0 && p.eof && !p.hole && !p.stalled:
			return 0, io.EOF
		case !p.rdead.IsZero() && !time.Now().Before(p.rdead):
			return 0, os.ErrDeadlineExceeded
		}
		p.cond.Wait()
	}
}

type conn struct {
	r, w *pipe
	name string
	once sync.Once
}

func (c *conn) Read(b []byte) (int, error)  { return c.r.read(b) }
func (c *conn) Write(b []byte) (int, error) { return c.w.write(b) }

// CloseWrite ends the direction from this end.
func (c *conn) CloseWrite() error {
	c.w.set(func() { c.w.eof = true })
	return nil
}

func (c *conn) Close() error {
	c.once.Do(func() {
		c.w.set(func() { c.w.eof = true })
		c.r.set(func() {
			if c.r.err == nil {
				c.r.err = net.ErrClosed
			}
			c.r.q, c.r.size = nil, 0
		})
	})
	return nil
}

func (c *conn) LocalAddr() net.Addr  { return addr(c.name) }
func (c *conn) RemoteAddr() net.Addr { return addr("peer of " + c.name) }

func (c *conn) SetDeadline(t time.Time) error {
	_ = c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

func (c *conn) SetReadDeadline(t time.Time) error {
	c.r.set(func() { c.r.rdead = t })
	if !t.IsZero() {
		c.r.wakeAt(t)
	}
	return nil
}

func (c *conn) SetWriteDeadline(t time.Time) error {
	c.w.set(func() { c.w.wdead = t })
	if !t.IsZero() {
		c.w.wakeAt(t)
	}
	return nil
}

type addr string

func (addr) Network() string  { return "mem" }
func (a addr) String() string { return string(a) }

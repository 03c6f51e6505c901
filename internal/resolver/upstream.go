package resolver

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	upstreamTimeout = 5 * time.Second         // after that a client has asked again or given up (resolv.conf(5): 5 s)
	upstreamStagger = 1200 * time.Millisecond // no answer: ask the next as well
	upstreamPasses  = 2                       // how often each is asked for one query
	upstreamRetry   = 30 * time.Second        // a silent one is tried again after that
	probeTimeout    = 2 * time.Second
	maxUpstream     = 1024 // queries at once
	maxIdleConns    = 32   // sockets kept for the next queries, per upstream
	maxConnAge      = 30 * time.Second
	maxConnUses     = 64 // a new port after that: a port an attacker knows makes forging easier (RFC 5452)
)

var errNoUpstream = errors.New("no upstream resolver is known")

// forwarder passes queries to the resolvers the laptop had. Nothing of the message changes but the ID.
//
// The first upstream is asked; each one that stays silent for upstreamStagger, or fails, has the next one asked as well, and the
// first useful answer wins: a slow resolver is still listened to. Whoever failed, or was silent for all of upstreamTimeout while another
// answered, is asked last, until a copy of a later query finds it alive.
type forwarder struct {
	dial  func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error)
	stats *counters
	log   *slog.Logger
	limit chan struct{}

	ctx    context.Context // of the probes; ends with close
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup // attempts and probes

	mu     sync.Mutex
	list   []*upstream // guarded by mu; in order of preference
	closed bool        // guarded by mu
}

// upstream is one resolver; forwarder.mu guards its fields but addr.
type upstream struct {
	addr    netip.AddrPort
	idle    []*upstreamConn // the last used at the end
	gone    bool            // not in the list any more
	down    bool
	retryAt time.Time
	heard   time.Time // of its last answer, to whatever query
	probing bool
}

// upstreamConn is a UDP socket; one query has it at a time.
type upstreamConn struct {
	net.Conn
	made time.Time
	uses int
}

func newForwarder(dial func(context.Context, string, netip.AddrPort) (net.Conn, error), stats *counters, log *slog.Logger) *forwarder {
	f := &forwarder{dial: dial, stats: stats, log: log, limit: make(chan struct{}, maxUpstream)}
	f.ctx, f.cancel = context.WithCancelCause(context.Background())
	return f
}

// set replaces the list.
func (f *forwarder) set(addrs []netip.AddrPort) {
	f.mu.Lock()
	same := slices.EqualFunc(f.list, addrs, func(u *upstream, a netip.AddrPort) bool { return u.addr == a })
	var old []*upstreamConn
	if !same {
		for _, u := range f.list {
			u.gone = true
			old = append(old, u.idle...)
			u.idle = nil
		}
		f.list = nil
		for _, a := range addrs {
			f.list = append(f.list, &upstream{addr: a})
		}
	}
	f.mu.Unlock()
	closeAll(old)
}

// close ends all attempts and waits for them.
func (f *forwarder) close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.cancel(errClosed)
	f.set(nil)
	f.wg.Wait()
}

func (f *forwarder) serve(ctx context.Context, q *query) ([]byte, error) {
	select {
	case f.limit <- struct{}{}:
		defer func() { <-f.limit }()
	default:
		return nil, errBusy
	}
	ctx, cancel := context.WithTimeout(ctx, upstreamTimeout)
	defer cancel()
	stop := context.AfterFunc(f.ctx, cancel)
	defer stop()
	order, probes := f.order()
	if len(order) == 0 {
		return nil, errNoUpstream
	}
	for _, u := range probes {
		now := time.Now()
		f.spawn(func() { f.probe(u, q, now, now.Add(probeTimeout)) })
	}
	return f.race(ctx, q, order)
}

// order returns the upstreams in the order to ask, and those to find out about.
func (f *forwarder) order() (order, probes []*upstream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var down []*upstream
	for _, u := range f.list {
		if !u.down {
			order = append(order, u)
			continue
		}
		down = append(down, u)
	}
	if len(order) > 0 {
		for _, u := range down {
			if !u.probing && time.Now().After(u.retryAt) {
				u.probing = true
				probes = append(probes, u)
			}
		}
	}
	return append(order, down...), probes
}

// spawn runs fn as a goroutine of the forwarder, unless it is closed.
func (f *forwarder) spawn(fn func()) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return false
	}
	f.wg.Go(fn)
	return true
}

func (f *forwarder) setDown(u *upstream, down bool) {
	f.mu.Lock()
	changed := u.down != down
	u.down = down
	if down {
		u.retryAt = time.Now().Add(upstreamRetry)
	}
	f.mu.Unlock()
	if changed && down {
		f.log.Warn("upstream resolver does not answer", "addr", u.addr)
	} else if changed {
		f.log.Info("upstream resolver answers again", "addr", u.addr)
	}
}

// suspect finds out, beside the queries, about an upstream that has been silent since then while another answered: a datagram may be lost,
// or one name may take long, so it has all of upstreamTimeout for any answer.
func (f *forwarder) suspect(u *upstream, q *query, since time.Time) {
	f.mu.Lock()
	begin := !u.probing && !f.closed
	u.probing = u.probing || begin
	f.mu.Unlock()
	if begin {
		f.spawn(func() { f.probe(u, q, since, since.Add(upstreamTimeout)) })
	}
}

// probe sends a copy of a query to an upstream. It is down if it answers neither that nor any other query between since and until.
func (f *forwarder) probe(u *upstream, q *query, since, until time.Time) {
	ctx, cancel := context.WithDeadline(f.ctx, until)
	defer cancel()
	_, err := f.exchange(ctx, u, q)
	f.mu.Lock()
	u.probing = false
	silent := err != nil && !u.heard.After(since)
	f.mu.Unlock()
	if f.ctx.Err() == nil {
		f.setDown(u, silent)
	}
}

// exchange asks one upstream, by TCP if the client did: an answer with TC goes to the client as it is, which then comes by TCP.
func (f *forwarder) exchange(ctx context.Context, u *upstream, q *query) ([]byte, error) {
	by := f.exchangeUDP
	if q.tcp {
		by = f.exchangeTCP
	}
	answer, err := by(ctx, u, q)
	if err == nil {
		f.mu.Lock()
		u.heard = time.Now()
		f.mu.Unlock()
	}
	return answer, err
}

func (f *forwarder) exchangeUDP(ctx context.Context, u *upstream, q *query) ([]byte, error) {
	c := f.take(u)
	reused := c != nil
	for {
		if c == nil {
			conn, err := f.dial(ctx, "udp", u.addr)
			if err != nil {
				return nil, err
			}
			c = &upstreamConn{Conn: conn, made: time.Now()}
		}
		answer, err := roundTripUDP(ctx, c, q)
		if err == nil {
			f.release(u, c)
			return answer, nil
		}
		_ = c.Close()
		if !reused || ctx.Err() != nil {
			return nil, err
		}
		f.dropIdle(u) // made before the network changed, most likely
		c, reused = nil, false
	}
}

func roundTripUDP(ctx context.Context, c net.Conn, q *query) ([]byte, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	// rand/v2 is ChaCha8 with a random seed: an outsider does not guess the ID (RFC 5452 section 4.3).
	id := uint16(rand.Uint32())
	if _, err := c.Write(withID(q.raw, id)); err != nil {
		stop()
		return nil, err
	}
	buf := buffers.Get().(*[maxMessage]byte)
	defer buffers.Put(buf)
	for {
		n, err := c.Read(buf[:])
		if err != nil {
			stop()
			return nil, err
		}
		if !q.isAnswer(buf[:n], id) {
			continue
		}
		if !stop() { // the deadline is, or will be, set: the socket is spoilt
			return nil, context.Cause(ctx)
		}
		return withID(buf[:n], binary.BigEndian.Uint16(q.raw)), nil
	}
}

func (f *forwarder) exchangeTCP(ctx context.Context, u *upstream, q *query) ([]byte, error) {
	c, err := f.dial(ctx, "tcp", u.addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	id := uint16(rand.Uint32())
	if err := writeTCP(c, withID(q.raw, id)); err != nil {
		return nil, err
	}
	answer, err := readTCP(c)
	if err != nil {
		return nil, err
	}
	if !q.isAnswer(answer, id) {
		return nil, errors.New("the answer does not fit the question")
	}
	binary.BigEndian.PutUint16(answer, binary.BigEndian.Uint16(q.raw))
	return answer, nil
}

// take gives the most recently used idle socket, or nil.
func (f *forwarder) take(u *upstream) *upstreamConn {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := len(u.idle) - 1
	if n < 0 || time.Since(u.idle[n].made) >= maxConnAge {
		return nil
	}
	c := u.idle[n]
	u.idle = u.idle[:n]
	return c
}

// release keeps a socket for the next query, or closes it.
func (f *forwarder) release(u *upstream, c *upstreamConn) {
	f.mu.Lock()
	c.uses++
	keep := !u.gone && !f.closed && len(u.idle) < maxIdleConns && c.uses < maxConnUses && time.Since(c.made) < maxConnAge
	if keep {
		u.idle = append(u.idle, c)
	}
	f.mu.Unlock()
	if !keep {
		_ = c.Close()
	}
}

func (f *forwarder) dropIdle(u *upstream) {
	f.mu.Lock()
	old := u.idle
	u.idle = nil
	f.mu.Unlock()
	closeAll(old)
}

// sweep closes sockets that nobody used for long, until ctx ends.
func (f *forwarder) sweep(ctx context.Context) error {
	tick := time.NewTicker(maxConnAge / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		var old []*upstreamConn
		f.mu.Lock()
		for _, u := range f.list {
			u.idle = slices.DeleteFunc(u.idle, func(c *upstreamConn) bool {
				expired := time.Since(c.made) >= maxConnAge
				if expired {
					old = append(old, c)
				}
				return expired
			})
		}
		f.mu.Unlock()
		closeAll(old)
	}
}

func closeAll(conns []*upstreamConn) {
	for _, c := range conns {
		_ = c.Close()
	}
}

var buffers = sync.Pool{New: func() any { return new([maxMessage]byte) }}

// withID returns a copy of msg with another ID.
func withID(msg []byte, id uint16) []byte {
	out := append(make([]byte, 0, len(msg)), msg...)
	binary.BigEndian.PutUint16(out, id)
	return out
}

// writeTCP writes one message with its length (RFC 1035 section 4.2.2) in one write (RFC 7766 section 8).
func writeTCP(w io.Writer, msg []byte) error {
	if len(msg) > maxMessage {
		return errors.New("message too long")
	}
	buf := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(msg)), uint16(len(msg)))
	_, err := w.Write(append(buf, msg...))
	return err
}

func readTCP(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	msg := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(r, msg)
	return msg, err
}

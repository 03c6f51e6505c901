package httproute

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/net/http2"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/match"
)

// conn is one connection of a client with the connections that its requests go to.
//
// One goroutine reads requests (serve), and one for each upstream reads its answers. Requests go to one upstream at a time, the active one. Another
// becomes active when the last one has answered all it owes, so that answers keep the order of the requests (RFC 9112, section 9.3.2), and only
// the active one's answers reach the client.
type conn struct {
	cfg    Config
	ctx    context.Context
	client flow.Stream
	in     reader // used by serve only
	wg     sync.WaitGroup

	mu   sync.Mutex
	cond sync.Cond // something below has changed
	// guarded by mu:
	ups     map[string]*upstream
	opening map[string]bool // connections that are being made
	active  *upstream
	begun   bool  // a request was sent on
	sending bool  // one is being sent on
	gone    bool  // the app, for good
	ended   bool  // the client was told the end: nothing can be answered any more
	over    bool  // no more requests are read
	err     error // why everything was reset
}

// upstream is a connection to the app or to a laptop.
type upstream struct {
	to string
	s  flow.Stream

	// guarded by conn.mu:
	owed   []exchange // requests that are not answered
	mode   mode
	closes bool // its last answer ends the connection
	ended  bool // its side has ended
	lost   bool // nothing can be sent to it any more
}

// exchange is a request that waits for its answer.
type exchange struct {
	method   string
	switches bool // asks for another protocol
	closes   bool // asks for the end of the connection
	unsent   bool // its body waits for 100 Continue, and nothing of it has come
}

// mode is what the bytes of an upstream's connection are.
type mode int

const (
	http1    mode = iota
	raw           // another protocol, by agreement or because the server spoke first: bytes pass both ways as they are
	unending      // an answer whose end cannot be known: it may be read to the end of the connection, and no request comes behind it
)

// errDone ends serve without ending what is under way.
var errDone = errors.New("no more requests")

func newConn(ctx context.Context, client flow.Stream, cfg Config) *conn {
	c := &conn{cfg: cfg, ctx: ctx, client: client, in: reader{src: client}, ups: map[string]*upstream{}, opening: map[string]bool{}}
	c.cond.L = &c.mu
	c.in.unread(cfg.Came)
	return c
}

// finish notes that no more requests are read, and waits for the answers.
func (c *conn) finish() {
	c.mu.Lock()
	c.over = true
	c.mu.Unlock()
	c.wg.Wait()
}

// fail resets everything, once.
func (c *conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	c.client.Reset()
	for _, u := range c.ups {
		u.s.Reset()
	}
	c.cond.Broadcast()
}

// close closes what is open when all goroutines have ended.
func (c *conn) close() error {
	c.in.drop()
	for _, u := range c.ups {
		_ = u.s.Close()
	}
	_ = c.client.Close()
	c.mu.Lock() // the context may be ending
	defer c.mu.Unlock()
	return c.err
}

// appGone notes that no new connection to the app can be had.
func (c *conn) appGone() {
	c.mu.Lock()
	c.gone = true
	ends := c.leave()
	c.mu.Unlock()
	closeWrite(ends)
}

// leave tells the client the end if the app is gone and a laptop owes nothing: the app's own FIN was not passed on, since it was not the active one.
// It returns what is to be ended, without the lock: to write may take its time.
func (c *conn) leave() []flow.Stream {
	a, app := c.active, c.ups[App]
	switch {
	case !c.gone || c.ended || c.err != nil || c.sending || len(c.opening) > 0:
		return nil
	case a == nil || a.to == App || a.mode != http1 || len(a.owed) > 0 || a.closes:
		return nil
	case app != nil && !app.ended:
		return nil
	}
	c.ended = true
	ends := []flow.Stream{c.client}
	for _, u := range c.ups {
		if !u.ended { // it has nothing to say, and ends too
			ends = append(ends, u.s)
		}
	}
	c.cond.Broadcast()
	return ends
}

func closeWrite(all []flow.Stream) {
	for _, s := range all {
		_ = s.CloseWrite() // whoever reads finds an error
	}
}

// sent notes that a request has been sent, or given up.
func (c *conn) sent() {
	c.mu.Lock()
	c.sending = false
	ends := c.leave()
	c.mu.Unlock()
	closeWrite(ends)
}

// openEarly connects to the app of a client that says nothing.
func (c *conn) openEarly() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.active != nil || c.err != nil || c.begun || c.over {
		return
	}
	c.wg.Add(1)
	defer c.wg.Done()
	u, err := c.openLocked(c.cfg.Rest())
	if err == nil && c.active == nil && !c.begun {
		c.active = u
	} // an error shows when there is something to send
}

// serve reads requests until the client has ended.
func (c *conn) serve() error {
	var head requestHead
	for {
		n, err := c.nextHead()
		if err == nil {
			err = head.parse(c.in.peek()[:n])
		}
		if err == nil {
			err = c.request(&head)
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			return c.clientEnded()
		case errors.Is(err, errOdd):
			return c.passRest()
		case errors.Is(err, errHTTP2):
			return c.serveHTTP2()
		default:
			return err
		}
	}
}

// nextHead reads until a whole head is in the buffer, and returns its length. io.EOF means that the client has ended between two requests.
func (c *conn) nextHead() (int, error) {
	var scan headScanner
	for {
		if b := c.in.peek(); len(b) > 0 {
			switch n, err := scan.scan(b); {
			case errors.Is(err, errOdd) && c.fresh() && hasPreface(b):
				if len(b) >= len(http2.ClientPreface) {
					return 0, errHTTP2
				}
			case n > 0 || err != nil:
				return n, err
			}
		}
		c.in.release() // an idle connection holds little
		if err := c.in.more(); err != nil {
			if errors.Is(err, io.EOF) && len(c.in.peek()) > 0 {
				return 0, errOdd // what is there of a head is the app's to judge
			}
			return 0, err
		}
		if c.activeMode() != http1 {
			return 0, errOdd
		}
	}
}

var errHTTP2 = errors.New("HTTP/2")

// hasPreface reports whether b begins as an HTTP/2 connection does, as far as it goes (RFC 9113, section 3.4).
func hasPreface(b []byte) bool {
	return string(b[:min(len(b), len(http2.ClientPreface))]) == http2.ClientPreface[:min(len(b), len(http2.ClientPreface))]
}

// fresh says that nothing has been sent on yet.
func (c *conn) fresh() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.begun && (c.active == nil || c.active.mode == http1)
}

// serveHTTP2 carries the connection from its preface on. A connection to the app that was opened meanwhile is not needed.
func (c *conn) serveHTTP2() error {
	c.mu.Lock()
	c.begun = true
	c.active = nil
	for _, u := range c.ups {
		_ = u.s.Close()
	}
	c.mu.Unlock()
	return serveHTTP2(c.ctx, c.client, &c.in, c.cfg)
}

func (c *conn) activeMode() mode {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.active == nil {
		return http1
	}
	return c.active.mode
}

// request sends one request to where it belongs.
func (c *conn) request(h *requestHead) error {
	u, err := c.activate(c.cfg.Pick(h))
	if err != nil {
		return err
	}
	bodyCame := len(c.in.peek()) > len(h.raw)
	ex := exchange{method: h.method, switches: h.switches, closes: h.closes, unsent: h.expect && (h.chunked || h.length > 0) && !bodyCame}
	if err := c.owe(u, ex); err != nil {
		return err
	}
	defer c.sent()
	if c.cfg.Sent != nil {
		c.cfg.Sent(h, u.to)
	}
	dst, end := c.copied(u, h)
	err = c.send(u, dst, h)
	end(err == nil)
	if err != nil {
		return err
	}
	if ex.switches { // whether what follows is HTTP depends on the answer
		c.settle(u)
	}
	return nil
}

// copied is where a request is written to: its upstream, and besides whoever gets a copy, who is told the end.
func (c *conn) copied(u *upstream, h match.Head) (dst flow.Stream, end func(whole bool)) {
	if c.cfg.Copy != nil {
		if cp := c.cfg.Copy(h, false); cp != nil {
			return &copying{u.s, cp}, cp.End
		}
	}
	return u.s, func(bool) {}
}

// copying is a stream whose bytes are copied when they have been written.
type copying struct {
	flow.Stream
	cp Copy
}

// Write implements io.Writer.
func (s *copying) Write(p []byte) (int, error) {
	n, err := s.Stream.Write(p)
	s.cp.Write(p[:n])
	return n, err
}

// send writes a request.
func (c *conn) send(u *upstream, dst flow.Stream, h *requestHead) error {
	length, chunked, lead := h.length, h.chunked, len(h.raw)
	if h.offers {
		if _, err := dst.Write(h.unoffered()); err != nil {
			return c.lost(u, err)
		}
		c.in.discard(lead)
		lead = 0
	}
	if chunked {
		return c.sendChunked(u, dst, lead)
	}
	return c.sendSized(u, dst, lead, length)
}

// activate makes the upstream for "to" the one that requests go to. If a laptop does not take the flow it is the app.
func (c *conn) activate(to string) (*upstream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		a := c.active
		switch {
		case c.err != nil:
			return nil, c.err
		case c.ended:
			return nil, errDone
		case a == nil:
		case a.mode != http1:
			return nil, errOdd
		case a.to == to && !a.ended:
			return a, nil
		case len(a.owed) > 0:
			c.cond.Wait() // answers keep the order of the requests
			continue
		}
		break
	}
	u, err := c.openLocked(to)
	if err != nil {
		return nil, err
	}
	if a := c.active; a != nil && a != u && a.mode != http1 { // the server has begun to speak meanwhile
		return nil, errOdd
	}
	c.active = u
	return u, nil
}

// openLocked returns the upstream for "to", connecting first if there is none. It unlocks meanwhile.
func (c *conn) openLocked(to string) (*upstream, error) {
	for c.opening[to] {
		c.cond.Wait()
	}
	if u := c.ups[to]; u != nil && !u.ended {
		return u, nil
	}
	c.opening[to] = true
	c.mu.Unlock()
	s, err := c.cfg.Open(c.ctx, to)
	c.mu.Lock()
	delete(c.opening, to)
	c.cond.Broadcast()
	switch {
	case err != nil && to != App && c.ctx.Err() == nil:
		return c.openLocked(App)
	case err != nil:
		return nil, err
	case c.err != nil:
		s.Reset()
		return nil, c.err
	}
	u := &upstream{to: to, s: s}
	c.ups[to] = u
	c.wg.Go(func() { c.answers(u) })
	return u, nil
}

// owe notes that u owes an answer, unless it has left HTTP.
func (c *conn) owe(u *upstream, ex exchange) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case u.mode != http1:
		return errOdd
	case c.ended:
		return errDone
	}
	c.begun, c.sending = true, true
	u.owed = append(u.owed, ex)
	return nil
}

// settle waits until u has answered everything.
func (c *conn) settle(u *upstream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(u.owed) > 0 && u.mode == http1 && !u.ended && c.err == nil {
		c.cond.Wait()
	}
}

// lost is what a failed write to u means: its goroutine knows better why, and may still have an answer to pass on.
func (c *conn) lost(u *upstream, err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	u.lost = true
	for !u.ended && c.err == nil {
		c.cond.Wait()
	}
	if c.ended {
		return errDone
	}
	return err
}

// unsent is what the error of a copy to u means, which may be of either end.
func (c *conn) unsent(u *upstream, err error) error {
	if err != nil && flow.Over(u.s) {
		return c.lost(u, err)
	}
	return err
}

// sendSized passes on a head of lead bytes and the n bytes of a body: what is there in one piece.
func (c *conn) sendSized(u *upstream, dst flow.Stream, lead int, n int64) error {
	for {
		k := min(n, int64(len(c.in.peek())-lead))
		lead += int(k)
		if _, err := dst.Write(c.in.peek()[:lead]); err != nil {
			return c.lost(u, err)
		}
		c.in.discard(lead)
		lead = 0
		if n -= k; n == 0 {
			return nil
		}
		if k > 0 {
			c.in.release()
			return c.unsent(u, flow.CopyN(dst, c.client, n))
		}
		if err := c.moreBody(u); err != nil {
			return err
		}
	}
}

// sendChunked passes on a head of lead bytes and a body in the chunked coding.
func (c *conn) sendChunked(u *upstream, dst flow.Stream, lead int) error {
	var scan chunkScanner
	for {
		n, done, err := scan.scan(c.in.peek()[lead:])
		if _, werr := dst.Write(c.in.peek()[:lead+n]); werr != nil {
			return c.lost(u, werr)
		}
		c.in.discard(lead + n)
		lead = 0
		switch {
		case err != nil && u.to == App:
			c.setMode(u, raw) // the app judges it, as it would without us
			return err
		case err != nil:
			return fmt.Errorf("body for an intercept: %v", err) //nolint:errorlint // nothing more is passed on: it may hold anybody's requests
		case done:
			return nil
		}
		if err := c.moreBody(u); err != nil {
			return err
		}
	}
}

// moreBody reads more of a body. A client that waits for 100 Continue and got another answer may send its next request instead of the body: then nobody
// knows what the bytes are (errOdd). If some came before that answer was passed on, they are the body.
func (c *conn) moreBody(u *upstream) error {
	err := c.in.more()
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	if err == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		if u.mode != http1 {
			return errOdd
		}
		if n := len(u.owed); n > 0 {
			u.owed[n-1].unsent = false
		}
	}
	return err
}

func (c *conn) setMode(u *upstream, m mode) {
	c.mu.Lock()
	u.mode = m
	c.cond.Broadcast()
	c.mu.Unlock()
}

// passRest passes on all that comes from now on as it is. Bytes of another protocol follow the request that asked for it, and bytes that were never HTTP go
// to whoever gets the rest. But what nobody understood after some requests is trusted to the app alone: in a connection that several clients
// share, requests of others may be in it.
func (c *conn) passRest() error {
	u, err := c.forRest()
	if err != nil {
		return err
	}
	if b := c.in.peek(); len(b) > 0 {
		c.mu.Lock()
		begun := c.begun
		c.mu.Unlock()
		if c.cfg.Odd != nil && !begun {
			c.cfg.Odd(b)
		}
		if c.cfg.Sent != nil && !begun {
			c.cfg.Sent(nil, u.to)
		}
		if _, err := u.s.Write(b); err != nil {
			return c.lost(u, err)
		}
		c.in.discard(len(b))
	}
	c.in.release()
	if _, err := flow.Copy(u.s, c.client); err != nil {
		return c.unsent(u, err)
	}
	return c.clientEnded()
}

// forRest is the upstream for bytes that are not understood. It is in mode raw.
func (c *conn) forRest() (*upstream, error) {
	c.mu.Lock()
	u, to := c.active, App
	if !c.begun {
		to = c.cfg.Rest()
	}
	switch {
	case u == nil || u.mode == http1:
	case u.mode == raw || u.to == App:
		c.mu.Unlock()
		return u, nil
	default: // an answer without end of a laptop: it may go on, but gets nothing more
		c.mu.Unlock()
		return nil, errDone
	}
	c.mu.Unlock()
	u, err := c.activate(to)
	if errors.Is(err, errOdd) { // it left HTTP just now
		return c.forRest()
	}
	if err != nil {
		return nil, err
	}
	if u.to != App && to == App {
		return nil, errDone
	}
	c.setMode(u, raw)
	return u, nil
}

// clientEnded passes the client's FIN on; what is owed is still answered.
func (c *conn) clientEnded() error {
	c.mu.Lock()
	for _, u := range c.ups {
		if u != c.active {
			_ = u.s.Close()
		}
	}
	u := c.active
	if u == nil || u.ended {
		c.mu.Unlock()
		return nil
	}
	err := u.s.CloseWrite()
	c.mu.Unlock()
	if err != nil {
		_ = c.lost(u, err)
	}
	return nil
}

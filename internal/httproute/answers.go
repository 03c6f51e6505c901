package httproute

import (
	"errors"
	"io"
	"syscall"

	"github.com/doppel-dev/doppel/internal/flow"
)

// answers passes on what an upstream says until it ends.
func (c *conn) answers(u *upstream) {
	in := reader{src: u.s}
	err := c.readAnswers(u, &in)
	in.drop()
	c.mu.Lock()
	u.ended = true
	if err == nil && u.lost { // no end in order: the reset showed in a write (flow.Over)
		err = syscall.ECONNRESET
	}
	quiet := c.active != u || len(u.owed) == 0 && u.mode == http1 && u.to != App && (err != nil || !u.closes)
	c.ended = c.ended || !quiet
	ends := c.leave()
	c.cond.Broadcast()
	c.mu.Unlock()
	closeWrite(ends)
	switch {
	case quiet: // idle, and nobody waits for it: the next request finds another way
		u.s.Reset()
	case err != nil:
		c.fail(err)
	default: // its FIN is the client's
		if err := c.client.CloseWrite(); err != nil {
			c.fail(err)
		}
	}
}

// readAnswers returns nil at the upstream's FIN.
func (c *conn) readAnswers(u *upstream, in *reader) error {
	for {
		if len(in.peek()) == 0 {
			in.release()
			if err := in.more(); err != nil {
				return eofIsNil(err)
			}
		}
		ex, ok := c.oldest(u)
		if !ok {
			return c.unasked(u, in)
		}
		if done, err := c.answer(u, in, ex); done || err != nil {
			return err
		}
	}
}

// oldest returns the exchange that u has to answer next.
func (c *conn) oldest(u *upstream) (exchange, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(u.owed) == 0 || u.mode == raw {
		return exchange{}, false
	}
	return u.owed[0], true
}

var errUnasked = errors.New("bytes that nobody asked for")

// unasked passes on what comes without a request: the server speaks first, or says why it closes. If another upstream is the active one it is lost.
func (c *conn) unasked(u *upstream, in *reader) error {
	c.mu.Lock()
	mine := c.active == u
	if mine && u.mode == http1 {
		u.mode = raw
		if c.begun {
			u.mode = unending
		}
		c.cond.Broadcast()
	}
	c.mu.Unlock()
	if !mine {
		return errUnasked
	}
	return c.passOn(u, in)
}

// answer passes on one answer, or a provisional one. done says that the upstream has ended in order.
func (c *conn) answer(u *upstream, in *reader, ex exchange) (done bool, err error) {
	h, n, err := parseResponse(in.peek(), ex.method)
	for n == 0 && err == nil {
		if err := in.more(); err != nil {
			if errors.Is(err, io.EOF) { // an end in the middle of a head is the client's to judge
				_, err = c.client.Write(in.peek())
			}
			return true, err
		}
		h, n, err = parseResponse(in.peek(), ex.method)
	}
	switches := err == nil && ex.switches && (h.status == 101 || ex.method == "CONNECT" && h.status/100 == 2)
	switch {
	case switches:
		c.setMode(u, raw)
		return true, c.passOn(u, in)
	case err != nil, h.status == 101, h.body == untilClose:
		c.setMode(u, unending)
		return true, c.passOn(u, in)
	case h.status >= 200 && ex.unsent:
		c.early(u)
	}
	if h.body == chunkBody {
		err = c.passChunked(in, n)
	} else {
		err = c.passSized(in, n, h.length)
	}
	if err == nil && h.status < 200 {
		return false, nil
	}
	switch {
	case errors.Is(err, errOdd):
		c.setMode(u, unending)
		return true, c.passOn(u, in)
	case err != nil:
		return true, err
	}
	c.paid(u, ex.closes || h.closes)
	// A laptop gets nothing more when the end of its request is not known: this was the last answer.
	return u.to != App && c.activeMode() == unending, nil
}

// paid notes that the oldest exchange of u is answered, and whether the connection ends with that.
func (c *conn) paid(u *upstream, closes bool) {
	c.mu.Lock()
	u.closes = closes
	if u.owed = u.owed[1:]; len(u.owed) == 0 {
		u.owed = nil
	}
	ends := c.leave()
	c.cond.Broadcast()
	c.mu.Unlock()
	closeWrite(ends)
}

// early notes that u is answering before anything of the oldest request's body has come, if that is so: then the request's end cannot be known.
func (c *conn) early(u *upstream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if u.owed[0].unsent {
		u.mode = unending
		c.cond.Broadcast()
	}
}

// passOn passes on everything that comes.
func (c *conn) passOn(u *upstream, in *reader) error {
	if b := in.peek(); len(b) > 0 {
		if _, err := c.client.Write(b); err != nil {
			return err
		}
		in.discard(len(b))
	}
	in.release()
	_, err := flow.Copy(c.client, u.s)
	return err
}

// passSized passes on a head of lead bytes and the n bytes of a body: what is there in one piece.
func (c *conn) passSized(in *reader, lead int, n int64) error {
	k := min(n, int64(len(in.peek())-lead))
	lead += int(k)
	if _, err := c.client.Write(in.peek()[:lead]); err != nil {
		return err
	}
	in.discard(lead)
	if n == k {
		return nil
	}
	in.release()
	return flow.CopyN(c.client, in.src.(flow.Stream), n-k)
}

// passChunked passes on a head of lead bytes and a body in the chunked coding.
func (c *conn) passChunked(in *reader, lead int) error {
	var scan chunkScanner
	for {
		n, done, err := scan.scan(in.peek()[lead:])
		if _, werr := c.client.Write(in.peek()[:lead+n]); werr != nil {
			return werr
		}
		in.discard(lead + n)
		lead = 0
		if done || err != nil {
			return err
		}
		if err := in.more(); err != nil {
			if errors.Is(err, io.EOF) {
				return io.ErrUnexpectedEOF
			}
			return err
		}
	}
}

func eofIsNil(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

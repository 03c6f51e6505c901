package httproute

import "bytes"

// maxAnswerHead is the longest head of an answer that Exchanges holds when it comes in pieces.
const maxAnswerHead = 16 << 10

// Exchanges follows the HTTP/1 exchanges of a connection that is not split by requests, and knows when it lies between two of them. What it is not sure of it
// does not follow any more: a request whose head comes in pieces, a pipeline, an answer before the whole request, another protocol. The zero value is ready.
// It is for one goroutine at a time.
type Exchanges struct {
	lost   bool
	asked  bool    // a request has come, and its answer is not whole
	some   bool    // an exchange was whole
	method string  // of the request
	asks   content // what has to come of it
	head   []byte  // of the answer, while it is not whole
	body   bool    // the answer's head was whole
	says   content
	again  int // bytes of the server that have been seen and come again
}

// content is what has still to come of a body.
type content struct {
	left    int64
	chunked bool
	scan    chunkScanner
}

// take returns what of p comes behind the body.
func (c *content) take(p []byte) (rest []byte, err error) {
	if !c.chunked {
		k := min(c.left, int64(len(p)))
		c.left -= k
		return p[k:], nil
	}
	n, done, err := c.scan.scan(p)
	c.chunked = !done
	return p[n:], err
}

func (c *content) whole() bool { return c.left == 0 && !c.chunked }

// Between says that an exchange was whole, and that no other one has begun.
func (x *Exchanges) Between() bool { return x.some && !x.lost && !x.asked && x.again == 0 }

// Amid says that an answer, or the rest of one, is to come.
func (x *Exchanges) Amid() bool { return !x.lost && x.asked }

// Resume says that the connection lies between two exchanges with another server.
func (x *Exchanges) Resume() { x.some = true }

// Asked sees what the client says.
func (x *Exchanges) Asked(p []byte) {
	if x.lost || len(p) == 0 {
		return
	}
	if !x.asked {
		var s headScanner
		var h requestHead
		n, err := s.scan(p)
		if n == 0 || err != nil || h.parse(p[:n]) != nil || h.switches || h.offers || h.closes {
			x.lost = true
			return
		}
		x.asked, x.method, x.asks = true, h.method, content{left: h.length, chunked: h.chunked}
		p = p[n:]
	}
	rest, err := x.asks.take(p)
	x.lost = err != nil || len(rest) > 0
}

// Answered sees what the server says, before it is passed on.
func (x *Exchanges) Answered(p []byte) {
	skip := min(x.again, len(p))
	x.again -= skip
	for p = p[skip:]; len(p) > 0 && !x.lost; {
		if !x.asked {
			x.lost = true
			return
		}
		p = x.answered(p)
	}
}

// answered returns what of p comes behind the answer, or behind a provisional one.
func (x *Exchanges) answered(p []byte) []byte {
	if !x.body {
		old := len(x.head)
		if old > 0 || !endsHead(p) {
			x.head = append(x.head, p...)
			if p = x.head; !endsHead(p[max(0, old-3):]) { // each byte is looked at once, however small the pieces
				if len(p) > maxAnswerHead {
					x.lost, x.head = true, nil
				}
				return nil
			}
		}
		h, n, err := parseResponse(p, x.method)
		if err != nil || n == 0 || h.status == 101 || h.body == untilClose || h.closes {
			x.lost, x.head = true, nil
			return nil
		}
		x.head, p = nil, p[n:]
		if h.status < 200 {
			return p
		}
		x.body, x.says = true, content{left: h.length, chunked: h.body == chunkBody}
	}
	rest, err := x.says.take(p)
	switch {
	case err != nil:
		x.lost = true
	case x.says.whole():
		x.lost = !x.asks.whole()
		x.asked, x.body, x.some = false, false, true
	}
	return rest
}

// endsHead says whether there is an empty line in p.
func endsHead(p []byte) bool {
	return bytes.Contains(p, []byte("\n\r\n")) || bytes.Contains(p, []byte("\n\n"))
}

// Again says that the last n bytes that Answered saw were not passed on. They come again.
func (x *Exchanges) Again(n int) { x.again += n }

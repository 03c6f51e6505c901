package preview

import (
	"bufio"
	"context"
	"errors"
	"net"
	"net/http"
	"time"
)

// slowTimeout bounds how long a visitor may take for the next piece of an answer.
const slowTimeout = time.Minute

// errSlow is why such a request was cut.
var errSlow = errors.New("the visitor does not read")

// past is a deadline that is over.
var past = time.Unix(1, 0)

// endWith ends reading from and writing to a visitor, whose connection may be hijacked meanwhile, when ctx does: what waits for a visitor knows nothing of
// contexts. stop has to be called before the request is left.
func endWith(ctx context.Context, w http.ResponseWriter) (stop func()) {
	c, done := http.NewResponseController(w), make(chan struct{})
	undo := context.AfterFunc(ctx, func() {
		defer close(done)
		_ = c.SetReadDeadline(past) // connections here have deadlines
		_ = c.SetWriteDeadline(past)
	})
	return func() {
		if !undo() {
			<-done
		}
	}
}

// slow calls cut when something takes too long to be written.
type slow struct{ timer *time.Timer }

func newSlow(cut func()) slow {
	s := slow{time.AfterFunc(slowTimeout, cut)}
	s.timer.Stop()
	return s
}

func (s slow) write(fn func() error) error {
	s.timer.Reset(slowTimeout)
	defer s.timer.Stop()
	return fn()
}

// slowConn is a hijacked connection whose writing must not take too long.
type slowConn struct {
	net.Conn
	slow slow
}

func (c *slowConn) Write(p []byte) (n int, err error) {
	err = c.slow.write(func() error { n, err = c.Conn.Write(p); return err })
	return n, err
}

// CloseWrite lets one direction end before the other.
func (c *slowConn) CloseWrite() error {
	if h, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Hijack gives a connection whose writing must not take too long either.
func (r *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(r.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	return &slowConn{c, r.slow}, rw, nil
}

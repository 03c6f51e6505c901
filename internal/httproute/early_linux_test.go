package httproute

import (
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
)

// held is a stream to which nothing can be written before the gate opens.
type held struct {
	flow.Stream
	gate chan struct{}
}

func (h *held) Write(p []byte) (int, error) {
	<-h.gate
	return h.Stream.Write(p)
}

// TestEarlyAnswer has a server answer and close with a request unread: its client gets the answer and then the reset, also when we have found first that
// nothing can be sent any more.
func TestEarlyAnswer(t *testing.T) {
	const answer = "HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno"
	for name, row := range map[string]struct{ first, then string }{
		"body":    {"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\nab", strings.Repeat("c", 1000)},
		"chunked": {"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n", strings.Repeat("3\r\nabc\r\n", 100)},
		"next":    {"GET / HTTP/1.1\r\nHost: h\r\n\r\n", "GET / HTTP/1.1\r\nHost: h\r\n\r\n"},
		"end":     {"GET / HTTP/1.1\r\nHost: h\r\n\r\n", ""},
		"no HTTP": {"hello\n", "world\n"},
	} {
		t.Run(name, func(t *testing.T) {
			w, app, front := newWorld(t), listen(t), listen(t)
			w.at(App, app.Addr().String())
			gate, done := make(chan struct{}), make(chan error, 1)
			go func() {
				c, err := front.Accept()
				if err != nil {
					done <- err
					return
				}
				done <- Serve(t.Context(), &held{flow.FromTCP(c.(*net.TCPConn)), gate}, Config{Pick: w.pick, Rest: w.whoRests, Open: w.open})
			}()
			c, err := net.Dial("tcp", front.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, _ = io.WriteString(c, row.first)
			s, err := app.Accept()
			if err != nil {
				t.Fatal(err)
			}
			_, _ = s.Read(make([]byte, 1000))
			_, _ = io.WriteString(s, answer)
			flow.FromTCP(s.(*net.TCPConn)).Reset()
			for range 3 { // the first of them may arrive before the reset
				time.Sleep(10 * time.Millisecond)
				if row.then == "" {
					_ = c.(*net.TCPConn).CloseWrite()
				} else {
					_, _ = io.WriteString(c, row.then)
				}
			}
			time.Sleep(10 * time.Millisecond)
			close(gate)
			got, err := io.ReadAll(c)
			if string(got) != answer || !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%q, %v", got, err)
			}
			if err := <-done; err == nil {
				t.Error("nobody is told of a reset")
			}
		})
	}
}

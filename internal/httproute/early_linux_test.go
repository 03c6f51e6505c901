package httproute

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

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

// late is a stream of which, after the first time, nothing is read before a write to it has failed.
type late struct {
	flow.Stream
	reads  int
	failed chan struct{}
	once   sync.Once
}

func (l *late) Over() bool { return flow.Over(l.Stream) }

func (l *late) release() { l.once.Do(func() { close(l.failed) }) }
func (l *late) Reset()   { l.Stream.Reset(); l.release() }
func (l *late) Close() error {
	l.release()
	return l.Stream.Close()
}

func (l *late) Write(p []byte) (int, error) {
	n, err := l.Stream.Write(p)
	if err != nil {
		time.AfterFunc(20*time.Millisecond, l.release) // who wrote has done what follows
	}
	return n, err
}

func (l *late) Read(p []byte) (int, error) {
	if l.reads++; l.reads > 1 {
		<-l.failed
	}
	return l.Stream.Read(p)
}

// TestEarlyAnswerHTTP2 has a server answer a request whose body it does not read, and go: the client gets the answer, also when we have found first that
// nothing can be sent any more.
func TestEarlyAnswerHTTP2(t *testing.T) {
	w := newWorld(t)
	server := rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		fr := http2.NewFramer(c, r)
		if readRequest(fr, r) != nil {
			return
		}
		var head bytes.Buffer
		_ = hpack.NewEncoder(&head).WriteField(hpack.HeaderField{Name: ":status", Value: "413"})
		_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: head.Bytes(), EndHeaders: true, EndStream: true})
		_ = fr.WriteRSTStream(1, http2.ErrCodeNo)
		_ = fr.WriteGoAway(1, http2.ErrCodeNo, nil)
		flow.FromTCP(c).Reset()
	})
	w.at(App, server)
	w.rule("lou", server)
	w.wrap = func(s flow.Stream) flow.Stream { return &late{Stream: s, failed: make(chan struct{})} }
	for _, id := range []string{"lou", ""} {
		resp, err := w.h2Client().Do(w.req(t.Context(), "POST", "/x", id, slow{}))
		if err != nil || resp.StatusCode != 413 {
			t.Errorf("%q: %v", id, err)
			continue
		}
		_ = resp.Body.Close()
	}
}

// slow is a body that comes little by little.
type slow struct{}

func (slow) Read(p []byte) (int, error) {
	time.Sleep(5 * time.Millisecond)
	return min(len(p), 100), nil
}

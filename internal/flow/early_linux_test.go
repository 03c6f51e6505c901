package flow_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/flow"
)

// TestEarlyAnswer has a server answer and close with a request unread, while its client goes on sending or ends: the client gets the answer, however slowly
// it takes it, and then the reset.
func TestEarlyAnswer(t *testing.T) {
	answer := bytes.Repeat([]byte("0123456789abcdef"), 1<<10)
	tcpServer := func(t *testing.T) (flow.Stream, flow.Stream) {
		s, b := tcp(t)
		return &raw{flow.FromTCP(s), s}, flow.FromTCP(b)
	}
	muxServer := func(t *testing.T) (flow.Stream, flow.Stream) {
		b, s := streams(t)
		return s, b
	}
	for name, server := range map[string]func(*testing.T) (s, b flow.Stream){"tcp": tcpServer, "mux": muxServer} {
		for what, more := range map[string]func(flow.Stream){
			"sends": func(c flow.Stream) { _, _ = c.Write([]byte("more")) },
			"ends":  func(c flow.Stream) { _ = c.CloseWrite() },
		} {
			t.Run(name+"/"+what, func(t *testing.T) {
				conn, a := tcp(t)
				c, gate := flow.FromTCP(conn), make(chan struct{})
				s, b := server(t)
				done := make(chan error, 1)
				go func() {
					_, _, err := flow.Relay(&held{flow.FromTCP(a), gate}, b)
					done <- err
				}()
				_, _ = c.Write([]byte("x"))
				_, _ = s.Read(make([]byte, 1))
				if _, err := s.Write(answer); err != nil {
					t.Fatal(err)
				}
				if s, ok := s.(*raw); ok {
					s.sent(t)
				}
				s.Reset()
				more(c)
				time.Sleep(20 * time.Millisecond) // the relay finds that it cannot be passed on
				close(gate)
				got, err := io.ReadAll(c)
				if !bytes.Equal(got, answer) || !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%d bytes of %d, %v", len(got), len(answer), err)
				}
				if err := <-done; err == nil {
					t.Error("the relay knows of no error")
				}
			})
		}
	}
}

// held is a stream to which nothing can be written before the gate opens.
type held struct {
	flow.Stream
	gate chan struct{}
}

func (h *held) Write(p []byte) (int, error) {
	<-h.gate
	return h.Stream.Write(p)
}

// raw is a stream with its connection.
type raw struct {
	flow.Stream
	c *net.TCPConn
}

// sent waits until the peer's kernel has what was written.
func (r *raw) sent(t *testing.T) {
	t.Helper()
	rc, err := r.c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for n := 1; n > 0; time.Sleep(time.Millisecond) {
		_ = rc.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ) })
		if err != nil {
			t.Fatal(err)
		}
	}
}

package mux

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/wire"
)

// A loss is told before another connection can be taken: told later it would end that one.
func TestDetachWaitsForLoss(t *testing.T) {
	conn, peer := net.Pipe()
	defer peer.Close()
	c := newCarrier(conn, 1<<10)
	telling, told := make(chan struct{}), make(chan struct{})
	c.lost = func(error) { close(telling); <-told }
	go c.fail(conn, errors.New("reset"))
	<-telling
	detached := make(chan bool)
	go func() {
		_, _, ok := c.detach(errReplaced)
		detached <- ok
	}()
	select {
	case <-detached:
		t.Error("detached while the loss was being told")
	case <-time.After(20 * time.Millisecond): // to see that nothing comes
	}
	close(told)
	if !<-detached {
		t.Error("not detached")
	}
}

// An acknowledgement that is read when the session has ended already is about nothing that is kept.
func TestAckAfterTheEnd(t *testing.T) {
	conn, peer := net.Pipe()
	go func() { _, _ = io.Copy(io.Discard, peer) }()
	defer peer.Close()
	c := newCarrier(conn, 1<<20)
	if err := c.write(make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	c.close(net.ErrClosed)
	if _, err := c.acked(5); err != nil {
		t.Error(err)
	}
}

// An answer that comes while its call is given up is none too many.
func TestAnswerWhileGivenUp(t *testing.T) {
	conn, peer := net.Pipe()
	go func() { _, _ = io.Copy(io.Discard, peer) }()
	defer peer.Close()
	s, err := New(conn, Config{Initiator: true, KeepAlive: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	st, err := s.newOutgoing(0)
	if err != nil {
		t.Fatal(err)
	}
	st.pending = true
	st.end(net.ErrClosed, true)
	s.mu.Lock()
	s.streams[st.id] = st // as whoever read the answer has found it before
	s.mu.Unlock()
	defer s.remove(st)
	for _, a := range []answer{{}, {err: net.ErrClosed}} {
		if err := s.onAnswer(wire.Header{Type: wire.TypeOK, Stream: st.id}, a); err != nil {
			t.Error(err)
		}
	}
}

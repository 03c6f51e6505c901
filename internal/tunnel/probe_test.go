package tunnel

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"

	"github.com/doppel-dev/doppel/internal/wire"
)

func TestProbe(t *testing.T) {
	id, err := NewIdentity("server")
	if err != nil {
		t.Fatal(err)
	}
	probe := func(peer string, serve func(net.Conn)) error {
		l, err := net.Listen("tcp", "127.0.0.1:0") // unlike a pipe it takes the alerts of both ends at once
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		a, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		b, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() { defer close(done); defer b.Close(); serve(b) }()
		err = Probe(t.Context(), a, peer)
		<-done
		return err
	}
	server := func(c net.Conn) {
		_, _, _ = Server(context.Background(), c, ServerConfig{Identity: id, Authorize: func(context.Context, wire.Hello, string) (wire.HelloReply, error) {
			t.Error("a session was asked for")
			return wire.HelloReply{}, nil
		}})
	}
	if err := probe(id.Fingerprint(), server); err != nil {
		t.Error(err)
	}
	if err := probe("somebody else", server); !errors.Is(err, ErrPin) {
		t.Errorf("another key: %v", err)
	}
	if err := probe("", func(net.Conn) {}); err == nil {
		t.Error("no fingerprint")
	}
	if err := probe(id.Fingerprint(), func(c net.Conn) { _, _ = io.ReadFull(c, make([]byte, 3)) }); err == nil {
		t.Error("a server that hangs up")
	}
}

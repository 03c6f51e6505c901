package tunnel_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// tap is a connection that somebody on the way listens to.
type tap struct {
	net.Conn
	mu          sync.Mutex
	sent, heard []byte // guarded by mu
}

func (c *tap) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.sent = append(c.sent, p...)
	c.mu.Unlock()
	return c.Conn.Write(p)
}

func (c *tap) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	c.heard = append(c.heard, p[:n]...)
	c.mu.Unlock()
	return n, err
}

// TestReplay: who has heard all of a tunnel, and says it again, is nobody to either end, and has not seen what was in it.
func TestReplay(t *testing.T) {
	server, laptop := newIdentity(t), newIdentity(t)
	var judged atomic.Int32
	cfg := tunnel.ServerConfig{Identity: server, Authorize: func(context.Context, wire.Hello, string) (wire.HelloReply, error) {
		judged.Add(1)
		return wire.HelloReply{}, nil
	}}
	hello := wire.Hello{Role: wire.RoleAgent, Token: "the-token-of-an-agent"}
	link := muxtest.NewLink(muxtest.Config{})
	tapped := &tap{Conn: link.A}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if s, _, err := tunnel.Server(t.Context(), link.B, cfg); err != nil {
			t.Error(err)
		} else {
			_ = tunnel.Serve(t.Context(), s, tunnel.Handlers{DNS: func(_ context.Context, m []byte) ([]byte, error) { return m, nil }})
		}
	}()
	s, _, err := tunnel.Client(t.Context(), tapped, tunnel.ClientConfig{Identity: laptop, Peer: server.Fingerprint(), Hello: hello})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tunnel.Query(t.Context(), s, []byte("a question of twelve")); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	<-done
	tapped.mu.Lock()
	sent, heard := slices.Clone(tapped.sent), slices.Clone(tapped.heard)
	tapped.mu.Unlock()
	if judged.Load() != 1 || bytes.Contains(sent, []byte(hello.Token)) || bytes.Contains(slices.Concat(sent, heard), []byte("a question")) {
		t.Errorf("%d tunnels, or something stands in clear", judged.Load())
	}

	// The laptop's words to the manager.
	link = muxtest.NewLink(muxtest.Config{Buffer: 1 << 20})
	_, _ = link.A.Write(sent)
	_ = link.A.(interface{ CloseWrite() error }).CloseWrite()
	if _, _, err := tunnel.Server(t.Context(), link.B, cfg); err == nil || judged.Load() != 1 {
		t.Errorf("the manager takes them: %v, judged %d times", err, judged.Load())
	}
	// The manager's words to a laptop.
	link = muxtest.NewLink(muxtest.Config{Buffer: 1 << 20})
	_, _ = link.B.Write(heard)
	_ = link.B.(interface{ CloseWrite() error }).CloseWrite()
	if _, _, err := tunnel.Client(t.Context(), link.A, tunnel.ClientConfig{Identity: laptop, Peer: server.Fingerprint(), Hello: hello}); err == nil {
		t.Error("the laptop takes them")
	}
	said, _ := io.ReadAll(link.B)
	if bytes.Contains(said, []byte(hello.Token)) {
		t.Error("it told its token")
	}
}

// TestWatchWithoutEnd: a value that never ends is given up, whoever sends it.
func TestWatchWithoutEnd(t *testing.T) {
	client, _ := newTunnel(t, tunnel.Handlers{Watch: func(_ context.Context, _ string, _ []byte, send func(any) error) error {
		return send(endless{})
	}})
	w, err := tunnel.Watch(t.Context(), client, "x", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Next(t.Context(), new(any)); !errors.Is(err, mux.ErrTooLarge) {
		t.Error(err)
	}
}

// endless is a JSON value larger than any that is taken.
type endless struct{}

func (endless) MarshalJSON() ([]byte, error) {
	return slices.Concat([]byte(`"`), bytes.Repeat([]byte("x"), 64<<20), []byte(`"`)), nil
}

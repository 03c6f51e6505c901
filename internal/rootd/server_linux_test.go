package rootd

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// running starts a root daemon, which ends with the test, and returns its socket.
func running(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "rootd.sock")
	srv, err := New(Config{UID: NoUID, Socket: socket})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return socket
}

// TestMaxConns has more connections than there may be: those beyond are told why and closed, the others go on, and one that ends makes room.
func TestMaxConns(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	socket := running(t)
	dial := func() *net.UnixConn {
		t.Helper()
		var conn net.Conn
		nettest.Poll(t, 5*time.Second, "connected", func() bool {
			c, err := net.Dial("unixpacket", socket)
			conn = c
			return err == nil
		})
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		return conn.(*net.UnixConn)
	}
	buf := make([]byte, rootapi.MaxPacket)
	ask := func(c *net.UnixConn) (rootapi.Message, error) {
		if err := rootapi.Send(c, rootapi.Message{ID: 1, Op: rootapi.OpVersion}, nil); err != nil {
			return rootapi.Message{}, err
		}
		m, _, err := rootapi.Receive(c, buf, false)
		return m, err
	}
	var conns []*net.UnixConn
	serves := func(what string) {
		t.Helper()
		for i, c := range conns {
			if m, err := ask(c); err != nil || m.Version == nil {
				t.Errorf("%s: connection %d: %+v, %v", what, i, m, err)
			}
		}
	}
	for range maxConns {
		conns = append(conns, dial())
	}
	serves("as many as may be")

	for i := range 2 * maxConns {
		c := dial()
		m, _, err := rootapi.Receive(c, buf, false) // without having asked
		if err != nil || m.Op != rootapi.OpReply || m.Error == nil || m.Error.Kind != uerr.Conflict || m.Error.Hint == "" {
			t.Fatalf("%d too many: %+v, %v", i+1, m, err)
		}
		if _, _, err := rootapi.Receive(c, buf, false); err == nil {
			t.Fatalf("%d too many: not closed", i+1)
		}
		c.Close()
	}
	serves("while others were refused")

	const gone = 3
	for _, c := range conns[:gone] {
		c.Close()
	}
	conns = conns[gone:]
	for range gone {
		nettest.Poll(t, 5*time.Second, "served in the place of one that has gone", func() bool {
			c := dial()
			m, err := ask(c)
			if err != nil || m.Version == nil {
				return false
			}
			conns = append(conns, c)
			return true
		})
	}
	serves("after some had gone")
	if m, _, err := rootapi.Receive(dial(), buf, false); err != nil || m.Error == nil || m.Error.Kind != uerr.Conflict {
		t.Errorf("one too many again: %+v, %v", m, err)
	}
}

// What is told to those for whom the network is taken can be done by them: doppel quit would end nothing.
func TestTaken(t *testing.T) {
	srv := &Server{owner: &session{peer: peer{uid: 1001, pid: 77}}, freed: make(chan struct{})}
	for _, tc := range []struct {
		asks      peer
		msg, hint string
	}{
		{peer{uid: 1001, pid: 88}, "another user daemon of yours (process 77)", "another XDG_RUNTIME_DIR), or end it with: kill 77"},
		{peer{uid: 1002, pid: 88}, "user 1001 (process 77)", "sudo kill 77"},
	} {
		e := uerr.From(srv.own(t.Context(), &session{peer: tc.asks}))
		if e == nil || e.Kind != uerr.Conflict || !strings.Contains(e.Msg, tc.msg) || !strings.Contains(e.Hint, tc.hint) || strings.Contains(e.Hint, "doppel quit") {
			t.Errorf("user %d: %+v", tc.asks.uid, e)
		}
	}
}

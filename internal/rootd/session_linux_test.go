package rootd

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/rootapi"
)

// pair are the two ends of a connection.
func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return ends[0], ends[1]
}

// fill sends pings until the other end, which does not read, takes no more.
func fill(t *testing.T, c *net.UnixConn) {
	t.Helper()
	ping, err := rootapi.Message{ID: 1, Op: rootapi.OpPing}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var full error
	err = rc.Control(func(fd uintptr) {
		for full == nil {
			_, full = unix.Write(int(fd), ping)
		}
	})
	if err != nil || !errors.Is(full, unix.EAGAIN) {
		t.Fatal(err, full)
	}
}

// An owner that does not read when the network changes is told when it reads again, once and of the last state only.
func TestToldLater(t *testing.T) {
	srv := &Server{cfg: Config{PingEvery: time.Millisecond, PingTimeout: time.Hour}, log: slog.New(slog.DiscardHandler), engine: &engine{log: slog.New(slog.DiscardHandler)}}
	ours, theirs := pair(t)
	ss := newSession(srv, ours, peer{})
	srv.owner = ss
	fill(t, ours)
	for _, mode := range []string{rootapi.DNSNone, rootapi.DNSRouted} {
		srv.engine.mu.Lock()
		srv.engine.noteLocked(rootapi.State{DNSMode: mode})
		srv.engine.mu.Unlock()
		if !ss.tell() {
			t.Error("no other state")
		}
	}

	ctx, cancel := context.WithCancel(t.Context())
	pinging := make(chan struct{})
	go func() { ss.ping(ctx); close(pinging) }()
	defer func() { ours.Close(); cancel(); <-pinging }()
	if err := theirs.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, rootapi.MaxPacket)
	var told []rootapi.State
	for after := 0; after < 20; {
		m, _, err := rootapi.Receive(theirs, buf, false)
		if err != nil {
			t.Fatalf("%v; told %+v", err, told)
		}
		if m.Op == rootapi.OpChanged {
			told = append(told, *m.State)
		}
		if len(told) > 0 {
			after++
		}
	}
	if len(told) != 1 || told[0].Seq != 2 || told[0].DNSMode != rootapi.DNSRouted {
		t.Errorf("told %+v", told)
	}
}

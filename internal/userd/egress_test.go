package userd

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// brokenConn is a connection whose network goes away once the tunnel stands.
type brokenConn struct {
	net.Conn
	broken chan struct{}
}

func (c brokenConn) Read([]byte) (int, error) {
	<-c.broken
	return 0, &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", syscall.EHOSTUNREACH)}
}

// An application hears what became of its own connection, and nothing of the tunnel's.
func TestErrorOfFlow(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	go func() {
		for buf := make([]byte, 4096); ; {
			if _, err := b.Read(buf); err != nil {
				return
			}
		}
	}()
	conn := brokenConn{a, make(chan struct{})}
	m, err := mux.New(conn, mux.Config{Initiator: true})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	done := make(chan error, 1)
	go func() {
		_, err := tunnel.DialTCP(context.WithoutCancel(t.Context()), m, netip.AddrPort{}, netip.MustParseAddrPort("10.96.0.1:80"))
		done <- err
	}()
	close(conn.broken)
	err = <-done
	if !errors.Is(err, syscall.EHOSTUNREACH) || !errors.Is(err, mux.ErrSession) {
		t.Fatalf("the tunnel's error is another one: %v", err)
	}
	if err := ofFlow(err); errors.Is(err, syscall.EHOSTUNREACH) || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("told to the application: %v", err)
	}
	for _, code := range []wire.Code{wire.CodeRefused, wire.CodeUnreachable} {
		if err := ofFlow(&mux.RejectError{Code: code}); !errors.Is(err, code.Errno()) {
			t.Errorf("not told to the application: %v", err)
		}
	}
	if ofFlow(nil) != nil {
		t.Error("an error of none")
	}
}

package mux_test

import (
	"net"
	"testing"

	"golang.org/x/net/nettest"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
)

// TestConn: a stream behaves as net.Conn's documentation says.
func TestConn(t *testing.T) {
	nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
		p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
		a, b := accepted(t, p)
		return a, b, func() { _ = p.a.Close(); _ = p.b.Close() }, nil
	})
}

// TestLinkConn: so does an in-memory link, on which the tests rely.
func TestLinkConn(t *testing.T) {
	nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
		l := muxtest.NewLink(muxtest.Config{})
		return l.A, l.B, func() { _ = l.A.Close(); _ = l.B.Close() }, nil
	})
}

package agent

import (
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/tunnel"
)

// A connection that the manager has announced is answered by the agent; any other goes where it would have gone.
func TestCanary(t *testing.T) {
	var app atomic.Int32
	w := startBefore(t, newApp(t, func(c *net.TCPConn) { app.Add(1); sayApp(c) }), true)
	s := w.mgr.up()
	ask := func(announced bool) string {
		t.Helper()
		free, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		source := free.Addr().(*net.TCPAddr)
		_ = free.Close()
		c := control.Canary{Port: control.Port{Protocol: "TCP", Number: w.cfg.Ports[0].ContainerPort}, Source: source.AddrPort(), Nonce: "nonce"}
		if announced {
			if err := tunnel.Control(t.Context(), s, control.ManagerCanary, c, nil); err != nil {
				t.Fatal(err)
			}
		}
		d := net.Dialer{LocalAddr: source}
		conn, err := d.DialContext(t.Context(), "tcp", fmt.Sprintf("127.0.0.1:%d", w.cfg.Ports[0].AgentPort))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		b := make([]byte, 100)
		n, err := io.ReadAtLeast(conn, b, 4)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	if got := ask(true); got != "nonce" {
		t.Errorf("%q", got)
	}
	if n := app.Load(); n != 0 {
		t.Errorf("the app had %d connections", n)
	}
	if got := ask(false); got != "app\n" {
		t.Errorf("%q", got)
	}
	if got := ask(true); got != "nonce" {
		t.Errorf("%q", got)
	}
}

// Datagrams that the manager has announced are answered by the agent, each of them; any other goes where it would have gone.
func TestCanaryUDP(t *testing.T) {
	w, port := startUDP(t, "127.0.0.1")
	s := w.mgr.up()
	ask := func(c net.Conn) string {
		t.Helper()
		if _, err := c.Write(nil); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(deadline))
		b := make([]byte, 100)
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	manager, other := w.client(port), w.client(port)
	c := control.Canary{Port: control.Port{Protocol: "UDP", Number: port.ContainerPort}, Source: manager.LocalAddr().(*net.UDPAddr).AddrPort(), Nonce: "nonce"}
	if err := tunnel.Control(t.Context(), s, control.ManagerCanary, c, nil); err != nil { // that is about a connection from there
		t.Fatal(err)
	}
	if got := ask(manager); got != "app:" {
		t.Errorf("%q", got)
	}
	if err := tunnel.Control(t.Context(), s, control.ManagerCanaryUDP, c, nil); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got := ask(manager); got != "nonce" {
			t.Errorf("%q", got)
		}
	}
	if got := ask(other); got != "app:" {
		t.Errorf("%q", got)
	}
}

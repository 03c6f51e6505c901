package flow_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
)

// Each client has a conversation of its own, one above the limit has none until another has ended, and all end with the socket.
func TestServeClients(t *testing.T) {
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	gone := make(chan netip.AddrPort, 3)
	go func() {
		ended <- flow.ServeClients(c, 2, func(client netip.AddrPort, p flow.Packets) {
			b := make([]byte, 100)
			for {
				n, err := p.ReadPacket(b)
				if err != nil || string(b[:n]) == "bye" {
					gone <- client
					return
				}
				if err := p.WritePacket(append([]byte(client.String()+" said "), b[:n]...)); err != nil {
					t.Error(err)
				}
			}
		})
	}()
	var clients []*net.UDPConn
	for range 3 {
		u, err := net.DialUDP("udp", nil, c.LocalAddr().(*net.UDPAddr))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = u.Close() })
		clients = append(clients, u)
	}
	say := func(i int, what string) {
		if _, err := clients[i].Write([]byte(what)); err != nil {
			t.Fatal(err)
		}
	}
	hear := func(i int, what string) {
		t.Helper()
		b := make([]byte, 100)
		_ = clients[i].SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := clients[i].Read(b)
		if want := clients[i].LocalAddr().String() + " said " + what; err != nil || string(b[:n]) != want {
			t.Fatalf("client %d heard %q, %v, not %q", i, b[:n], err, want)
		}
	}
	for _, i := range []int{0, 1, 0} {
		say(i, "hello")
		hear(i, "hello")
	}
	say(2, "too many")
	say(0, "still here")
	hear(0, "still here")
	say(1, "bye")
	if got := (<-gone).String(); got != clients[1].LocalAddr().String() {
		t.Errorf("%s ended", got)
	}
	for heard := false; !heard; { // its place is free a moment later
		say(2, "now")
		b := make([]byte, 100)
		_ = clients[2].SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		_, err := clients[2].Read(b)
		heard = err == nil
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

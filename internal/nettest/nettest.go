// Package nettest owns what tests need of the network: fresh namespaces with real interfaces, routes and nftables, ports, and waiting.
package nettest

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"
)

// Poll calls ok until it is true, at most for d; it fails the test otherwise.
func Poll(t testing.TB, d time.Duration, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatalf("not within %v: %s", d, what)
		case <-tick.C:
		}
	}
}

// SamePort listens on one port of 127.0.0.1 for both UDP and TCP, as a DNS server does, until the test ends.
func SamePort(t testing.TB) (net.PacketConn, net.Listener) {
	t.Helper()
	for range 20 { // the number that UDP got has to be free for TCP too
		pc, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if l, err := net.Listen("tcp", pc.LocalAddr().String()); err == nil {
			t.Cleanup(func() { _ = errors.Join(pc.Close(), l.Close()) })
			return pc, l
		}
		_ = pc.Close()
	}
	t.Fatal("no port is free for UDP and TCP")
	return nil, nil
}

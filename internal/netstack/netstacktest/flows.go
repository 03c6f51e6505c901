// Package netstacktest owns what tests put on either side of a netstack: flows over real sockets behind it, an application's host before it.
package netstacktest

import (
	"context"
	"net"
	"net/netip"

	"github.com/doppel-dev/doppel/internal/flow"
)

// TCP is a flow over a real connection.
type TCP struct{ *net.TCPConn }

// Reset aborts the connection with a RST.
func (c TCP) Reset() {
	_ = c.SetLinger(0) // a socket that is gone needs no RST
	c.Close()
}

// UDP is a flow over a connected socket.
type UDP struct{ *net.UDPConn }

// ReadPacket reads one datagram.
func (c UDP) ReadPacket(p []byte) (int, error) { return c.Read(p) }

// WritePacket writes one datagram.
func (c UDP) WritePacket(p []byte) error {
	_, err := c.Write(p)
	return err
}

// DialTCP returns a dialer that reaches at(dst) whatever was asked for.
func DialTCP(at func(dst netip.AddrPort) string) func(context.Context, netip.AddrPort, netip.AddrPort) (flow.Stream, error) {
	return func(ctx context.Context, _, dst netip.AddrPort) (flow.Stream, error) {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", at(dst))
		if err != nil {
			return nil, err
		}
		return TCP{c.(*net.TCPConn)}, nil
	}
}

// DialUDP returns a dialer that reaches at(dst) whatever was asked for.
func DialUDP(at func(dst netip.AddrPort) string) func(context.Context, netip.AddrPort, netip.AddrPort) (flow.Packets, error) {
	return func(ctx context.Context, _, dst netip.AddrPort) (flow.Packets, error) {
		var d net.Dialer
		c, err := d.DialContext(ctx, "udp", at(dst))
		if err != nil {
			return nil, err
		}
		return UDP{c.(*net.UDPConn)}, nil
	}
}

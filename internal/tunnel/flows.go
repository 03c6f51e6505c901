package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime/debug"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/wire"
)

const (
	// dialTimeout bounds a dial on behalf of the other end.
	dialTimeout = 20 * time.Second
	// UDPIdle ends a UDP flow without traffic: RFC 4787, REQ-5, wants no less than two minutes.
	UDPIdle = 2 * time.Minute
)

// Dialer is what ServeDial dials with; *net.Dialer is one.
type Dialer interface {
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

// ServeEcho serves a request of wire.KindEcho: it accepts, and has this machine's kernel send the pings.
func ServeEcho(req *mux.Request, hdr wire.FlowHeader) error {
	p, err := flow.DialEcho(hdr.Dst.Addr())
	if err != nil {
		return errors.Join(err, req.Reject(wire.CodeOf(err), err.Error()))
	}
	st, err := req.Accept(nil)
	if err != nil {
		return errors.Join(err, p.Close())
	}
	return flow.RelayPackets(packetStream{st}, p, UDPIdle)
}

// ServeDial serves a request of wire.KindTCP or wire.KindUDP: it dials hdr.Dst, rejects the request with the dial's error or
// accepts it, and relays until the flow has ended, whose error it returns.
func ServeDial(req *mux.Request, hdr wire.FlowHeader, d Dialer) error {
	network := "tcp"
	if kind, _ := wire.KindOf(req.Header()); kind == wire.KindUDP {
		network = "udp"
	}
	c, err := dial(req.Context(), d, network, hdr.Dst)
	if err != nil {
		return errors.Join(err, req.Reject(wire.CodeOf(err), err.Error()))
	}
	return ServeConn(req, c, nil)
}

// dial dials in a goroutine of its own: of the stack that it needs, a goroutine that is to wait for data would keep a part as long as it does.
func dial(ctx context.Context, d Dialer, network string, dst netip.AddrPort) (c net.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	failed := make(chan string)
	go func() {
		defer close(failed)
		defer func() {
			if r := recover(); r != nil {
				failed <- fmt.Sprintf("%v\n%s", r, debug.Stack())
			}
		}()
		c, err = d.DialContext(ctx, network, dst.String())
	}()
	if msg, ok := <-failed; ok {
		panic(msg) // the request's, as if there were no other goroutine
	}
	return c, err
}

// ServeConn accepts the request with a reply and relays between its stream and c, a *net.TCPConn, *net.UDPConn, flow.Stream or
// flow.Packets, which it closes.
func ServeConn(req *mux.Request, c net.Conn, reply []byte) error {
	st, err := req.Accept(reply)
	if err != nil {
		_ = c.Close()
		return err
	}
	switch c := c.(type) {
	case *net.TCPConn:
		_, _, err = flow.Relay(st, flow.FromTCP(c))
	case *net.UDPConn:
		err = flow.RelayPackets(packetStream{st}, flow.FromUDP(c), UDPIdle)
	case flow.Packets:
		err = flow.RelayPackets(packetStream{st}, c, UDPIdle)
	case flow.Stream:
		_, _, err = flow.Relay(st, c)
	default:
		_ = c.Close()
		st.ResetCode(wire.CodeInternal)
		return fmt.Errorf("cannot relay a %T", c)
	}
	return err
}

// Join relays between two streams of one flow until it has ended, whose error it returns.
func Join(proto uint8, a, b *mux.Stream) error {
	if proto == wire.ProtoUDP {
		return flow.RelayPackets(packetStream{a}, packetStream{b}, UDPIdle)
	}
	_, _, err := flow.Relay(a, b)
	return err
}

// packetStream tells the other end why a conversation ended: a port that refuses is heard of only after datagrams were sent.
type packetStream struct{ *mux.Stream }

// Abort implements flow.Aborter.
func (p packetStream) Abort(err error) { p.ResetCode(wire.CodeOf(err)) }

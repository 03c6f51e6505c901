package resolver

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/lifecycle"
)

const (
	maxTCPConns  = 256
	maxPipelined = 64               // queries of one TCP connection at once
	tcpIdle      = 10 * time.Second // RFC 7766 section 6.2.3: seconds
	tcpWrite     = 5 * time.Second
	bindAttempts = 10
	maxPause     = time.Second
)

// listener is a UDP and a TCP socket on the same port.
type listener struct {
	udp  *net.UDPConn
	tcp  *net.TCPListener
	addr netip.AddrPort
}

func (l *listener) close() {
	_ = l.udp.Close()
	_ = l.tcp.Close()
}

// bind listens on addr; with port 0 the port that TCP got must be free for UDP too, so it may take some tries.
func bind(addr netip.AddrPort) (*listener, error) {
	for try := 1; ; try++ {
		tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(addr))
		if err != nil {
			return nil, err
		}
		// The kernel does not give the zone of a link-local address back.
		both := netip.AddrPortFrom(addr.Addr(), tcp.Addr().(*net.TCPAddr).AddrPort().Port())
		udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(both))
		if err == nil {
			return &listener{udp, tcp, both}, nil
		}
		_ = tcp.Close()
		if addr.Port() != 0 || try == bindAttempts {
			return nil, err
		}
	}
}

func (s *Server) serveUDP(ctx context.Context, g *lifecycle.Group, udp *net.UDPConn) error {
	buf := make([]byte, maxMessage)
	failures := 0
	for {
		n, from, err := udp.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil { // Windows reports here that an earlier answer could not be delivered
			failures++
			s.pause(ctx, "udp", failures, err)
			continue
		}
		failures = 0
		msg := append(make([]byte, 0, n), buf[:n]...)
		g.Go("dns-query", func(ctx context.Context) error {
			if answer := s.Exchange(ctx, "udp", msg); answer != nil {
				_, _ = udp.WriteToUDPAddrPort(answer, from) // nobody to tell: the client asks again
			}
			return nil
		})
	}
}

func (s *Server) serveTCP(ctx context.Context, g *lifecycle.Group, tcp *net.TCPListener) error {
	slots := make(chan struct{}, maxTCPConns)
	failures := 0
	for {
		c, err := tcp.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil { // too many open files, for one: it passes
			failures++
			s.pause(ctx, "tcp", failures, err)
			continue
		}
		failures = 0
		select {
		case slots <- struct{}{}:
		default:
			_ = c.Close()
			continue
		}
		g.Go("dns-tcp-conn", func(ctx context.Context) error {
			defer func() { <-slots }()
			s.serveConn(ctx, g, c)
			return nil
		})
	}
}

// pause keeps a listener that fails from spinning: 1 ms after the first failure in a row, twice that after each further one.
func (s *Server) pause(ctx context.Context, network string, failures int, err error) {
	if failures == 10 {
		s.log.Warn("dns listener fails", "network", network, "err", err)
	}
	timer := time.NewTimer(min(time.Millisecond<<min(failures-1, 16), maxPause))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// serveConn answers the queries of one connection as they become ready, in any order (RFC 7766 section 6.2.1.1), and closes it
// when the client ended its side and has all answers.
func (s *Server) serveConn(ctx context.Context, g *lifecycle.Group, c net.Conn) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	var writing sync.Mutex
	var pending sync.WaitGroup
	defer pending.Wait()
	slots := make(chan struct{}, maxPipelined)
	for {
		_ = c.SetReadDeadline(time.Now().Add(tcpIdle))
		msg, err := readTCP(c)
		if err != nil {
			return
		}
		slots <- struct{}{}
		pending.Add(1)
		g.Go("dns-query", func(ctx context.Context) error {
			defer pending.Done()
			defer func() { <-slots }()
			answer := s.Exchange(ctx, "tcp", msg)
			if answer == nil {
				return nil
			}
			writing.Lock()
			defer writing.Unlock()
			_ = c.SetWriteDeadline(time.Now().Add(tcpWrite))
			if err := writeTCP(c, answer); err != nil {
				_ = c.Close()
			}
			return nil
		})
	}
}

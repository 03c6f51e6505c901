package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/httproute"
	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/wire"
)

// acceptTimeout is how long the laptop has to accept a flow before the app gets it (D3).
const acceptTimeout = time.Second

// appDialTimeout bounds the connection to the app in the same pod.
const appDialTimeout = 5 * time.Second

// port is one TCP port of the app with the agent in front of it.
type port struct {
	cfg      agentcfg.Port
	podIP    string
	listener *net.TCPListener
	probes   net.Listener
}

func (p *port) serve(ctx context.Context, a *Agent) error {
	return acceptLoop(ctx, p.listener, func(c *net.TCPConn) {
		a.active.Add(1)
		defer a.active.Add(-1)
		p.handle(ctx, a, c)
	})
}

// serveProbes answers the kubelet's probes of a redirected port: always from the app.
func (p *port) serveProbes(ctx context.Context, a *Agent) error {
	return acceptLoop(ctx, p.probes, func(c *net.TCPConn) { p.toApp(ctx, a, c) })
}

// handle gives one connection to the laptop or, if there is no intercept or the laptop does not take it in time, to the app.
// Nothing is read from the client before one of the two has accepted, so nothing can be lost on the way. If intercepts want some of the
// requests only, they are looked at one by one.
func (p *port) handle(ctx context.Context, a *Agent, c *net.TCPConn) {
	es := a.table.lookup(p.cfg.Protocol, p.cfg.ContainerPort)
	switch {
	case len(es) == 0:
		p.toApp(ctx, a, c)
	case !es[0].whole():
		p.byRequest(ctx, a, c)
	default:
		st, err := p.offer(ctx, a, c, es[0])
		if err != nil {
			p.toApp(ctx, a, c)
			return
		}
		defer context.AfterFunc(ctx, st.Reset)()
		relay(es[0].ctx, flow.FromTCP(c), st)
	}
}

// offer offers a flow to the laptop of an intercept.
func (p *port) offer(ctx context.Context, a *Agent, c *net.TCPConn, e engagement) (flow.Stream, error) {
	h := wire.InterceptHeader{Intercept: e.intercept, Proto: syscall.IPPROTO_TCP, Src: addrPort(c.RemoteAddr()), Dst: addrPort(c.LocalAddr()), Port: p.cfg.ContainerPort}
	ctx, cancel := context.WithTimeout(ctx, acceptTimeout)
	defer cancel()
	st, err := a.up.open(ctx, h)
	if err != nil {
		a.cfg.Log.Debug("laptop did not take the connection, the app gets it", "intercept", e.intercept, "err", err)
		return nil, err
	}
	return st, nil
}

// byRequest splits a connection by its HTTP requests. Each is judged by the table of its own moment.
func (p *port) byRequest(ctx context.Context, a *Agent, c *net.TCPConn) {
	find := func(want func(engagement) bool) (engagement, bool) {
		es := a.table.lookup(p.cfg.Protocol, p.cfg.ContainerPort)
		if i := slices.IndexFunc(es, want); i >= 0 {
			return es[i], true
		}
		return engagement{}, false
	}
	err := httproute.Serve(ctx, flow.FromTCP(c), httproute.Config{
		Pick: func(h match.Head) string {
			e, _ := find(func(e engagement) bool { return e.match.Match(h) })
			return e.intercept
		},
		Rest: func() string {
			e, _ := find(engagement.whole)
			return e.intercept
		},
		Open: func(ctx context.Context, to string) (flow.Stream, error) {
			if to == httproute.App {
				app, err := p.dialApp(ctx)
				if err != nil {
					return nil, err
				}
				return flow.FromTCP(app), nil
			}
			e, ok := find(func(e engagement) bool { return e.intercept == to })
			if !ok {
				return nil, errors.New("the intercept has ended")
			}
			st, err := p.offer(ctx, a, c, e)
			if err != nil {
				return nil, err
			}
			context.AfterFunc(e.ctx, st.Reset)
			return st, nil
		},
	})
	if err != nil {
		a.cfg.Log.Debug("connection cut", "port", p.cfg.ContainerPort, "err", err)
	}
}

func (p *port) toApp(ctx context.Context, a *Agent, c *net.TCPConn) {
	app, err := p.dialApp(ctx)
	if err != nil {
		a.cfg.Log.Debug("the app does not answer", "port", p.cfg.ContainerPort, "err", err)
		flow.FromTCP(c).Reset() // what a closed port looks like once the handshake is done
		return
	}
	relay(ctx, flow.FromTCP(c), flow.FromTCP(app))
}

// dialApp connects to the app where it listens: on all addresses or localhost, else on the pod's address only.
func (p *port) dialApp(ctx context.Context) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: appDialTimeout}
	c, err := d.DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", p.cfg.ContainerPort))
	if errors.Is(err, syscall.ECONNREFUSED) && p.podIP != "" {
		c, err = d.DialContext(ctx, "tcp", net.JoinHostPort(p.podIP, fmt.Sprint(p.cfg.ContainerPort)))
	}
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// relay joins two streams until both directions ended or ctx ends.
func relay(ctx context.Context, a, b flow.Stream) {
	stop := context.AfterFunc(ctx, func() { a.Reset(); b.Reset() })
	defer stop()
	_, _, _ = flow.Relay(a, b) // how a flow ended is between its two ends
}

// acceptLoop serves each connection in a goroutine of its own until ctx ends.
func acceptLoop(ctx context.Context, l net.Listener, handle func(*net.TCPConn)) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if isTemporary(err) {
				time.Sleep(10 * time.Millisecond) // out of descriptors: let some connections end
				continue
			}
			return fmt.Errorf("accept on %s: %w", l.Addr(), err)
		}
		go handle(c.(*net.TCPConn))
	}
}

func isTemporary(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ECONNABORTED) || errors.Is(err, syscall.ENOBUFS)
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/httproute"
	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/match"
	"github.com/doppel-dev/doppel/internal/mux"
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
		if a.up.canaries.swallow(p.cfg.ContainerPort, c) {
			return
		}
		a.active.Add(1)
		defer a.active.Add(-1)
		p.handle(ctx, a, c)
	})
}

// serveProbes answers the kubelet's probes of a redirected port: always from the app.
func (p *port) serveProbes(ctx context.Context, a *Agent) error {
	return acceptLoop(ctx, p.probes, func(c *net.TCPConn) { p.toApp(ctx, a, flow.FromTCP(c)) })
}

// handle gives one connection to the laptop or, if there is no intercept or the laptop does not take it in time, to the app.
// Nothing is read from the client before one of the two has accepted, so nothing can be lost on the way. If intercepts want some of the
// requests only, they are looked at one by one.
func (p *port) handle(ctx context.Context, a *Agent, c *net.TCPConn) {
	t := a.table.lookup(p.cfg.Protocol, p.cfg.ContainerPort)
	client := flow.FromTCP(c)
	stays := p.cfg.TLS != nil // plain text on a port for TLS is the app's to judge
	if whole := slices.DeleteFunc(slices.Clone(t.wiretaps), func(e engagement) bool { return !e.whole() }); len(whole) > 0 {
		var end func()
		client, end = p.tapped(ctx, a, c, whole)
		defer end()
		stays = true
	}
	for came := []byte(nil); ; t = a.table.lookup(p.cfg.Protocol, p.cfg.ContainerPort) {
		if t.byRequest() {
			if p.cfg.TLS != nil {
				p.byRequestTLS(ctx, a, c, client)
			} else {
				p.byRequest(ctx, a, c, client, came)
			}
			return
		}
		other, as, place := p.side(ctx, a, c, t)
		if other == nil {
			client.Reset() // what a closed port looks like once the handshake is done
			return
		}
		ended := context.AfterFunc(ctx, other.Reset)
		if stays {
			relay(as, client, other)
		} else {
			m := &mover{p: p, table: &a.table, c: c, place: place}
			if place != t.place() {
				m.until = time.Now().Add(refusedPause)
			}
			came = m.relay(as, other, came)
		}
		ended()
		if came == nil {
			return
		}
	}
}

// side connects to the other side of a connection that goes to one as a whole: the laptop of an intercept, or the app if there is none or it
// does not take it. It lasts as long as the context; nil: not even the app answers.
func (p *port) side(ctx context.Context, a *Agent, c *net.TCPConn, t taken) (other flow.Stream, as context.Context, place string) {
	if len(t.intercepts) > 0 {
		e, err := t.intercepts[0], errAway
		var st *mux.Stream
		if !e.away {
			st, err = p.offer(ctx, a, c, e)
		}
		if err == nil {
			a.up.decisions.note(p.cfg, addrPort(c.RemoteAddr()), nil, e.intercept, "")
			return st, e.ctx, t.place()
		}
		a.up.decisions.note(p.cfg, addrPort(c.RemoteAddr()), nil, "", notTaken(err))
	}
	app, err := p.dialApp(ctx)
	if err != nil {
		a.cfg.Log.Debug("the app does not answer", "port", p.cfg.ContainerPort, "err", err)
		return nil, ctx, ""
	}
	return flow.FromTCP(app), ctx, ""
}

// offer offers a flow to the laptop of an intercept.
func (p *port) offer(ctx context.Context, a *Agent, c *net.TCPConn, e engagement) (*mux.Stream, error) {
	h := wire.InterceptHeader{Intercept: e.intercept, Proto: syscall.IPPROTO_TCP, Src: addrPort(c.RemoteAddr()), Dst: addrPort(c.LocalAddr()), Port: p.cfg.ContainerPort}
	ctx, cancel := context.WithTimeout(ctx, acceptTimeout)
	defer cancel()
	st, err := a.up.open(ctx, h)
	if err != nil {
		a.cfg.Log.Debug("laptop did not take the connection", "intercept", e.intercept, "err", err)
		return nil, err
	}
	return st, nil
}

// byRequest splits a connection by its HTTP requests.
func (p *port) byRequest(ctx context.Context, a *Agent, c *net.TCPConn, client flow.Stream, came []byte) {
	p.split(ctx, a, c, client, splitting{
		came: came,
		app: func(ctx context.Context) (flow.Stream, error) {
			app, err := p.dialApp(ctx)
			if err != nil {
				return nil, err
			}
			return flow.FromTCP(app), nil
		},
		odd: func(first []byte) {
			if len(first) > 0 && first[0] == recordHandshake {
				a.note(p, fmt.Sprintf("TLS connections to port %d go to the app as they are: the agent has no certificate for them (annotation %s)", p.cfg.ContainerPort, agentcfg.AnnotationTLS), "")
			}
		},
	})
}

// splitting says what is on the other sides of a connection whose requests are looked at one by one.
type splitting struct {
	came  []byte                                                  // of the client, before
	app   func(context.Context) (flow.Stream, error)              // connects to the app
	whole func(context.Context, flow.Stream) (flow.Stream, error) // wraps the flow to an intercept of all connections; nil: it is taken as it is
	odd   func(first []byte)                                      // the connection does not begin with HTTP; nil: nobody cares
}

// split sends each request of client, which came by c, where the table of its own moment says.
func (p *port) split(ctx context.Context, a *Agent, c *net.TCPConn, client flow.Stream, to splitting) {
	find := func(want func(engagement) bool) (engagement, bool) {
		es := a.table.lookup(p.cfg.Protocol, p.cfg.ContainerPort).intercepts
		if i := slices.IndexFunc(es, want); i >= 0 {
			return es[i], true
		}
		return engagement{}, false
	}
	copies := requestCopies{byTap: map[string]*bytesCopy{}, begin: func(e engagement) *bytesCopy { return p.copyFor(ctx, a, c, e) }}
	defer copies.end()
	var refusals sync.Map // why laptops did not take a flow, by intercept
	err := httproute.Serve(ctx, client, httproute.Config{
		Came: to.came,
		Gone: a.gone,
		Odd:  to.odd,

		Budget: a.http2,
		Copy: func(h match.Head, alone bool) httproute.Copy {
			return copies.of(a.table.lookup(p.cfg.Protocol, p.cfg.ContainerPort).wiretaps, h, alone)
		},
		Pick: func(h match.Head) string {
			e, _ := find(func(e engagement) bool { return e.match.Match(h) })
			return e.to()
		},
		Rest: func() string {
			e, _ := find(engagement.whole)
			return e.to()
		},
		Sent: func(h match.Head, to string) {
			why := ""
			switch {
			case h == nil:
				why = "it is not HTTP"
			case to == httproute.App:
				why = a.table.lookup(p.cfg.Protocol, p.cfg.ContainerPort).instead(h, &refusals)
			}
			a.up.decisions.note(p.cfg, addrPort(c.RemoteAddr()), h, to, why)
		},
		Open: func(ctx context.Context, where string) (flow.Stream, error) {
			if where == httproute.App {
				return to.app(ctx)
			}
			e, ok := find(func(e engagement) bool { return e.intercept == where && e.whole() })
			if !ok {
				e, ok = find(func(e engagement) bool { return e.intercept == where })
			}
			if !ok {
				return nil, errors.New("the intercept has ended")
			}
			st, err := p.offer(ctx, a, c, e)
			if err != nil {
				refusals.Store(where, err)
				return nil, err
			}
			refusals.Delete(where)
			s := tied{st, context.AfterFunc(e.ctx, st.Reset)}
			if e.whole() && to.whole != nil {
				return to.whole(ctx, s)
			}
			return s, nil
		},
	})
	if err != nil {
		a.cfg.Log.Debug("connection cut", "port", p.cfg.ContainerPort, "err", err)
	}
}

// tied is a stream that is reset when its engagement ends, and forgotten there when it has ended before.
type tied struct {
	*mux.Stream
	untie func() bool
}

// Close implements flow.Stream.
func (t tied) Close() error {
	t.untie()
	return t.Stream.Close()
}

// Reset implements flow.Stream.
func (t tied) Reset() {
	t.untie()
	t.Stream.Reset()
}

func (p *port) toApp(ctx context.Context, a *Agent, client flow.Stream) {
	app, _, _ := p.side(ctx, a, nil, taken{})
	if app == nil {
		client.Reset()
		return
	}
	relay(ctx, client, app)
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
		c, err := lifecycle.Accept(l.Accept)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept on %s: %w", l.Addr(), err)
		}
		go handle(c.(*net.TCPConn))
	}
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

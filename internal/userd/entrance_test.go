package userd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/wire"
)

// roads is an entrance whose transports do what a test says.
type roads struct {
	entrance
	attach, shake map[kube.Transport]error
	tried         []string // since the last open
}

func newRoads() *roads {
	w := &roads{attach: map[kube.Transport]error{}, shake: map[kube.Transport]error{}}
	w.entrance.attach = func(_ context.Context, t kube.Transport) (net.Conn, error) {
		w.tried = append(w.tried, string(t))
		if err := w.attach[t]; err != nil {
			return nil, err
		}
		c, _ := net.Pipe()
		return namedConn{c, t}, nil
	}
	return w
}

type namedConn struct {
	net.Conn
	t kube.Transport
}

func (w *roads) open(t *testing.T) error {
	w.tried = nil
	return w.entrance.open(t.Context(), func(_ context.Context, c net.Conn) error { return w.shake[c.(namedConn).t] })
}

func (w *roads) want(t *testing.T, err error, used string, tried ...string) {
	t.Helper()
	if st := w.status(); st.Name != used || !slices.Equal(w.tried, tried) {
		t.Errorf("used %q after %q (%v), want %q after %q", st.Name, w.tried, err, used, tried)
	}
}

const (
	proxy = string(kube.ServiceProxy)
	ws    = string(kube.WebSocketForward)
	spdy  = string(kube.SPDYForward)
)

var errStripped = uerr.Wrap(&tunnel.UpgradeError{Status: 426}, uerr.Cluster, "a proxy may strip it", "the way does not carry upgrades")

func TestEntrance(t *testing.T) {
	t.Run("the ordinary way alone", func(t *testing.T) {
		w := newRoads()
		w.want(t, w.open(t), proxy, proxy)
		if st := w.status(); st.Failed != nil {
			t.Errorf("%+v", st)
		}
	})
	t.Run("each in its turn", func(t *testing.T) {
		w := newRoads()
		w.attach[kube.ServiceProxy], w.shake[kube.WebSocketForward] = errStripped, fmt.Errorf("TLS: %w", io.EOF)
		w.want(t, w.open(t), spdy, proxy, ws, spdy)
		if st := fmt.Sprint(w.status()); !strings.Contains(st, "does not carry upgrades") || !strings.Contains(st, "TLS: EOF") {
			t.Error(st)
		}
		delete(w.shake, kube.WebSocketForward)
		w.want(t, w.open(t), spdy, spdy) // what worked
	})
	t.Run("after the handshake", func(t *testing.T) {
		w := newRoads()
		w.shake[kube.ServiceProxy] = io.ErrUnexpectedEOF // 101, and then nothing
		w.want(t, w.open(t), ws, proxy, ws)
	})
	t.Run("not its fault", func(t *testing.T) {
		for _, err := range []error{
			uerr.Wrap(&tunnel.UpgradeError{Status: 403}, uerr.Denied, "", "not you"),
			uerr.Wrap(&tunnel.UpgradeError{Status: 503, Body: "no endpoints available"}, uerr.Cluster, "", "not running"),
			&net.OpError{Op: "dial", Err: errors.New("network is unreachable")},
		} {
			w := newRoads()
			w.attach[kube.ServiceProxy] = err
			got := w.open(t)
			w.want(t, got, "", proxy)
			if !errors.Is(got, err) {
				t.Errorf("%v became %v", err, got)
			}
		}
	})
	t.Run("the manager's no", func(t *testing.T) {
		for _, no := range []error{&mux.RejectError{Code: wire.CodeGone}, tunnel.ErrPin} {
			w := newRoads()
			w.attach[kube.ServiceProxy], w.shake[kube.WebSocketForward] = errStripped, no
			err := w.open(t)
			w.want(t, err, "", proxy, ws)
			if !errors.Is(err, no) {
				t.Errorf("%v became %v", no, err)
			}
		}
	})
	t.Run("none", func(t *testing.T) {
		w := newRoads()
		w.attach[kube.ServiceProxy] = errStripped
		w.attach[kube.WebSocketForward] = uerr.New(uerr.Denied, "you need a right", "you may not")
		w.attach[kube.SPDYForward] = uerr.New(uerr.Denied, "you need a right", "you may not")
		err := w.open(t)
		w.want(t, err, "", proxy, ws, spdy)
		wantError(t, err, uerr.Cluster, "the way does not carry upgrades: HTTP 426", "strip it; if that is well, you need a right")
		wantError(t, err, uerr.Cluster, "by WebSocket port-forward: you may not; by SPDY port-forward: you may not", "")
		if e := uerr.From(err); strings.Count(e.Hint, "right") != 1 {
			t.Errorf("hint %q", e.Hint)
		}
	})
}

// An attempt that is given up, because the network has changed meanwhile, say, is no answer of the transport: it is the next one to be tried.
func TestEntranceGivenUp(t *testing.T) {
	w := newRoads()
	w.direct = true
	w.want(t, w.open(t), proxy, proxy)
	w.again(kube.Direct, "it is nearer")
	ctx, cancel := context.WithCancel(t.Context())
	w.tried = nil
	err := w.entrance.open(ctx, func(ctx context.Context, _ net.Conn) error {
		cancel()
		return fmt.Errorf("tunnel handshake: %w", ctx.Err())
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	w.want(t, err, "", string(kube.Direct))
	if st := w.status(); st.Failed != nil {
		t.Errorf("%+v", st)
	}
	w.want(t, w.open(t), string(kube.Direct), string(kube.Direct))
	if st := w.status(); st.Why != "it is nearer" {
		t.Errorf("%+v", st)
	}
}

// What carried the tunnel is left for another transport only after a while, and for a better one when asked.
func TestEntranceLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newRoads()
		w.want(t, w.open(t), proxy, proxy)
		w.attach[kube.ServiceProxy] = errStripped // a manager that starts again
		for range 2 {
			w.want(t, w.open(t), proxy, proxy)
			time.Sleep(fallbackPatience - time.Second)
			w.attach[kube.ServiceProxy] = nil
			w.want(t, w.open(t), proxy, proxy)
			w.attach[kube.ServiceProxy] = errStripped
		}
		w.want(t, w.open(t), proxy, proxy)
		time.Sleep(fallbackPatience)
		w.want(t, w.open(t), ws, proxy, ws)
		w.attach[kube.ServiceProxy] = nil
		w.want(t, w.open(t), ws, ws)
		if b := w.better(); !slices.Equal(b, []kube.Transport{kube.ServiceProxy}) {
			t.Errorf("better: %v", b)
		}
		w.again(kube.ServiceProxy, "")
		w.want(t, w.open(t), proxy, proxy)
		if b := w.better(); len(b) != 0 {
			t.Errorf("better: %v", b)
		}
	})
}

// A tunnel changes over to a better transport, and stays where it is while there is none.
func TestChangeOver(t *testing.T) {
	c := newCluster(t)
	var blocked atomic.Bool
	blocked.Store(true)
	s := c.session()
	proxied := s.entrance.attach
	s.entrance.attach = func(ctx context.Context, way kube.Transport) (net.Conn, error) {
		if way == kube.ServiceProxy && blocked.Load() {
			return nil, errStripped
		}
		return proxied(ctx, kube.ServiceProxy)
	}
	c.start(s)
	c.up(s)
	s.changeOver(t.Context(), s.entrance.better()...)
	if st := s.entrance.status(); st.Name != ws {
		t.Errorf("%+v", st)
	}
	first := s.link.Session()
	blocked.Store(false)
	s.changeOver(t.Context(), s.entrance.better()...)
	c.until("it has changed over", func() bool { m := s.link.Session(); return m != nil && m != first })
	if st := s.entrance.status(); st.Name != proxy || st.Failed != nil {
		t.Errorf("%+v", st)
	}
}

// A direct connection is taken when it was found to be better, and left at its first failure; only the manager itself says no there.
func TestEntranceDirect(t *testing.T) {
	const direct = string(kube.Direct)
	w := newRoads()
	w.direct = true
	w.want(t, w.open(t), proxy, proxy)
	if b := w.better(); !slices.Equal(b, []kube.Transport{kube.Direct}) {
		t.Errorf("better than the service proxy: %v", b)
	}
	w.again(kube.Direct, "it is nearer")
	w.want(t, w.open(t), direct, direct)
	if st := w.status(); st.Why != "it is nearer" || st.Failed != nil || len(w.better()) != 0 {
		t.Errorf("%+v, better: %v", st, w.better())
	}
	w.want(t, w.open(t), direct, direct) // what worked
	w.shake[kube.Direct] = fmt.Errorf("TLS: %w", tunnel.ErrPin)
	w.want(t, w.open(t), proxy, direct, proxy)
	if st := w.status(); st.Why != "" || len(st.Failed) != 1 || st.Failed[0].Name != direct {
		t.Errorf("%+v", st)
	}
	w.want(t, w.open(t), proxy, proxy)

	w.again(kube.Direct, "")
	w.shake[kube.Direct] = &mux.RejectError{Code: wire.CodeGone}
	err := w.open(t)
	w.want(t, err, "", direct)
	w.again(kube.Direct, "")
	w.attach[kube.Direct] = &net.OpError{Op: "dial", Err: errors.New("no route to host")}
	w.want(t, w.open(t), proxy, direct, proxy)
}

package userd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/wire"
)

// loopback is where a local process looks for what runs beside the app in its pod, and where it is there.
var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// toPod are the listeners through which local processes reach ports on the loopback of an intercepted pod, as the app does.
type toPod struct {
	listeners []net.Listener
	wg        sync.WaitGroup
}

// listenToPod opens the listeners, before anything is changed in the cluster.
func listenToPod(ports []int32) (*toPod, error) {
	t := &toPod{}
	for _, p := range ports {
		l, err := net.Listen("tcp", net.JoinHostPort(loopback.String(), strconv.Itoa(int(p))))
		if err != nil {
			t.close()
			return nil, uerr.Wrap(err, uerr.Conflict, fmt.Sprintf("something listens on %s:%d here; end it, or leave --to-pod out", loopback, p), "--to-pod %d", p)
		}
		t.listeners = append(t.listeners, l)
	}
	return t, nil
}

// serve carries each connection to the pod's port of the same number.
func (t *toPod) serve(x *intercepts, in *intercept) {
	for _, l := range t.listeners {
		t.wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					if !errors.Is(err, net.ErrClosed) {
						x.s.log.Error("--to-pod ended", "addr", l.Addr(), "err", err)
					}
					return
				}
				go x.toPod(in, c.(*net.TCPConn))
			}
		})
	}
}

func (t *toPod) close() {
	if t == nil {
		return
	}
	for _, l := range t.listeners {
		_ = l.Close()
	}
	t.wg.Wait()
}

// toPod carries one connection; what the pod's port refuses is reset here.
func (x *intercepts) toPod(in *intercept, c *net.TCPConn) {
	local := c.LocalAddr().(*net.TCPAddr).AddrPort()
	x.mu.Lock()
	uid := string(in.object.UID)
	x.mu.Unlock()
	ctx := context.Background()
	m, err := x.s.tunnel(ctx, flowPatience)
	if err != nil {
		flow.FromTCP(c).Reset()
		return
	}
	st, _, err := m.Open(ctx, wire.AppendIntercept(nil, wire.InterceptHeader{
		Intercept: uid, Proto: wire.ProtoTCP, Src: c.RemoteAddr().(*net.TCPAddr).AddrPort(), Dst: netip.AddrPortFrom(loopback, local.Port()),
	}))
	if err != nil {
		x.s.log.Debug("not forwarded to the pod", "intercept", in.name, "port", local.Port(), "err", err)
		flow.FromTCP(c).Reset()
		return
	}
	_, _, _ = flow.Relay(flow.FromTCP(c), st) // how a flow ended is between its two ends
}

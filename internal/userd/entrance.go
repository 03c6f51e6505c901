package userd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
)

const (
	// handshakeTimeout bounds the tunnel's handshake on one transport.
	handshakeTimeout = 4 * time.Second
	// fallbackPatience is how long a transport that carried the tunnel may fail before others are tried: a manager that starts
	// again looks the same, and another transport is a worse one.
	fallbackPatience = 10 * time.Second
	// A transport that is better than the used one is tried again after betterFirst, then after twice as long, up to betterLast.
	betterFirst = 5 * time.Minute
	betterLast  = 2 * time.Hour
)

// entrance leads to the traffic-manager by the first of kube.Transports that works, and remembers which one did. A tunnel begins through the
// API server, which is always there; Direct is taken later (changeOver), if it is there and does better, and left at its first failure.
type entrance struct {
	attach func(context.Context, kube.Transport) (net.Conn, error)
	direct bool // the manager has such addresses

	mu sync.Mutex
	// guarded by mu
	used    kube.Transport           // what worked last; "": nothing yet
	next    kube.Transport           // what is tried first, until it has been
	because string                   // why used is used, if it is Direct
	failing time.Time                // since when it does not; zero: it does
	why     map[kube.Transport]error // why each one failed last
}

// open has use do the handshake on a connection to the manager.
func (e *entrance) open(ctx context.Context, use func(context.Context, net.Conn) error) error {
	var failed error
	for i, t := range e.order() {
		err := e.try(ctx, t, use)
		if err == nil {
			return nil
		}
		switch {
		case ctx.Err() != nil:
			return err
		case decided(t, err), t != kube.Direct && i == 0 && !e.fallBack(err):
			return err
		case failed == nil:
			failed = err
		default:
			failed = both(failed, t, err)
		}
	}
	return failed
}

// order is what is to be tried next, or what worked, then the others.
func (e *entrance) order() []kube.Transport {
	e.mu.Lock()
	defer e.mu.Unlock()
	first := cmp.Or(e.next, e.used)
	order := slices.DeleteFunc(slices.Clone(kube.Transports), func(t kube.Transport) bool { return t == first })
	if first != "" {
		order = slices.Insert(order, 0, first)
	}
	return order
}

func (e *entrance) try(ctx context.Context, t kube.Transport, use func(context.Context, net.Conn) error) error {
	raw, err := e.attach(ctx, t)
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
		err = use(ctx, raw)
		cancel()
	}
	if err != nil && ctx.Err() != nil { // given up: that says nothing about the transport, which is still the next one
		return err
	}
	e.mu.Lock()
	e.next = ""
	if err == nil {
		e.used, e.failing = t, time.Time{}
	}
	e.mu.Unlock()
	if err != nil {
		e.failed(t, err)
	}
	return err
}

// fallBack says whether, after err on the first transport, others are to be tried.
func (e *entrance) fallBack(err error) bool {
	if !kube.Obstructed(err) {
		return false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.used == "" {
		return true
	}
	if e.failing.IsZero() {
		e.failing = time.Now()
	}
	return time.Since(e.failing) >= fallbackPatience
}

// decided says whether the manager, or something in its place, was reached and said no. In its place at a direct address may be anybody: that
// is for the API server to say.
func decided(t kube.Transport, err error) bool {
	var re *mux.RejectError
	return errors.As(err, &re) || errors.Is(err, tunnel.ErrPin) && t != kube.Direct
}

// both is the error of a transport with that of another which was tried then.
func both(first error, t kube.Transport, then error) error {
	f, n := uerr.From(first), uerr.From(then)
	if n.Kind == uerr.Denied && !strings.Contains(f.Hint, n.Hint) {
		f.Hint += "; if that is well, " + n.Hint
	}
	f.Msg = fmt.Sprintf("%s; by %s: %s", f.Msg, t, n.Msg)
	return f
}

// better are the transports that are better than the used one.
func (e *entrance) better() []kube.Transport {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.used == kube.Direct {
		return nil
	}
	better := kube.Transports[:max(0, slices.Index(kube.Transports, e.used))]
	if e.direct {
		better = append([]kube.Transport{kube.Direct}, better...)
	}
	return better
}

// again has the next open try all transports anew, beginning with t.
func (e *entrance) again(t kube.Transport, because string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.used, e.next, e.because = "", t, because
}

// failed notes why a transport is not used.
func (e *entrance) failed(t kube.Transport, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.why == nil {
		e.why = map[kube.Transport]error{}
	}
	e.why[t] = err
}

// status says which transport is used, and why those before are not.
func (e *entrance) status() localapi.Transport {
	better := e.better()
	e.mu.Lock()
	defer e.mu.Unlock()
	out := localapi.Transport{Name: string(e.used)}
	if e.used == kube.Direct {
		out.Why = e.because
	}
	for _, t := range better {
		if err := e.why[t]; err != nil {
			out.Failed = append(out.Failed, localapi.FailedTransport{Name: string(t), Why: err.Error()})
		}
	}
	return out
}

// errBetter is why a tunnel is given another connection.
var errBetter = errors.New("a better transport works again")

// seekBetter brings the tunnel to a direct connection, or back to a better transport when one works again.
func (s *session) seekBetter(ctx context.Context) error {
	if s.entrance.direct {
		s.changeOver(ctx, kube.Direct)
	}
	wait := betterFirst
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		if len(s.entrance.better()) == 0 {
			wait = betterFirst
			continue
		}
		wait = min(2*wait, betterLast)
		s.changeOver(ctx, s.entrance.better()...)
	}
}

// changeOver gives the tunnel another connection if one of the better transports connects. Its flows go on.
func (s *session) changeOver(ctx context.Context, better ...kube.Transport) {
	m, err := s.link.Wait(ctx) // it may be down for a moment, and the next look is minutes away
	if err != nil {
		return
	}
	for _, t := range better {
		conn, err := s.entrance.attach(ctx, t)
		because := ""
		if err == nil {
			_ = conn.Close()
			because, err = s.compare(ctx, m, conn)
		}
		if err != nil {
			s.entrance.failed(t, err)
			s.log.Debug("transport tried again", "transport", t, "err", err)
			continue
		}
		s.entrance.again(t, because)
		m.Drop(errBetter)
		return
	}
}

const (
	// pings are how many round trips of each way are measured; the shortest counts.
	pings = 3
	// slack is how much longer a direct round trip may be, and a quarter of the other's besides: within that the two are as near, and what
	// the API server need not do is won (two thirds of the CPU time of bulk on one machine).
	slack = time.Millisecond
)

// compare says why a direct connection is better than the tunnel's, or that it is not: its way is longer. A
// connection through the API server that works is better than what the tunnel has, whatever it measures.
func (s *session) compare(ctx context.Context, m *mux.Session, c net.Conn) (string, error) {
	d, ok := c.(*kube.DirectConn)
	if !ok {
		return "", nil
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	trip, near := time.Duration(math.MaxInt64), d.Trip
	for range pings - 1 {
		if c, err := s.entrance.attach(ctx, kube.Direct); err == nil {
			_ = c.Close()
			if d, ok := c.(*kube.DirectConn); ok {
				near = min(near, d.Trip)
			}
		}
	}
	for range pings {
		p, err := m.Ping(ctx)
		if err != nil {
			return "", fmt.Errorf("measure the tunnel: %w", err)
		}
		trip = min(trip, p)
	}
	said := fmt.Sprintf("its round trip is %s, that through the API server %s", round(near), round(trip))
	if near > trip+trip/4+slack {
		return "", errors.New(said)
	}
	return said, nil
}

func round(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }

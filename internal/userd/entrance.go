package userd

import (
	"context"
	"errors"
	"fmt"
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

// entrance leads to the traffic-manager by the first of kube.Transports that works, and remembers which one did.
type entrance struct {
	attach func(context.Context, kube.Transport) (net.Conn, error)

	mu sync.Mutex
	// guarded by mu
	used    kube.Transport           // what worked last; "": nothing yet
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
		case i == 0 && !e.fallBack(err), decided(err):
			return err
		case failed == nil:
			failed = err
		default:
			failed = both(failed, t, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return failed
}

// order is what worked, then the others.
func (e *entrance) order() []kube.Transport {
	e.mu.Lock()
	defer e.mu.Unlock()
	order := slices.Clone(kube.Transports)
	if i := slices.Index(order, e.used); i > 0 {
		order = slices.Insert(slices.Delete(order, i, i+1), 0, e.used)
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
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil {
		if e.why == nil {
			e.why = map[kube.Transport]error{}
		}
		e.why[t] = err
		return err
	}
	e.used, e.failing = t, time.Time{}
	return nil
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

// decided says whether the manager, or something in its place, was reached and said no.
func decided(err error) bool {
	var re *mux.RejectError
	return errors.As(err, &re) || errors.Is(err, tunnel.ErrPin)
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
	return kube.Transports[:max(0, slices.Index(kube.Transports, e.used))]
}

// again has the next open try all transports anew, the better first.
func (e *entrance) again() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.used = ""
}

// status says which transport is used, and why those before are not.
func (e *entrance) status() localapi.Transport {
	better := e.better()
	e.mu.Lock()
	defer e.mu.Unlock()
	out := localapi.Transport{Name: string(e.used)}
	for _, t := range better {
		if err := e.why[t]; err != nil {
			out.Failed = append(out.Failed, localapi.FailedTransport{Name: string(t), Why: err.Error()})
		}
	}
	return out
}

// errBetter is why a tunnel is given another connection.
var errBetter = errors.New("a better transport works again")

// seekBetter brings the tunnel back to a better transport when one works again.
func (s *session) seekBetter(ctx context.Context) error {
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
		s.changeOver(ctx)
	}
}

// changeOver gives the tunnel another connection if a better transport connects. Its flows go on.
func (s *session) changeOver(ctx context.Context) {
	m := s.link.Session()
	if m == nil {
		return
	}
	for _, t := range s.entrance.better() {
		conn, err := s.entrance.attach(ctx, t)
		if err != nil {
			s.log.Debug("transport tried again", "transport", t, "err", err)
			continue
		}
		_ = conn.Close()
		s.entrance.again()
		m.Drop(errBetter)
		return
	}
}

package manager

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/api/v1alpha1"
)

// What strangers can have the manager do, before it is known that they are nobody.

const (
	// readHeaderTimeout bounds how long a client may take for a request's head, and then for its body or to take the answer (slow-loris).
	readHeaderTimeout = 10 * time.Second
	// idleTimeout is how long a connection may stay open between two requests. API servers close theirs after 90 s (net/http, DefaultTransport), so that
	// none of them has a request on its way when we do.
	idleTimeout = 2 * time.Minute
)

// httpServer is a server that nobody can hold a connection to by saying nothing. Tunnels are none of its requests any more.
func httpServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler: h, ReadHeaderTimeout: readHeaderTimeout, ReadTimeout: readHeaderTimeout, WriteTimeout: readHeaderTimeout, IdleTimeout: idleTimeout,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

// freshSessions lists the sessions that the API server has, for those that the cache does not know yet. Whoever names a session that is not there has it
// asked, so one list at a time is on its way, and all who came before it began wait for the same.
type freshSessions struct {
	mu sync.Mutex
	// guarded by mu
	next   *sessionList // has not begun; nil: nobody waits for it
	asking bool
}

type sessionList struct {
	ask   func(context.Context) ([]v1alpha1.Session, error)
	done  chan struct{}
	items []v1alpha1.Session
	err   error
}

// freshTimeout bounds one list.
const freshTimeout = 10 * time.Second

func (f *freshSessions) list(ctx context.Context, ask func(context.Context) ([]v1alpha1.Session, error)) ([]v1alpha1.Session, error) {
	f.mu.Lock()
	l := f.next
	if l == nil {
		l = &sessionList{ask: ask, done: make(chan struct{})}
		f.next = l
	}
	if !f.asking {
		f.asking = true
		go f.run()
	}
	f.mu.Unlock()
	select {
	case <-l.done:
		return l.items, l.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// run asks until nobody waits.
func (f *freshSessions) run() {
	for {
		f.mu.Lock()
		l := f.next
		f.next, f.asking = nil, l != nil
		f.mu.Unlock()
		if l == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), freshTimeout)
		l.items, l.err = l.ask(ctx)
		cancel()
		close(l.done)
	}
}

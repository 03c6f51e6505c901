package tunnel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/wire"
)

// Pauses between attempts to reconnect: doubled from the first to the last, each with up to half of itself as jitter.
// While a session outlives its tunnel (eagerFor) the pauses stay short, so that a manager that is back is found at once.
const (
	firstPause = 50 * time.Millisecond
	eagerPause = 250 * time.Millisecond
	eagerFor   = 30 * time.Second
	lastPause  = 2 * time.Second
)

// LinkConfig says how to make and use a tunnel. Dial is required.
type LinkConfig struct {
	Dial      func(ctx context.Context) (*mux.Session, wire.HelloReply, error)
	OnUp      func(*mux.Session, wire.HelloReply)       // a tunnel is there
	OnDown    func(error)                               // it was lost; called once for each OnUp
	OnRetry   func(err error, pause time.Duration)      // an attempt failed; the next comes after pause
	Serve     func(context.Context, *mux.Session) error // runs while the tunnel is up; its error ends this tunnel
	Permanent func(error) bool                          // nil: IsPermanent
	Log       *slog.Logger
}

// IsPermanent reports whether trying again is useless: the other end said denied, gone or version.
func IsPermanent(err error) bool {
	var rej *mux.RejectError
	var away *mux.GoAwayError
	var code wire.Code
	switch {
	case errors.As(err, &rej):
		code = rej.Code
	case errors.As(err, &away):
		code = away.Code
	}
	return code == wire.CodeDenied || code == wire.CodeGone || code == wire.CodeVersion
}

// Link keeps one tunnel alive:
//
//	dialling ──► up ──► lost ──► pause ──► dialling
//	    └────────────────┴─ permanent error, or ctx ended ──► ended
type Link struct {
	cfg LinkConfig

	mu sync.Mutex
	// guarded by mu:
	session *mux.Session
	changed chan struct{} // closed at the next change
	ended   error
}

// NewLink returns a link; Run starts it.
func NewLink(cfg LinkConfig) *Link {
	if cfg.Permanent == nil {
		cfg.Permanent = IsPermanent
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Link{cfg: cfg, changed: make(chan struct{})}
}

// Session returns the tunnel, or nil while it is down.
func (l *Link) Session() *mux.Session {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.session
}

// Wait returns the tunnel as soon as it is up. It fails when ctx ends, or the link has ended.
func (l *Link) Wait(ctx context.Context) (*mux.Session, error) {
	for {
		l.mu.Lock()
		s, ended, changed := l.session, l.ended, l.changed
		l.mu.Unlock()
		switch {
		case s != nil:
			return s, nil
		case ended != nil:
			return nil, ended
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (l *Link) set(s *mux.Session, ended error) {
	l.mu.Lock()
	l.session, l.ended = s, ended
	close(l.changed)
	l.changed = make(chan struct{})
	l.mu.Unlock()
}

// Run keeps the tunnel until ctx ends (then the session is closed in order, and nil returned) or a permanent error.
func (l *Link) Run(ctx context.Context) error {
	err := l.run(ctx)
	ended := err
	if ended == nil {
		ended = fmt.Errorf("link ended: %w", context.Cause(ctx))
	}
	l.set(nil, ended)
	return err
}

func (l *Link) run(ctx context.Context) error {
	pause := firstPause
	lost := time.Now()
	for {
		start := time.Now()
		s, reply, err := l.cfg.Dial(ctx)
		if err == nil {
			err = l.up(ctx, s, reply)
			if time.Since(start) > 2*lastPause { // it held: the next loss is a new one
				pause = firstPause
			}
			lost = time.Now()
		}
		if ctx.Err() != nil {
			return nil
		}
		if l.cfg.Permanent(err) {
			return err
		}
		wait := pause/2 + rand.N(pause/2+1)
		l.cfg.Log.Info("tunnel is down", "err", err, "retry_in", wait)
		if l.cfg.OnRetry != nil {
			l.cfg.OnRetry(err, wait)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil
		}
		last := lastPause
		if time.Since(lost) < eagerFor {
			last = eagerPause
		}
		pause = min(2*pause, last)
	}
}

// up runs one tunnel until it is lost, and returns why.
func (l *Link) up(ctx context.Context, s *mux.Session, reply wire.HelloReply) error {
	l.set(s, nil)
	if l.cfg.OnUp != nil {
		l.cfg.OnUp(s, reply)
	}
	sctx, cancel := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() {
		if l.cfg.Serve == nil {
			<-sctx.Done()
			served <- nil
			return
		}
		served <- l.cfg.Serve(sctx, s)
	}()
	var err error
	waiting := served
	select {
	case <-s.Done():
	case <-ctx.Done():
	case err = <-served:
		waiting = nil
	}
	l.set(nil, nil)
	cancel()
	_ = s.Close()
	if waiting != nil {
		l.cfg.Log.Debug("serving ended", "err", <-waiting)
	}
	if e := s.Err(); e != nil && !errors.Is(e, mux.ErrClosed) || err == nil {
		err = e
	}
	if l.cfg.OnDown != nil {
		l.cfg.OnDown(err)
	}
	return err
}

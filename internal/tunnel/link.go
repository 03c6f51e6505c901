package tunnel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
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

// probeTimeout is how long a tunnel may take to answer after Check. To be wrong costs little: another connection takes its place.
const probeTimeout = 500 * time.Millisecond

// LinkConfig says how to make and use a tunnel. Dial is required.
type LinkConfig struct {
	// Dial makes a connection. old is the tunnel that lost its own, to be gone on with if the other end still has it
	// (ClientConfig.Resume); nil: none.
	Dial    func(ctx context.Context, old *mux.Session) (*mux.Session, wire.HelloReply, error)
	OnUp    func(*mux.Session, wire.HelloReply)       // a tunnel is there, or has a connection again
	OnDown  func(error)                               // that was lost, or is of no use; called once for each OnUp
	OnRetry func(err error, pause time.Duration)      // an attempt failed; the next comes after pause
	Serve   func(context.Context, *mux.Session) error // runs while the tunnel lives, also without connection; its error ends this tunnel
	// OnSilent is called, perhaps again and again, when the other end was sent something, says nothing and does not answer a ping within a second. Without
	// it such a tunnel gets another connection, a little later, and keeps the old one until the other is there: to be wrong costs little if it can be resumed.
	OnSilent  func(*mux.Session)
	Permanent func(error) bool // nil: IsPermanent
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
//
// A tunnel that can be resumed lives on while it is lost, with all its streams, until the other end does not know it any more or
// has been away for too long.
type Link struct {
	cfg   LinkConfig
	check chan struct{} // see Check
	// of run's goroutine only, and of watch, for which it waits:
	said     time.Time     // when a failed attempt was logged last
	patience time.Duration // with a silent end

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
	return &Link{cfg: cfg, check: make(chan struct{}, 1), changed: make(chan struct{}), patience: answerTimeout}
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

// Check says that the network may have changed, or that the machine has slept: a tunnel must answer at once or is given another
// connection, and an attempt to dial or a pause starts again.
func (l *Link) Check() {
	select {
	case l.check <- struct{}{}:
	default: // one is due
	}
}

// life is one tunnel and what serves it.
type life struct {
	s      *mux.Session
	cancel context.CancelFunc
	served chan error
	heard  uint64 // bytes that had been sent when the other end was last not silent: of the rest it may not have all yet, over a later connection neither
}

func (l *Link) run(ctx context.Context) error {
	pause := firstPause
	lost := time.Now()
	var cur *life // the tunnel, up or waiting for a connection; nil: none
	defer func() { l.finish(cur) }()
	for {
		start := time.Now()
		next, reply, checked, err := l.dial(ctx, cur)
		if err == nil {
			if next != cur {
				l.finish(cur)
				cur, l.patience = next, answerTimeout
			}
			cur, err = l.up(ctx, cur, reply)
			held := time.Since(start) // if for long, the next loss is a new one
			if held > 2*lastPause {
				pause = firstPause
			}
			if held > 2*maxAnswerTimeout {
				l.patience = answerTimeout
			}
			lost, l.said = time.Now(), time.Time{}
		}
		if ctx.Err() != nil {
			return nil
		}
		if l.cfg.Permanent(err) {
			return err
		}
		if next == nil && cur != nil { // a silent end's connection was kept for a better one's sake
			cur.s.Drop(err)
		}
		if checked {
			pause = firstPause
			continue
		}
		if pause, checked = l.pause(ctx, err, pause, time.Since(lost)); checked {
			pause = firstPause
		}
		if ctx.Err() != nil {
			return nil
		}
	}
}

// pause waits between two attempts and returns the next pause. Check ends it.
func (l *Link) pause(ctx context.Context, err error, pause, down time.Duration) (next time.Duration, checked bool) {
	wait := pause/2 + rand.N(pause/2+1)
	if time.Since(l.said) > lastPause { // there may be many attempts in a second
		l.cfg.Log.Info("tunnel is down", "err", err, "retry_in", wait)
		l.said = time.Now()
	}
	if l.cfg.OnRetry != nil {
		l.cfg.OnRetry(err, wait)
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
	case <-l.check:
		checked = true
	case <-ctx.Done():
	}
	last := lastPause
	if down < eagerFor {
		last = eagerPause
	}
	return min(2*pause, last), checked
}

// dial makes one attempt, which Check gives up: checked then says so.
func (l *Link) dial(ctx context.Context, cur *life) (_ *life, reply wire.HelloReply, checked bool, err error) {
	dctx, cancel := context.WithCancel(ctx)
	var given atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-l.check:
			given.Store(true)
			cancel()
		case <-dctx.Done():
		}
	})
	var old *mux.Session
	if cur != nil && cur.s.Err() == nil {
		old = cur.s
	}
	s, reply, err := l.cfg.Dial(dctx, old)
	cancel()
	wg.Wait()
	if err != nil {
		return nil, reply, given.Load(), err
	}
	if s == old {
		return cur, reply, false, nil
	}
	sctx, scancel := context.WithCancel(ctx)
	n := &life{s: s, cancel: scancel, served: make(chan error, 1)}
	l.set(s, nil) // what the peer is answered may be what others then use the tunnel for
	go func() {
		if l.cfg.Serve == nil {
			<-sctx.Done()
			n.served <- nil
			return
		}
		n.served <- l.cfg.Serve(sctx, s)
	}()
	return n, reply, false, nil
}

// up is the time in which a tunnel has a connection. It returns why it lost it, and the tunnel if that still lives.
func (l *Link) up(ctx context.Context, cur *life, reply wire.HelloReply) (*life, error) {
	l.set(cur.s, nil)
	if l.cfg.OnUp != nil {
		l.cfg.OnUp(cur.s, reply)
	}
	wctx, cancel := context.WithCancel(ctx)
	silent := make(chan error, 1)
	var watching sync.WaitGroup
	watching.Go(func() {
		if err := l.watch(wctx, cur); err != nil {
			silent <- err
		}
	})
	var err error
	down := cur.s.Down()
	for up := true; up; {
		select {
		case <-l.check:
			l.probe(ctx, cur.s)
			continue
		case err = <-silent:
		case <-down:
			err = cur.s.Why()
		case <-ctx.Done():
			err = context.Cause(ctx)
		case err = <-cur.served:
			cur.served <- nil // for finish
			_ = cur.s.Close()
		}
		up = false
	}
	cancel()
	watching.Wait()
	l.set(nil, nil)
	if ctx.Err() != nil || cur.s.Err() != nil {
		l.finish(cur)
		if e := cur.s.Err(); e != nil && !errors.Is(e, mux.ErrClosed) || err == nil {
			err = e
		}
		cur = nil
	}
	if l.cfg.OnDown != nil {
		l.cfg.OnDown(err)
	}
	return cur, err
}

// errNoAnswer is why a tunnel loses its connection after Check.
var errNoAnswer = errors.New("no answer after the network changed or the machine slept")

// probe gives the connection up if it does not answer.
func (l *Link) probe(ctx context.Context, s *mux.Session) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	if _, err := s.Ping(ctx); err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		s.Drop(errNoAnswer)
	}
}

// finish ends a tunnel and waits for what served it.
func (l *Link) finish(cur *life) {
	if cur == nil {
		return
	}
	cur.cancel()
	_ = cur.s.Close()
	l.cfg.Log.Debug("serving ended", "err", <-cur.served)
	cur.served <- nil // may be called again
}

// Package lifecycle owns named groups of goroutines: the first that fails stops all, and nobody returns before all have ended.
package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
)

// ErrStopped is the cause of a group's context after Stop.
var ErrStopped = errors.New("stopped")

// Group runs named goroutines under one context. The zero value is not usable; see New.
type Group struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	log    *slog.Logger
	wg     sync.WaitGroup

	failed sync.Once
	err    error // set once, read after wg
}

// New returns a group whose context is a child of ctx.
func New(ctx context.Context, log *slog.Logger) *Group {
	c, cancel := context.WithCancelCause(ctx)
	return &Group{ctx: c, cancel: cancel, log: log}
}

// Context is cancelled, with the cause, when the first goroutine fails or Stop is called.
func (g *Group) Context() context.Context { return g.ctx }

// Go runs fn as a goroutine with a name. An error (or panic) other than the context's own end stops the group.
func (g *Group) Go(name string, fn func(ctx context.Context) error) {
	g.wg.Go(func() {
		err := protect(g.ctx, fn)
		var p *panicError
		ended := g.ctx.Err() != nil
		if err == nil || ended && !errors.As(err, &p) { // after the end, errors are its consequence; a panic is not
			return
		}
		g.log.Error("goroutine failed", "goroutine", name, "err", err)
		if ended {
			return
		}
		err = fmt.Errorf("%s: %w", name, err)
		g.failed.Do(func() { g.err = err })
		g.cancel(err)
	})
}

// panicError is a panic as an error.
type panicError struct {
	value any
	stack []byte
}

func (e *panicError) Error() string { return fmt.Sprintf("panic: %v\n%s", e.value, e.stack) }

// protect turns a panic of fn into an error, so that a defect in one flow ends a group in order and not the process at once.
func protect(ctx context.Context, fn func(context.Context) error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = &panicError{r, debug.Stack()}
		}
	}()
	return fn(ctx)
}

// Stop cancels the group's context with ErrStopped.
func (g *Group) Stop() { g.cancel(ErrStopped) }

// Wait waits until every goroutine has returned and gives the first error of one. The end of the parent context, whatever its
// cause (a signal's since Go 1.26 is no context.Canceled), is none.
func (g *Group) Wait() error {
	g.wg.Wait()
	return g.err
}

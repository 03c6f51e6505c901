// Package httproute owns the splitting of HTTP connections by request: each goes to the app or to the laptop of an intercept, and what goes
// to the app arrives there byte for byte.
package httproute

import (
	"context"
	"errors"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/match"
)

// App is where a request goes that nobody else gets.
const App = ""

// Config says where requests go. Pick, Rest and Open are required. The functions are called from several goroutines.
type Config struct {
	// Pick names the intercept that gets a request, or App.
	Pick func(match.Head) string
	// Rest names who gets connections that are not HTTP: an intercept of the whole port, or App.
	Rest func() string
	// Came are bytes of the client that were read before.
	Came []byte
	// Odd is told of the first bytes of a connection that does not begin with HTTP. Nil: nobody is.
	Odd func(first []byte)
	// Open connects to the app, or offers a flow to the laptop of an intercept. If the laptop does not take it the app gets the request.
	Open func(ctx context.Context, to string) (flow.Stream, error)
	// Sent is told of each request where it goes, which is not what Pick said if a laptop has not taken it, and with a nil head of a connection that is not HTTP.
	// Nil: nobody is. It must not wait.
	Sent func(h match.Head, to string)
	// Gone ends when the app has gone for good. A connection of HTTP/1 whose last request was a laptop's ends then, as soon as nothing is owed on it.
	// Nil: the app never is.
	Gone context.Context
	// Budget is what HTTP/2 connections store beyond their own. Nil: it has no end.
	Budget *Budget
	// Copy is who gets a copy of a request besides, or nil. A request of HTTP/2 is copied as one of HTTP/1.1 that is alone on its connection.
	Copy func(h match.Head, alone bool) Copy
}

// Copy is a request's copy as it is written. It never waits.
type Copy interface {
	Write(p []byte)
	// End says that the request is whole, or that it never will be.
	End(whole bool)
}

// silence is how long a client may say nothing before the app is connected to: in some protocols the server speaks first.
const silence = 50 * time.Millisecond

// Serve carries one connection of a client until it ends, or ctx does, and closes it. How it ended is between its ends; the error is for logs.
func Serve(ctx context.Context, client flow.Stream, cfg Config) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := newConn(ctx, client, cfg)
	stop := context.AfterFunc(ctx, func() { c.fail(context.Cause(ctx)) })
	if cfg.Gone != nil {
		defer context.AfterFunc(cfg.Gone, c.appGone)()
	}
	quiet := time.AfterFunc(silence, c.openEarly)
	err := c.serve()
	quiet.Stop()
	if err != nil && !errors.Is(err, errDone) {
		c.fail(err)
	}
	c.finish()
	stop()
	return c.close()
}

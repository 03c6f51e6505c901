package rootapi

import (
	"errors"
	"log/slog"
)

// ErrNotRunning is wrapped by Dial's error when nothing listens on the socket.
var ErrNotRunning = errors.New("doppel-rootd is not running")

// ErrClosed is wrapped by calls whose connection ended.
var ErrClosed = errors.New("connection to doppel-rootd closed")

// Options are a client's; the zero value works.
type Options struct {
	// Alive is asked at each of rootd's pings (two a second); without a true answer for 2 s rootd takes the DNS capture away until it is
	// true again. It must return at once. nil means alive as long as the process runs.
	Alive func() bool
	// Changed is told the state whenever rootd has put another one in force by itself: the laptop moved to a network with other resolvers,
	// or a VPN took a subnet. It must return at once and must not call the client. nil ignores it.
	Changed func(State)
	// Log gets broken messages; default: none.
	Log *slog.Logger
}

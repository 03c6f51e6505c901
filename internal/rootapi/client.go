package rootapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/doppel-dev/doppel/internal/uerr"
)

const (
	versionTimeout = 3 * time.Second  // the answer who listens
	quitTimeout    = 10 * time.Second // until a doppel-rootd has removed everything
)

// hangs is the error for a doppel-rootd that takes connections and does not answer; its process may not be known.
func hangs(v Version) error {
	if v.PID == 0 {
		return uerr.New(uerr.Internal, "end it with: sudo pkill -9 doppel-rootd", "doppel-rootd does not answer")
	}
	return uerr.New(uerr.Internal, fmt.Sprintf("end it with: sudo kill -9 %d", v.PID), "doppel-rootd (process %d) does not answer", v.PID)
}

// ErrNotRunning is wrapped by Dial's error when nothing listens on the socket.
var ErrNotRunning = errors.New("doppel-rootd is not running")

// ErrClosed is wrapped by calls whose connection ended.
var ErrClosed = errors.New("connection to doppel-rootd closed")

// Options are a client's; the zero value works.
type Options struct {
	// Alive is asked at each of rootd's pings (two a second); without a true answer for 1.5 s rootd takes the DNS capture away until it is
	// true again. It must return at once. nil means alive as long as the process runs.
	Alive func() bool
	// Changed is told the state whenever rootd has put another one in force by itself: the laptop moved to a network with other resolvers,
	// or a VPN took a subnet. It must return at once and must not call the client. nil ignores it.
	Changed func(State)
	// Log gets broken messages; default: none.
	Log *slog.Logger
}

// Running says which doppel-rootd listens on path, of whatever release.
func Running(ctx context.Context, path string) (Version, error) {
	c, v, err := dialAny(ctx, path)
	if err != nil {
		return v, err
	}
	c.Close()
	return v, nil
}

// Fits is an error with the next step for one of another protocol.
func (v Version) Fits() error {
	if v.Protocol == Protocol {
		return nil
	}
	hint := "end it with: doppel quit -s"
	if v.Service {
		hint = "bring it to this release with: doppel rootd install"
	}
	return uerr.New(uerr.Conflict, hint, "doppel-rootd %s speaks protocol %d, not %d", v.Program, v.Protocol, Protocol)
}

// Stop ends the doppel-rootd that listens on path, of whatever release, if one does and it is not a service of the system. With ifIdle it is kept
// while a network is set through it, or where it cannot be asked for that.
func Stop(ctx context.Context, path string, ifIdle bool) (kept bool, err error) {
	c, v, err := dialAny(ctx, path)
	if errors.Is(err, ErrNotRunning) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer c.Close()
	if v.Service {
		return false, nil
	}
	if ifIdle && v.Protocol != Protocol {
		return true, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, quitTimeout, hangs(v))
	defer cancel()
	err = c.Quit(ctx, ifIdle)
	if e, ok := errors.AsType[*uerr.Error](err); ifIdle && ok && e.Kind == uerr.Conflict {
		return true, nil
	}
	return false, err
}

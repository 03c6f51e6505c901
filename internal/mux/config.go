// Package mux owns the session that carries many flow-controlled streams over one connection, symmetric and bounded in memory.
package mux

import (
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"time"

	"github.com/doppel-dev/doppel/internal/wire"
)

// Limits that are not configured: they follow from the wire format.
const (
	// MaxHeader is the longest OPEN payload in bytes.
	MaxHeader = wire.MaxPayload
	// MaxPacket is the longest datagram of WritePacket in bytes.
	MaxPacket = wire.MaxPayload
	// MaxReply is the longest answer of a Call in bytes.
	MaxReply = 4 << 20
)

// Config is a session's configuration. The zero value of each field means the default that stands beside it.
type Config struct {
	// Initiator is true on exactly one of the two ends: it opens the streams with odd numbers.
	Initiator bool
	// Window is the most a peer may send ahead on one stream, in bytes; 4 MiB, at least 128 KiB.
	Window int
	// InitialWindow is what a new stream is granted while there is plenty, in bytes; 256 KiB, rounded down to a power of two.
	InitialWindow int
	// Budget bounds the receive buffers and all credit of the session, in bytes; 32 MiB, at least 1 MiB.
	Budget int
	// MaxStreams bounds the streams open at once, of both ends together; 16,384.
	MaxStreams int
	// Backlog bounds the peer's streams that Accept has not yet returned; MaxStreams. More are rejected with CodeBusy, as are
	// those that come while the headers of streams not yet answered take 4 MiB.
	Backlog int
	// ID is what the two ends call the session when it is resumed; this package does not send it.
	ID string
	// Resume is how long the session outlives its connection, waiting for another (Detach); 0: not at all.
	Resume time.Duration
	// Resend bounds what a resumable session keeps until the peer has acknowledged it, in bytes; 4 MiB, a part of Budget.
	Resend int
	// KeepAlive is the interval between pings; 20 s. Negative: no pings, and a dead peer is not noticed.
	KeepAlive time.Duration
	// KeepAliveMisses is after how many silent intervals the session is dead; 3.
	KeepAliveMisses int
	// Linger is how long a closed stream waits for the peer's end before it is reset; 60 s (as Linux's tcp_fin_timeout).
	Linger time.Duration
	// Log receives what goes wrong; nil: nothing is logged.
	Log *slog.Logger
}

func (c Config) withDefaults() (Config, error) {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&c.Window, 4<<20)
	def(&c.InitialWindow, min(256<<10, c.Window))
	def(&c.Budget, 32<<20)
	def(&c.MaxStreams, 16384)
	def(&c.Backlog, c.MaxStreams)
	def(&c.KeepAliveMisses, 3)
	if c.Resume > 0 {
		def(&c.Resend, 4<<20)
	}
	if c.KeepAlive == 0 {
		c.KeepAlive = 20 * time.Second
	}
	if c.Linger == 0 {
		c.Linger = time.Minute
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	check(c.Window >= 128<<10 && c.Window <= 1<<wire.MaxWindowLog, "window %d: want 128 KiB to 64 MiB", c.Window)
	check(c.InitialWindow >= minWindow && c.InitialWindow <= c.Window, "initial window %d: want %d to %d", c.InitialWindow, minWindow, c.Window)
	check(c.Budget >= 1<<20, "budget %d: want at least 1 MiB", c.Budget)
	check(c.Resume >= 0, "resume %s: want 0 or more", c.Resume)
	check(c.Resend >= 0 && c.Resend <= c.Budget/4, "resend %d: want at most a quarter of the budget", c.Resend)
	check(c.MaxStreams > 0 && c.MaxStreams <= c.Budget/2/minWindow, "max streams %d: want 1 to %d with this budget", c.MaxStreams, c.Budget/2/minWindow)
	check(c.Backlog > 0, "backlog %d: want more than 0", c.Backlog)
	check(c.KeepAliveMisses > 0, "keep-alive misses %d: want more than 0", c.KeepAliveMisses)
	check(c.Linger > 0, "linger %s: want more than 0", c.Linger)
	return c, errors.Join(errs...)
}

// windowLog returns the exponent of the largest power of two that is not above n.
func windowLog(n int) uint8 { return uint8(bits.Len(uint(n)) - 1) }

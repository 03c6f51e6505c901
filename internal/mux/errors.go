package mux

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/doppel-dev/doppel/internal/wire"
)

// Errors that callers branch on.
var (
	// ErrSession is what every error of a stream or call is (errors.Is) when the whole session ended.
	ErrSession = errors.New("tunnel ended")
	// ErrClosed is the end of a session that this end closed.
	ErrClosed = errors.New("closed by this end")
	// ErrKeepAlive is the end of a session whose peer went silent.
	ErrKeepAlive = errors.New("peer is silent")
	// ErrTooManyStreams is returned by Open at Config.MaxStreams.
	ErrTooManyStreams = errors.New("too many streams")
	// ErrTooLarge is returned for a header, datagram or answer above its limit.
	ErrTooLarge = errors.New("message too large")
	// ErrAnswered is returned by a Request's second answer.
	ErrAnswered = errors.New("request already answered")
)

var (
	errTimeout  = os.ErrDeadlineExceeded
	errInternal = errors.New("internal failure")
)

// RejectError is the acceptor's refusal of a stream. It is (errors.Is) the errno of its code: ECONNREFUSED, EHOSTUNREACH, ETIMEDOUT or ECONNRESET.
type RejectError struct {
	Code wire.Code
	Msg  string
}

// Error returns the acceptor's message, or the code's name.
func (e *RejectError) Error() string {
	if e.Msg == "" {
		return "rejected: " + e.Code.String()
	}
	return e.Msg
}

// Is reports whether target is the code's errno.
func (e *RejectError) Is(target error) bool { return isErrno(e.Code, target) }

// ResetError is the end of a stream that the peer reset. It is (errors.Is) ECONNRESET, and the errno of its code.
type ResetError struct {
	Code wire.Code
}

// Error names the code.
func (e *ResetError) Error() string { return "stream reset by peer: " + e.Code.String() }

// Is reports whether target is ECONNRESET or the code's errno.
func (e *ResetError) Is(target error) bool {
	return target == syscall.ECONNRESET || isErrno(e.Code, target)
}

func isErrno(c wire.Code, target error) bool {
	n := c.Errno()
	return n != 0 && target == n //nolint:errorlint // target is compared, not wrapped
}

// GoAwayError is the end of a session that the peer ended.
type GoAwayError struct {
	Code wire.Code
	Msg  string
}

// Error returns the peer's code and message.
func (e *GoAwayError) Error() string {
	if e.Msg == "" {
		return "ended by peer: " + e.Code.String()
	}
	return fmt.Sprintf("ended by peer: %s: %s", e.Code, e.Msg)
}

// sessionError is the error of a stream whose session ended with cause.
func sessionError(cause error) error { return fmt.Errorf("%w: %w", ErrSession, cause) }

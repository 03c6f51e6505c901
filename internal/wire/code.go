package wire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
)

// Code says why a stream was refused or reset, or a session ended.
type Code uint16

// The codes of protocol version 1. An unknown code is treated as CodeInternal.
const (
	CodeNone        Code = 0  // an ordinary end (GOAWAY, RST)
	CodeRefused     Code = 1  // the destination refused the connection
	CodeUnreachable Code = 2  // no route to the destination
	CodeTimeout     Code = 3  // the destination did not answer in time
	CodeReset       Code = 4  // the connection was reset
	CodeDenied      Code = 5  // not allowed
	CodeNotFound    Code = 6  // what was named does not exist
	CodeGone        Code = 7  // it existed and has ended; do not try again
	CodeProtocol    Code = 8  // malformed or out of order
	CodeInternal    Code = 9  // a defect or an unclassified failure of the answering end
	CodeBusy        Code = 10 // a limit is reached; try again later
	CodeVersion     Code = 11 // no common protocol version
	CodeCanceled    Code = 12 // the other end no longer wants it
)

var codeNames = [...]string{
	"none", "refused", "unreachable", "timeout", "reset", "denied", "not-found", "gone", "protocol", "internal", "busy", "version", "canceled",
}

// String returns the code's name.
func (c Code) String() string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return fmt.Sprintf("code(%d)", uint16(c))
}

// Errno returns the system's error number for what a network application would see, or 0.
func (c Code) Errno() syscall.Errno {
	switch c {
	case CodeRefused:
		return syscall.ECONNREFUSED
	case CodeUnreachable:
		return syscall.EHOSTUNREACH
	case CodeTimeout:
		return syscall.ETIMEDOUT
	case CodeReset:
		return syscall.ECONNRESET
	case CodeNone, CodeDenied, CodeNotFound, CodeGone, CodeProtocol, CodeInternal, CodeBusy, CodeVersion, CodeCanceled:
	}
	return 0
}

// CodeOf classifies an error of a dial or of a connection.
func CodeOf(err error) Code {
	var ne net.Error
	var dns *net.DNSError
	switch {
	case err == nil:
		return CodeNone
	case isErrno(err, refusedErrnos):
		return CodeRefused
	case isErrno(err, unreachableErrnos):
		return CodeUnreachable
	case isErrno(err, resetErrnos):
		return CodeReset
	case errors.As(err, &dns) && dns.IsNotFound:
		return CodeNotFound
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), isErrno(err, timeoutErrnos),
		errors.As(err, &ne) && ne.Timeout():
		return CodeTimeout
	case errors.Is(err, context.Canceled):
		return CodeCanceled
	case isErrno(err, deniedErrnos):
		return CodeDenied
	}
	return CodeInternal
}

func isErrno(err error, set []syscall.Errno) bool {
	var e syscall.Errno
	if !errors.As(err, &e) {
		for _, n := range set { // errors that map themselves, such as a rejected stream
			if errors.Is(err, n) {
				return true
			}
		}
		return false
	}
	for _, n := range set {
		if e == n {
			return true
		}
	}
	return false
}

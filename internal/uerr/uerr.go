// Package uerr owns the errors a user reads: a kind from a closed set, one line of what happened, and a hint with the next step.
package uerr

import (
	"errors"
	"fmt"
	"strings"
)

// Kind classifies an error; it crosses the local API and decides the exit code.
type Kind string

// The closed set of kinds.
const (
	Internal     Kind = "internal"      // a defect of ours, or anything not classified
	Usage        Kind = "usage"         // the command line is wrong
	Denied       Kind = "denied"        // Kubernetes, sudo or a policy says no
	NotConnected Kind = "not-connected" // the command needs a session and there is none
	Cluster      Kind = "cluster"       // the cluster or something in it does not answer or is broken
	NotFound     Kind = "not-found"     // what the user named does not exist
	NoManager    Kind = "no-manager"    // no traffic-manager is installed
	Conflict     Kind = "conflict"      // somebody or something already holds it
	LeftBehind   Kind = "left-behind"   // what was begun, and failed, could not be undone
	Canceled     Kind = "canceled"      // interrupted by the user
)

// ExitCode maps a kind to the process's exit code (design: 0 ok, 1 error, 2 usage, 3 denied, 4 not connected, 5 cluster, 130 interrupted).
func (k Kind) ExitCode() int {
	switch k {
	case Usage:
		return 2
	case Denied:
		return 3
	case NotConnected:
		return 4
	case Cluster, LeftBehind:
		return 5
	case Canceled:
		return 130
	case Internal, NotFound, NoManager, Conflict:
		return 1
	}
	return 1
}

// Error is an error with a kind and a hint for the user; it is also its own JSON form on the local API.
type Error struct {
	Kind Kind   `json:"kind"`
	Msg  string `json:"error"`
	Hint string `json:"hint,omitempty"`
	Err  error  `json:"-"`
}

// Error returns the message followed by its cause.
func (e *Error) Error() string {
	if e.Err == nil {
		return e.Msg
	}
	if e.Msg == "" {
		return e.Err.Error()
	}
	return e.Msg + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// New returns an error of kind k without a cause.
func New(k Kind, hint, format string, args ...any) *Error {
	return &Error{Kind: k, Msg: fmt.Sprintf(format, args...), Hint: hint}
}

// Wrap returns an error of kind k around err; the kind and hint of an *Error inside err win over k and hint.
func Wrap(err error, k Kind, hint, format string, args ...any) *Error {
	e := &Error{Kind: k, Msg: fmt.Sprintf(format, args...), Hint: hint, Err: err}
	var inner *Error
	if errors.As(err, &inner) {
		e.Kind = inner.Kind
		if inner.Hint != "" {
			e.Hint = inner.Hint
		}
	}
	return e
}

// From returns err as an *Error; an error without a kind becomes Internal.
func From(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if errors.As(err, &e) {
		return &Error{Kind: e.Kind, Msg: err.Error(), Hint: e.Hint}
	}
	return &Error{Kind: Internal, Msg: err.Error()}
}

// ShellQuote quotes s for a POSIX shell, into which a hint's command is copied.
func ShellQuote(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

package lifecycle

import (
	"errors"
	"slices"
	"syscall"
	"time"
)

// A failed accept is tried again after acceptPause, and after twice as long each time until it is acceptPauseMax.
const (
	acceptPause    = time.Millisecond
	acceptPauseMax = 100 * time.Millisecond
)

var passing = []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED}

// Passes says whether an error of accept(2) or recv(2) says nothing about the socket: no descriptors or memory at the moment, a client that has gone already.
func Passes(err error) bool {
	return slices.ContainsFunc(passing, func(p error) bool { return errors.Is(err, p) })
}

// Accept calls a listener's accept until it gives a connection, or an error that does not pass.
func Accept[C any](accept func() (C, error)) (C, error) {
	for pause := acceptPause; ; pause = min(2*pause, acceptPauseMax) {
		c, err := accept()
		if err == nil || !Passes(err) {
			return c, err
		}
		time.Sleep(pause) // until some connections have ended; nobody has to end this: the next accept of a closed listener fails
	}
}

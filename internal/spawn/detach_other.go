//go:build !unix

package spawn

import "errors"

// detached is not written for this system yet.
func detached(string, ...string) error {
	return errors.New("starting the daemons is not supported on this system yet")
}

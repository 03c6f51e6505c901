package userd

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// bindTo has a socket use one link only, which needs no privilege since Linux 5.7 (socket(7), SO_BINDTODEVICE).
func bindTo(link string) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), link) })
		return errors.Join(cerr, err)
	}
}

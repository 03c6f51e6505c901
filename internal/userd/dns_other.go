//go:build !linux

package userd

import (
	"errors"
	"syscall"
)

func bindTo(string) func(network, address string, c syscall.RawConn) error {
	return func(string, string, syscall.RawConn) error { return errors.ErrUnsupported }
}

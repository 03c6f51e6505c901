//go:build !linux && !darwin && !windows

package tundev

import (
	"os"

	"github.com/doppel-dev/doppel/internal/uerr"
)

var errUnsupported = uerr.New(uerr.Internal, "use doppel on Linux, or in a Linux virtual machine (WSL 2)", "network interfaces are not supported on this operating system yet")

// Open is not supported here yet.
func Open(name string, mtu int, owner uint32) (*os.File, string, error) {
	return nil, "", errUnsupported
}

// Device is not supported here yet.
type Device struct{}

// New is not supported here yet.
func New(f *os.File) (*Device, error) { return nil, errUnsupported }

// Name is not supported here yet.
func (d *Device) Name() (string, error) { return "", errUnsupported }

// ReadPacket is not supported here yet.
func (d *Device) ReadPacket(p []byte) (int, Header, error) { return 0, Header{}, errUnsupported }

// WritePacket is not supported here yet.
func (d *Device) WritePacket(h Header, parts [][]byte) error { return errUnsupported }

// Splits is not supported here yet.
func (d *Device) Splits() bool { return false }

// Close is not supported here yet.
func (d *Device) Close() error { return errUnsupported }

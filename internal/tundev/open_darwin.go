package tundev

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// Open creates a utun device that lives as long as its last descriptor does. macOS names it; the name is returned. Devices have no owner
// there. mtu 0 means DefaultMTU. It needs root.
func Open(_ string, mtu int, _ uint32) (*os.File, string, error) {
	if mtu == 0 {
		mtu = DefaultMTU
	}
	t, err := tun.CreateTUN("utun", mtu)
	if err != nil {
		if errors.Is(err, syscall.EPERM) {
			return nil, "", uerr.Wrap(err, uerr.Denied, "run it as root", "create a utun device")
		}
		return nil, "", fmt.Errorf("create a utun device: %w", err)
	}
	defer t.Close()
	name, err := t.Name()
	if err != nil {
		return nil, "", err
	}
	fd, err := unix.FcntlInt(t.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, "", fmt.Errorf("duplicate the utun descriptor: %w", err)
	}
	return os.NewFile(uintptr(fd), name), name, nil
}

// New takes over f, a device's descriptor from Open (perhaps passed by another process). Close of the Device closes f.
func New(f *os.File) (*Device, error) {
	t, err := tun.CreateTUNFromFile(f, 0)
	if err != nil {
		return nil, fmt.Errorf("tun descriptor: %w", err)
	}
	return newDevice(t), nil
}

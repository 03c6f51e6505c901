package osdns

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// MarkedSocket opens an unbound, non-blocking socket with Mark for network "udp4", "udp6", "tcp4" or "tcp6". It needs CAP_NET_ADMIN;
// whoever is given the socket does not.
func MarkedSocket(network string) (*os.File, error) {
	family, typ := unix.AF_INET, unix.SOCK_DGRAM
	switch network {
	case "udp4":
	case "udp6":
		family = unix.AF_INET6
	case "tcp4":
		typ = unix.SOCK_STREAM
	case "tcp6":
		family, typ = unix.AF_INET6, unix.SOCK_STREAM
	default:
		return nil, fmt.Errorf("marked socket: unknown network %q", network)
	}
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("marked socket: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, Mark); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("marked socket: set SO_MARK: %w", err)
	}
	return os.NewFile(uintptr(fd), "marked "+network), nil
}

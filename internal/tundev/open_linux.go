package tundev

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/uerr"
)

const devNetTun = "/dev/net/tun"

// QueueLen is how many packets wait for the reader. The kernel's 500 lost half the SYNs of 1,000 connections opened at once, and each loss
// costs its connection a second or more. TCP's windows bound the bytes.
const QueueLen = 8192

// Open creates a TUN device that lives as long as its last descriptor does (it is never persistent) and belongs to owner. The name
// may hold one %d for the kernel to fill in; the name that resulted is returned. mtu 0 means DefaultMTU. The device is down and
// without addresses. It needs CAP_NET_ADMIN.
func Open(name string, mtu int, owner uint32) (*os.File, string, error) {
	if mtu == 0 {
		mtu = DefaultMTU
	}
	fd, err := unix.Open(devNetTun, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, "", openError(err)
	}
	got, err := configure(fd, name, mtu, owner)
	if err != nil {
		unix.Close(fd)
		return nil, "", err
	}
	return os.NewFile(uintptr(fd), devNetTun), got, nil
}

func openError(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV):
		return uerr.Wrap(err, uerr.Internal, "load the kernel's tun module (modprobe tun); in a container, pass the device /dev/net/tun in", "open %s", devNetTun)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return uerr.Wrap(err, uerr.Denied, "run it as root (CAP_NET_ADMIN)", "open %s", devNetTun)
	}
	return fmt.Errorf("open %s: %w", devNetTun, err)
}

// configure turns the fresh descriptor into the device; see linux Documentation/networking/tuntap.rst.
func configure(fd int, name string, mtu int, owner uint32) (string, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return "", fmt.Errorf("interface name %q: %w", name, err)
	}
	// IFF_TUN_EXCL: never attach to a device of that name that exists already.
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		switch {
		case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
			return "", uerr.Wrap(err, uerr.Conflict, "another doppel may be connected; choose another name or end it", "interface %s exists", name)
		case errors.Is(err, unix.EPERM):
			return "", uerr.Wrap(err, uerr.Denied, "run it as root (CAP_NET_ADMIN)", "create interface %s", name)
		}
		return "", fmt.Errorf("create interface %s: %w", name, err)
	}
	got := ifr.Name()
	if err := unix.IoctlSetInt(fd, unix.TUNSETOWNER, int(owner)); err != nil {
		return "", fmt.Errorf("set owner of %s: %w", got, err)
	}
	// Without USO the kernel still splits UDP; with TSO a TCP super packet comes through whole.
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6); err != nil {
		return "", fmt.Errorf("set offload of %s: %w", got, err)
	}
	if err := setLink(got, unix.SIOCSIFMTU, mtu); err != nil {
		return "", fmt.Errorf("set mtu of %s to %d: %w", got, mtu, err)
	}
	// In a user namespace only netlink may set it (osroute.Link.SetQueueLen): the ioctl wants the right on the whole machine.
	if err := setLink(got, unix.SIOCSIFTXQLEN, QueueLen); err != nil && !errors.Is(err, unix.EPERM) {
		return "", fmt.Errorf("set queue length of %s: %w", got, err)
	}
	return got, nil
}

// setLink sets one number of an interface; see netdevice(7).
func setLink(name string, request uint, value int) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	ifr.SetUint32(uint32(value))
	return unix.IoctlIfreq(s, request, ifr)
}

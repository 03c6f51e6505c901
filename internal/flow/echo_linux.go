package flow

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
)

// pingSocket makes an unprivileged ICMP socket that is connected to dst.
func pingSocket(dst netip.Addr) (*net.UDPConn, error) {
	family, proto, level, recverr := syscall.AF_INET6, syscall.IPPROTO_ICMPV6, syscall.IPPROTO_IPV6, syscall.IPV6_RECVERR
	var to syscall.Sockaddr = &syscall.SockaddrInet6{Addr: dst.As16()}
	if dst.Is4() {
		family, proto, level, recverr = syscall.AF_INET, syscall.IPPROTO_ICMP, syscall.IPPROTO_IP, syscall.IP_RECVERR
		to = &syscall.SockaddrInet4{Addr: dst.As4()}
	}
	fd, err := syscall.Socket(family, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, os.NewSyscallError("icmp socket", err)
	}
	f := os.NewFile(uintptr(fd), "icmp")
	defer f.Close()
	// Without it the kernel keeps "host unreachable" to itself: it takes it for a passing one.
	if err := syscall.SetsockoptInt(fd, level, recverr, 1); err != nil {
		return nil, os.NewSyscallError("icmp socket", err)
	}
	if err := syscall.Connect(fd, to); err != nil {
		return nil, fmt.Errorf("connect to %v: %w", dst, err)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UDPConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("an ICMP socket is a %T", c), c.Close())
	}
	return u, nil
}

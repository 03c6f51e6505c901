package tunnel

import (
	"os"

	"golang.org/x/sys/unix"
)

func tune(fd uintptr) error {
	if err := unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return os.NewSyscallError("setsockopt TCP_NODELAY", err)
	}
	// Not known or not allowed everywhere (tcp(7), tcp_allowed_congestion_control): a wish only.
	_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "bbr")
	return os.NewSyscallError("setsockopt TCP_NOTSENT_LOWAT",
		unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, NotSentLowat))
}

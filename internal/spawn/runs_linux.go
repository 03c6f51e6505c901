package spawn

import "golang.org/x/sys/unix"

// runs says whether a process has not ended. One that nobody has waited for has: its descriptor is readable (pidfd_open(2)).
func runs(pid int) bool {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return err == nil && n == 0
}

package rootd

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// OpenLog opens the log file with the rights of the user that doppel-rootd works for: with root's, whoever may start doppel-rootd
// could have any file written to. An empty path means standard error.
func OpenLog(path string, uid int) (*os.File, error) {
	if path == "" {
		return os.Stderr, nil
	}
	type opened struct {
		f   *os.File
		err error
	}
	ch := make(chan opened)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread, whose rights are gone, ends with this goroutine
		f, err := openAs(path, uid)
		ch <- opened{f, err}
	}()
	o := <-ch
	if o.err != nil {
		return nil, fmt.Errorf("open log: %w", o.err)
	}
	return o.f, nil
}

// nogroup is the group of a file system access that has none (systemd's and Debian's number).
const nogroup = 65534

// openAs opens the file after it has given the calling thread's file rights to uid (setfsuid(2): Linux credentials are per thread).
func openAs(path string, uid int) (*os.File, error) {
	if uid > 0 {
		if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); e != 0 {
			return nil, fmt.Errorf("drop groups: %w", e)
		}
		if err := unix.Setfsgid(nogroup); err != nil {
			return nil, err
		}
		if err := unix.Setfsuid(uid); err != nil {
			return nil, err
		}
		if now, err := unix.SetfsuidRetUid(-1); err != nil || now != uid {
			return nil, errors.Join(errors.New("the file rights were not dropped"), err)
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && (!st.Mode().IsRegular() || st.Sys().(*syscall.Stat_t).Nlink != 1) {
		err = fmt.Errorf("%s is no plain file, or one with several names", path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

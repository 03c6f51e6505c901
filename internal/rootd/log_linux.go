package rootd

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// OpenLog opens a log file to append to, standard error for "", and gives it to the user uid, if that is one, to read. The directory may be that user's, and the
// writer is root: so it follows no symbolic link and takes no file that has another name.
func OpenLog(path string, uid int) (*os.File, error) {
	if path == "" {
		return os.Stderr, nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	if err := takeLog(f, uid); err != nil {
		f.Close()
		return nil, fmt.Errorf("open log %s: %w", path, err)
	}
	return f, nil
}

func takeLog(f *os.File, uid int) error {
	var st unix.Stat_t
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := rc.Control(func(fd uintptr) { serr = unix.Fstat(int(fd), &st) }); err != nil {
		return err
	}
	switch {
	case serr != nil:
		return serr
	case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1:
		return errors.New("no plain file, or one with several names")
	case uid > 0 && int(st.Uid) != uid:
		return f.Chown(uid, -1)
	}
	return nil
}

//go:build unix

package localapi

import (
	"fmt"
	"io"
	"os"
	"syscall"
)

// checkPrivate refuses a directory that somebody else can put sockets into: below /tmp anybody may have made it first.
func checkPrivate(dir string) error {
	fi, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || !fi.IsDir() || int(st.Uid) != os.Geteuid() || fi.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s is not a directory that only you can write to", dir)
	}
	return nil
}

// lockFile takes a lock that ends with the process at the latest (flock(2)).
func lockFile(path string) (io.Closer, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%s is locked: %w", path, err)
	}
	return f, nil
}

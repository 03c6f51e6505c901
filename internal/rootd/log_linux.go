package rootd

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// OpenLog opens a log file to append to. It follows no symbolic link: the directory may be a user's, and the writer is root.
func OpenLog(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW, 0o640)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return f, nil
}

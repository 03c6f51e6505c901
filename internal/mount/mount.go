// Package mount owns the laptop's view of an app's files: a FUSE file system over the SFTP server of a pod.
package mount

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
)

// DefaultBudget bounds what is kept in memory of files: read ahead, and as much again that is not written yet.
const DefaultBudget = 16 << 20

// Config is what a mount needs; every field but ReadOnly, Budget and Log is required.
type Config struct {
	// Point is the directory to mount on.
	Point string
	// Source is what the table of mounts shows as the device.
	Source string
	// Dial opens a stream to a file server; again when one is lost.
	Dial func(context.Context) (io.ReadWriteCloser, error)
	// ReadOnly refuses to change anything.
	ReadOnly bool
	// Budget is in bytes; 0: DefaultBudget.
	Budget int
	// Log is told what is wrong with the files of a mount; nil: nobody is.
	Log *slog.Logger
}

// PreparePoint makes sure that there is an empty directory to mount on. It says whether it made it. With replace, an earlier copy of files
// (see Copy) is removed from it.
func PreparePoint(point string, replace bool) (made bool, err error) {
	if err := os.MkdirAll(filepath.Dir(point), 0o700); err != nil {
		return false, err
	}
	if err := os.Mkdir(point, 0o700); err == nil {
		return true, nil
	} else if !errors.Is(err, os.ErrExist) {
		return false, err
	}
	names, err := os.ReadDir(point)
	if errors.Is(err, syscall.ENOTCONN) { // a mount whose daemon was killed, with the process that was to unmount it
		if err = unmount(point); err == nil {
			names, err = os.ReadDir(point)
		}
	}
	if err == nil && replace && isCopy(names) {
		return false, clean(point, names)
	}
	if err == nil && len(names) > 0 {
		err = fmt.Errorf("%s is not empty", point)
	}
	return false, err
}

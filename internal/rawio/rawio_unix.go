//go:build unix && !linux

package rawio

import (
	"errors"
	"syscall"
)

// Read is read(2).
func Read(fd uintptr, p []byte) (int, error) { return again(syscall.Read, fd, p) }

// Write is write(2).
func Write(fd uintptr, p []byte) (int, error) { return again(syscall.Write, fd, p) }

func again(do func(int, []byte) (int, error), fd uintptr, p []byte) (int, error) {
	for {
		if n, err := do(int(fd), p); !errors.Is(err, syscall.EINTR) {
			return max(n, 0), err
		}
	}
}

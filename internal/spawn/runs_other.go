//go:build !linux

package spawn

import (
	"os"
	"syscall"
)

// runs says whether a process has not ended.
func runs(pid int) bool {
	p, err := os.FindProcess(pid)
	if err != nil {
		return false
	}
	defer func() { _ = p.Release() }()
	return p.Signal(syscall.Signal(0)) == nil
}

//go:build !windows

package wire

import "syscall"

var (
	refusedErrnos     = []syscall.Errno{syscall.ECONNREFUSED}
	unreachableErrnos = []syscall.Errno{syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.ENETDOWN}
	timeoutErrnos     = []syscall.Errno{syscall.ETIMEDOUT}
	resetErrnos       = []syscall.Errno{syscall.ECONNRESET, syscall.EPIPE, syscall.ECONNABORTED}
	deniedErrnos      = []syscall.Errno{syscall.EACCES, syscall.EPERM}
)

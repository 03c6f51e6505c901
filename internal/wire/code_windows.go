package wire

import (
	"syscall"

	"golang.org/x/sys/windows"
)

// Go's syscall.E… are invented numbers on Windows; sockets return Winsock's (WSAE…).
var (
	refusedErrnos     = []syscall.Errno{syscall.ECONNREFUSED, windows.WSAECONNREFUSED}
	unreachableErrnos = []syscall.Errno{syscall.EHOSTUNREACH, syscall.ENETUNREACH, windows.WSAEHOSTUNREACH, windows.WSAENETUNREACH, windows.WSAENETDOWN, windows.WSAEHOSTDOWN}
	timeoutErrnos     = []syscall.Errno{syscall.ETIMEDOUT, windows.WSAETIMEDOUT}
	resetErrnos       = []syscall.Errno{syscall.ECONNRESET, syscall.EPIPE, syscall.ECONNABORTED, windows.WSAECONNRESET, windows.WSAECONNABORTED}
	deniedErrnos      = []syscall.Errno{syscall.EACCES, syscall.EPERM, windows.WSAEACCES}
)

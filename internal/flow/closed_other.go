//go:build !linux

package flow

import "net"

// closed does not know.
func closed(*net.TCPConn) bool { return false }

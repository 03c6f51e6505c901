//go:build !linux

package rawio

import "net"

// New returns c.
func New(c net.Conn) net.Conn { return c }

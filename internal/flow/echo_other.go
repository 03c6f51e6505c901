//go:build !linux

package flow

import (
	"errors"
	"net"
	"net/netip"
)

func pingSocket(netip.Addr) (*net.UDPConn, error) { return nil, errors.ErrUnsupported }

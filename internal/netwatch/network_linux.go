package netwatch

import (
	"context"
	"errors"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Network calls poke, on a goroutine of its own, after each change of links, addresses and routes until ctx ends. It returns when
// it listens. It needs no privilege.
func Network(ctx context.Context, poke func()) error {
	const groups = unix.RTMGRP_LINK | unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE
	c, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: groups})
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	go func() {
		defer stop()
		for {
			// ENOBUFS: messages were lost, which is a change as well (netlink(7)).
			if _, err := c.Receive(); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return // closed
			}
			poke()
		}
	}()
	return nil
}

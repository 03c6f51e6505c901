package osroute

import (
	"fmt"

	"github.com/vishvananda/netlink"
)

// SetQueueLen sets how many packets may wait for the device's reader.
func (l Link) SetQueueLen(packets int) error {
	link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: l.Index, Name: l.Name}}
	if err := netlink.LinkSetTxQLen(link, packets); err != nil {
		return fmt.Errorf("set queue length of %s: %w", l.Name, err)
	}
	return nil
}

package resolver

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/miekg/dns"
)

// ReadConfig reads the upstreams and search domains of a resolv.conf(5).
func ReadConfig(path string) (upstreams []netip.AddrPort, search []string, err error) {
	c, err := dns.ClientConfigFromFile(path)
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", path, err)
	}
	port, err := strconv.ParseUint(c.Port, 10, 16)
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: port %q", path, c.Port)
	}
	for _, s := range c.Servers {
		if a, err := netip.ParseAddr(s); err == nil { // the C library ignores what is no address, too
			upstreams = append(upstreams, netip.AddrPortFrom(a.Unmap(), uint16(port)))
		}
	}
	if len(upstreams) == 0 { // resolv.conf(5): without any, the local machine's
		upstreams = append(upstreams, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(port)))
	}
	for _, s := range c.Search {
		search = append(search, strings.TrimSuffix(s, "."))
	}
	return upstreams, search, nil
}

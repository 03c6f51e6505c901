package osroute

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// protocol marks our routes in the table ("ip route" shows proto 208), so that only they are ever removed.
const protocol = 208

// metric is that of our routes. Nearly all others are smaller: a VPN that comes up with a subnet of ours can set its route, and it wins.
const metric = 9000

// addrGenModeNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const addrGenModeNone = 1

const (
	settleMax  = time.Second
	settleStep = 2 * time.Millisecond
)

// Link is an interface at the time of the call.
type Link struct {
	Index int
	Name  string
	MTU   int
	// TUN says that it is a TUN device, and Owner whose (TUNSETOWNER).
	TUN   bool
	Owner uint32
}

// Find returns the interface called name; the error is fs.ErrNotExist-like (uerr.NotFound) when there is none.
func Find(name string) (Link, error) {
	l, err := netlink.LinkByName(name)
	if err != nil {
		if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
			return Link{}, uerr.Wrap(err, uerr.NotFound, "", "interface %s", name)
		}
		return Link{}, fmt.Errorf("find interface %s: %w", name, err)
	}
	out := Link{Index: l.Attrs().Index, Name: l.Attrs().Name, MTU: l.Attrs().MTU}
	if t, ok := l.(*netlink.Tuntap); ok && t.Mode == netlink.TUNTAP_MODE_TUN {
		out.TUN, out.Owner = true, t.Owner
	}
	return out, nil
}

// Remove deletes the interface with everything on it, if it is there.
func (l Link) Remove() error {
	err := netlink.LinkDel(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: l.Index}})
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// Others lists the routes of the main table that are not l's, without default routes: those that a route of ours could be equal to.
func (l Link) Others() ([]Existing, error) {
	return list(unix.RT_TABLE_MAIN, func(r Existing, index int) bool { return index == l.Index })
}

// Existings lists the routes that lead somewhere else than to the interface called own, in all tables, without default routes: what VPNs keep
// in a table of their own counts as well.
func Existings(own string) ([]Existing, error) {
	return list(unix.RT_TABLE_UNSPEC, func(r Existing, _ int) bool { return r.Link == own })
}

// list lists the unicast routes of a table but for those that skip wants skipped.
func list(table int, skip func(r Existing, index int) bool) ([]Existing, error) {
	names := map[int]string{}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, li := range links {
		names[li.Attrs().Index] = li.Attrs().Name
	}
	var out []Existing
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			index := r.LinkIndex
			if len(r.MultiPath) > 0 {
				index = r.MultiPath[0].LinkIndex
			}
			p, ok := prefixOf(r.Dst)
			if !ok || p.Bits() == 0 || index == 0 || r.Type != unix.RTN_UNICAST || r.Table == unix.RT_TABLE_LOCAL ||
				p.Addr().IsLinkLocalUnicast() || p.Addr().IsMulticast() || p.Addr().IsLoopback() {
				continue
			}
			e := Existing{Prefix: p.Masked(), Link: names[index]}
			if !skip(e, index) && !slices.Contains(out, e) {
				out = append(out, e)
			}
		}
	}
	return out, nil
}

// Apply makes mtu, addrs and routes those of l, and brings it up. What is in force already is not touched; nothing of another interface
// ever is. The warnings tell of addresses and routes of a family that the machine has switched off.
func (l Link) Apply(mtu int, addrs, routes []netip.Prefix) (warnings []string, err error) {
	link, err := netlink.LinkByIndex(l.Index)
	if err != nil {
		return nil, fmt.Errorf("find interface %s: %w", l.Name, err)
	}
	if err := bringUp(link, mtu); err != nil {
		return nil, err
	}
	added, w1, err := l.setAddrs(link, addrs)
	if err != nil {
		return nil, err
	}
	w2, err := l.setRoutes(routes)
	if err != nil {
		return nil, err
	}
	settle(added)
	return slices.Concat(w1, w2), nil
}

// bringUp asks for nothing that is so already: the kernel would announce it as a change, and whoever applies again after changes would never end.
func bringUp(link netlink.Link, mtu int) error {
	is := link.Attrs()
	if mtu != 0 && mtu != is.MTU {
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return fmt.Errorf("set mtu of %s to %d: %w", is.Name, mtu, err)
		}
	}
	if is.Flags&net.FlagUp != 0 {
		return nil
	}
	// No link-local address, so that the kernel does not solicit routers into the device; older kernels may lack it.
	_ = netlink.LinkSetIP6AddrGenMode(link, addrGenModeNone)
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", is.Name, err)
	}
	return nil
}

// settle waits until the kernel takes packets for the IPv6 addresses: even without duplicate address detection it makes their local routes in
// a worker, and until then an application's first connection would lose the answer.
func settle(addrs []netip.Prefix) {
	deadline := time.Now().Add(settleMax)
	for _, p := range addrs {
		for p.Addr().Is6() && time.Now().Before(deadline) {
			rs, err := netlink.RouteGet(p.Addr().AsSlice())
			if err == nil && len(rs) > 0 && rs[0].Type == unix.RTN_LOCAL {
				break
			}
			time.Sleep(settleStep)
		}
	}
}

func (l Link) setAddrs(link netlink.Link, want []netip.Prefix) (added []netip.Prefix, warnings []string, err error) {
	have, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil, nil, fmt.Errorf("list addresses of %s: %w", l.Name, err)
	}
	var had []netip.Prefix
	for _, a := range have {
		p, ok := prefixOf(a.IPNet)
		if !ok || p.Addr().IsLinkLocalUnicast() {
			continue
		}
		if !slices.Contains(want, p) {
			if err := netlink.AddrDel(link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				return nil, nil, fmt.Errorf("remove %v from %s: %w", p, l.Name, err)
			}
			continue
		}
		had = append(had, p)
	}
	for _, p := range want {
		if slices.Contains(had, p) {
			continue
		}
		// NODAD: nobody else is on this link. NOPREFIXROUTE: routes come from the list of routes alone.
		a := &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE}
		switch err := netlink.AddrAdd(link, a); {
		case err == nil, errors.Is(err, unix.EEXIST):
			added = append(added, p)
		case p.Addr().Is6() && off6(err):
			warnings = append(warnings, fmt.Sprintf("IPv6 is off on this machine: %v is not set", p))
		default:
			return nil, nil, fmt.Errorf("add %v to %s: %w", p, l.Name, err)
		}
	}
	return added, warnings, nil
}

func (l Link) setRoutes(want []netip.Prefix) (warnings []string, err error) {
	have, err := l.routes()
	if err != nil {
		return nil, err
	}
	for _, p := range have {
		if slices.Contains(want, p) {
			continue
		}
		if err := netlink.RouteDel(l.route(p)); err != nil && !errors.Is(err, unix.ESRCH) {
			return nil, fmt.Errorf("remove route %v: %w", p, err)
		}
	}
	for _, p := range want {
		if slices.Contains(have, p) {
			continue
		}
		switch err := netlink.RouteAdd(l.route(p)); {
		case err == nil:
		case errors.Is(err, unix.EEXIST): // another program was faster; never replace its route
			warnings = append(warnings, fmt.Sprintf("%v is not routed to the cluster: another interface has it", p))
		case p.Addr().Is6() && off6(err):
			warnings = append(warnings, fmt.Sprintf("IPv6 is off on this machine: %v is not routed", p))
		default:
			return nil, fmt.Errorf("add route %v: %w", p, err)
		}
	}
	return warnings, nil
}

// routes lists ours on l.
func (l Link) routes() ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		filter := &netlink.Route{LinkIndex: l.Index, Protocol: protocol, Table: unix.RT_TABLE_MAIN}
		rs, err := netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_OIF|netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, fmt.Errorf("list routes of %s: %w", l.Name, err)
		}
		for _, r := range rs {
			if p, ok := prefixOf(r.Dst); ok {
				out = append(out, p)
			}
		}
	}
	return out, nil
}

func (l Link) route(p netip.Prefix) *netlink.Route {
	r := &netlink.Route{LinkIndex: l.Index, Dst: ipNet(p), Protocol: protocol, Table: unix.RT_TABLE_MAIN, Priority: metric}
	if p.Addr().Is4() {
		r.Scope = netlink.SCOPE_LINK
	}
	return r
}

// off6 recognises a machine with IPv6 disabled by sysctl or boot option.
func off6(err error) bool {
	return errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}, false
	}
	ones, bits := n.Mask.Size()
	a = a.Unmap()
	if a.BitLen() != bits {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, ones), true
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

package osdns

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// UplinkConf is where systemd-resolved writes the servers that it asks itself, in the form of a resolv.conf.
const UplinkConf = "/run/systemd/resolve/resolv.conf"

// stubs are the addresses at which systemd-resolved answers (systemd-resolved.service(8)).
var stubs = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 53}), netip.AddrFrom4([4]byte{127, 0, 0, 54})}

// Sight is what LookAt saw.
type Sight struct {
	Facts
	// Uplinks are those that systemd-resolved asks itself, where it can be told things.
	Uplinks []netip.Addr
	Search  []string
}

// Upstreams answer the names that are not the cluster's: the resolvers themselves, or those behind systemd-resolved's stub while it is what
// asks us. Given up, it is asked as without doppel: only it knows which of its servers is for which domain.
func (s Sight) Upstreams() []netip.Addr {
	if s.Stub && s.ResolvedError == nil {
		return s.Uplinks
	}
	var out []netip.Addr
	for _, r := range s.Resolvers {
		out = append(out, r.Addr)
	}
	return out
}

// LookAt gathers the facts of this machine but for NFTError. resolvConf is the file's path, device the index of ours, whose routes do not
// count, and server the one behind it, which is nobody's upstream.
func LookAt(resolvConf string, device int, server netip.Addr) (Sight, error) {
	rc, err := readResolvConf(resolvConf)
	if err != nil {
		return Sight{}, err
	}
	s := Sight{Search: rc.Search}
	s.Stub = !slices.ContainsFunc(rc.Resolvers, func(a netip.Addr) bool { return !slices.Contains(stubs, a) })
	if s.Stub {
		if s.ResolvedError = probeResolved(); s.ResolvedError == nil {
			up, err := readResolvConf(UplinkConf)
			if err != nil {
				return Sight{}, err
			}
			s.Uplinks = slices.DeleteFunc(up.Resolvers, func(a netip.Addr) bool { return a == server })
		}
	}
	if s.LinkLocal, err = linkLocal(); err != nil {
		return Sight{}, err
	}
	routes, err := mainRoutes(device)
	if err != nil {
		return Sight{}, err
	}
	for _, a := range rc.Resolvers {
		r := way(a, routes)
		if r.Link != "" && a.Is4() {
			r.RPFilter = max(rpFilter("all"), rpFilter(r.Link)) // ip-sysctl.rst: the greater one is used
		}
		s.Resolvers = append(s.Resolvers, r)
	}
	return s, nil
}

func linkLocal() ([]netip.Addr, error) {
	links, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var out []netip.Addr
	for _, l := range links {
		addrs, err := l.Addrs()
		if err != nil {
			continue // it has just gone
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() {
				out = append(out, p.Addr().WithZone(l.Name))
			}
		}
	}
	return out, nil
}

func readResolvConf(file string) (ResolvConf, error) {
	data, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return ResolvConf{}, err
	}
	return ParseResolvConf(data), nil
}

// route is one of the main table.
type route struct {
	dst     netip.Prefix
	gateway netip.Addr
	link    string
	metric  int
}

// way finds how an address is reached: the longest prefix, then the least metric.
func way(a netip.Addr, routes []route) Resolver {
	r := Resolver{Addr: a}
	var best *route
	for i := range routes {
		o := &routes[i]
		r.Gateway = r.Gateway || o.gateway == a
		if !o.dst.Contains(a) {
			continue
		}
		r.Host = r.Host || o.dst.IsSingleIP()
		if best == nil || o.dst.Bits() > best.dst.Bits() || o.dst.Bits() == best.dst.Bits() && o.metric < best.metric {
			best = o
		}
	}
	if best != nil {
		r.Link = best.link
	}
	return r
}

// mainRoutes lists the routes of the main table, less those of one device.
func mainRoutes(device int) ([]route, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	var out []route
	for family, all := range map[int]netip.Prefix{
		netlink.FAMILY_V4: netip.PrefixFrom(netip.IPv4Unspecified(), 0), netlink.FAMILY_V6: netip.PrefixFrom(netip.IPv6Unspecified(), 0),
	} {
		rs, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range rs {
			if r.LinkIndex == device && device != 0 {
				continue
			}
			o := route{dst: all, link: names[r.LinkIndex], metric: r.Priority}
			if r.Dst != nil {
				addr, ok := netip.AddrFromSlice(r.Dst.IP)
				ones, _ := r.Dst.Mask.Size()
				if !ok {
					continue
				}
				o.dst = netip.PrefixFrom(addr.Unmap(), ones)
			}
			if gw, ok := netip.AddrFromSlice(r.Gw); ok {
				o.gateway = gw.Unmap()
			}
			out = append(out, o)
		}
	}
	return out, nil
}

func rpFilter(link string) int {
	b, err := os.ReadFile(filepath.Join("/proc/sys/net/ipv4/conf", link, "rp_filter"))
	if err != nil {
		return 0
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	return n
}

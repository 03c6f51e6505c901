package osroute

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Settings are the addresses and routes of a device on a system that is told by programs: macOS and Windows.
type Settings struct {
	MTU    int // 0 leaves it
	Addrs  []netip.Prefix
	Routes []netip.Prefix
}

// Runner runs a program of the system within a time of its choice, with an input, and returns what it printed.
type Runner func(ctx context.Context, argv []string, stdin string) ([]byte, error)

// Device is a device of macOS or Windows. Its commands are tested, but nobody has run them there yet.
type Device struct {
	goos, link string
	run        Runner
	now        Settings
}

// NewDevice is a fresh device, without addresses and routes.
func NewDevice(goos, link string, run Runner) *Device {
	return &Device{goos: goos, link: link, run: run}
}

// Apply makes want the settings of the device. What Apply has set before is not touched again; nothing of another interface ever is.
func (d *Device) Apply(ctx context.Context, want Settings) error {
	for _, c := range Commands(d.goos, d.link, d.now, want) {
		if out, err := d.run(ctx, c, ""); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(c, " "), err, strings.TrimSpace(string(out)))
		}
	}
	d.now = want
	return nil
}

// Others lists the routes of other interfaces.
func (d *Device) Others(ctx context.Context) ([]Existing, error) {
	out, err := d.run(ctx, RoutesCommand(d.goos), "")
	if err != nil {
		return nil, fmt.Errorf("routes of this machine: %w", err)
	}
	return ParseRoutes(d.goos, d.link, out)
}

// Commands are what makes a device that has have what want says: routes that go, addresses that go, addresses and routes that come. goos is
// darwin or windows; for others there are none.
func Commands(goos, link string, have, want Settings) [][]string {
	sys, ok := systems[goos]
	if !ok {
		return nil
	}
	var out [][]string
	for _, p := range without(have.Routes, want.Routes) {
		out = append(out, sys.route("delete", link, p))
	}
	for _, p := range without(have.Addrs, want.Addrs) {
		out = append(out, sys.addr(false, link, p))
	}
	if want.MTU != 0 && want.MTU != have.MTU {
		out = append(out, sys.mtu(link, want.MTU)...)
	}
	for _, p := range without(want.Addrs, have.Addrs) {
		out = append(out, sys.addr(true, link, p))
	}
	for _, p := range without(want.Routes, have.Routes) {
		out = append(out, sys.route("add", link, p))
	}
	return out
}

// without are those of a that are not in b.
func without(a, b []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range a {
		if !slices.Contains(b, p) {
			out = append(out, p)
		}
	}
	return out
}

type system struct {
	mtu   func(link string, mtu int) [][]string
	addr  func(add bool, link string, p netip.Prefix) []string
	route func(verb, link string, p netip.Prefix) []string
}

var systems = map[string]system{
	// ifconfig(8) and route(8) of macOS. A utun is point to point: its address is its own peer.
	"darwin": {
		mtu: func(link string, mtu int) [][]string {
			return [][]string{{"ifconfig", link, "mtu", strconv.Itoa(mtu), "up"}}
		},
		addr: func(add bool, link string, p netip.Prefix) []string {
			if p.Addr().Is6() {
				return append([]string{"ifconfig", link, "inet6", p.String()}, alias(add)...)
			}
			return append([]string{"ifconfig", link, "inet", p.String(), p.Addr().String()}, alias(add)...)
		},
		route: func(verb, link string, p netip.Prefix) []string {
			return []string{"route", "-q", "-n", verb, "-" + inet(p), p.String(), "-interface", link}
		},
	},
	// netsh(8). store=active: nothing outlives the adapter or a reboot.
	"windows": {
		mtu: func(link string, mtu int) [][]string {
			var out [][]string
			for _, family := range []string{"ipv4", "ipv6"} {
				out = append(out, []string{"netsh", "interface", family, "set", "subinterface", link, "mtu=" + strconv.Itoa(mtu), "store=active"})
			}
			return out
		},
		addr: func(add bool, link string, p netip.Prefix) []string {
			if !add {
				return []string{"netsh", "interface", ipv(p), "delete", "address", link, p.Addr().String(), "store=active"}
			}
			return []string{"netsh", "interface", ipv(p), "add", "address", link, p.String(), "store=active"}
		},
		route: func(verb, link string, p netip.Prefix) []string {
			return []string{"netsh", "interface", ipv(p), verb, "route", p.String(), link, "store=active"}
		},
	},
}

func alias(add bool) []string {
	if add {
		return []string{"alias"}
	}
	return []string{"-alias"}
}

func inet(p netip.Prefix) string {
	if p.Addr().Is6() {
		return "inet6"
	}
	return "inet"
}

func ipv(p netip.Prefix) string {
	if p.Addr().Is6() {
		return "ipv6"
	}
	return "ipv4"
}

// RoutesCommand prints the routes of the machine for ParseRoutes.
func RoutesCommand(goos string) []string {
	switch goos {
	case "darwin":
		return []string{"netstat", "-rn"}
	case "windows":
		return []string{"powershell", "-NoProfile", "-Command", "Get-NetRoute -PolicyStore ActiveStore | Select-Object DestinationPrefix, InterfaceAlias | ConvertTo-Json"}
	}
	return nil
}

// ParseRoutes reads what RoutesCommand printed: routes of other links, without default, loopback, link-local and multicast ones.
func ParseRoutes(goos, link string, out []byte) ([]Existing, error) {
	var all []Existing
	switch goos {
	case "darwin":
		all = parseNetstat(string(out))
	case "windows":
		var list []struct{ DestinationPrefix, InterfaceAlias string }
		if err := json.Unmarshal(out, &list); err != nil {
			return nil, fmt.Errorf("routes of this machine: %w", err)
		}
		for _, r := range list {
			if p, err := netip.ParsePrefix(r.DestinationPrefix); err == nil {
				all = append(all, Existing{Prefix: p, Link: r.InterfaceAlias})
			}
		}
	default:
		return nil, fmt.Errorf("routes of this machine: no way to list them on %s", goos)
	}
	return slices.DeleteFunc(all, func(e Existing) bool {
		a := e.Prefix.Addr()
		return e.Link == link || e.Prefix.Bits() == 0 || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast()
	}), nil
}

// parseNetstat reads macOS's "netstat -rn": destination, gateway, flags, interface. IPv4 destinations lack what is zero at their end
// ("10.96/12", "192.168.1", "127").
func parseNetstat(out string) []Existing {
	var all []Existing
	sc := bufio.NewScanner(strings.NewReader(out))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 4 {
			continue
		}
		if p, ok := netstatPrefix(f[0]); ok {
			all = append(all, Existing{Prefix: p, Link: f[3]})
		}
	}
	return all
}

func netstatPrefix(s string) (netip.Prefix, bool) {
	addr, length, hasLength := strings.Cut(s, "/")
	addr, _, _ = strings.Cut(addr, "%") // the zone of fe80::…
	if strings.Contains(addr, ":") {
		a, err := netip.ParseAddr(addr)
		if err != nil {
			return netip.Prefix{}, false
		}
		return withLength(a, length, hasLength, 128)
	}
	parts := strings.Split(addr, ".")
	if len(parts) > 4 {
		return netip.Prefix{}, false
	}
	given := len(parts)
	for len(parts) < 4 {
		parts = append(parts, "0")
	}
	a, err := netip.ParseAddr(strings.Join(parts, "."))
	if err != nil {
		return netip.Prefix{}, false
	}
	return withLength(a, length, hasLength, 8*given)
}

func withLength(a netip.Addr, length string, has bool, otherwise int) (netip.Prefix, bool) {
	bits := otherwise
	if has {
		var err error
		if bits, err = strconv.Atoi(length); err != nil {
			return netip.Prefix{}, false
		}
	}
	p := netip.PrefixFrom(a, bits)
	return p.Masked(), p.IsValid()
}

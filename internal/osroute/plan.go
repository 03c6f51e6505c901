// Package osroute owns the addresses and routes of the TUN device: which a machine may have, and putting them in force.
package osroute

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/doppel-dev/doppel/internal/uerr"
)

const (
	// MinBits4 and MinBits6 are the shortest prefixes that may be routed. A /8 holds any cluster's subnets and any private range;
	// a /16 of IPv6 holds what any registry gives one organisation (RFC 6177), while fc00::/7 or 2000::/3 would take over all.
	MinBits4, MinBits6 = 8, 16
	// MaxRoutes bounds the routes that result from cutting out excluded subnets.
	MaxRoutes = 1024
)

// Existing is a route of another interface.
type Existing struct {
	Prefix netip.Prefix
	Link   string
}

// Want is what the routes should be.
type Want struct {
	// Routes go into the device.
	Routes []netip.Prefix
	// Exclude never do; one equal to a route is refused.
	Exclude []netip.Prefix
	// Resolvers never do either, but are no reason to refuse anything: they are the machine's, not the caller's.
	Resolvers []netip.Addr
}

// Plan is what the routes will be.
type Plan struct {
	Routes   []netip.Prefix // sorted, without duplicates
	Warnings []string
}

// Check says why p may never be routed into the device, or nil.
func Check(p netip.Prefix) error {
	a := p.Addr()
	switch {
	case !p.IsValid() || p != p.Masked():
		return fmt.Errorf("%v is no subnet", p)
	case p.Bits() == 0:
		return fmt.Errorf("%v is the default route", p)
	case a.Is4() && p.Bits() < MinBits4, a.Is6() && p.Bits() < MinBits6:
		return fmt.Errorf("%v is larger than /%d (IPv4) or /%d (IPv6)", p, MinBits4, MinBits6)
	case a.Is4In6():
		return fmt.Errorf("%v is an IPv4 subnet written as IPv6", p)
	}
	for _, n := range never {
		if n.Overlaps(p) {
			return fmt.Errorf("%v lies in %v, which no network routes", p, n)
		}
	}
	return nil
}

// never are "this network", loopback, link-local, multicast (RFC 6890) and the block of the broadcast address. The rest of class E is what
// some clusters give their pods, and what virtual addresses are taken from.
var never = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("255.0.0.0/8"),
	netip.MustParsePrefix("::/16"), // ::1, IPv4-mapped and -compatible
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("ff00::/8"),
}

// Make decides the routes on a machine that already has the existing ones. It refuses as a whole: a route that may never be, one that
// is excluded, or too many.
func Make(w Want, existing []Existing) (Plan, error) {
	for _, r := range w.Routes {
		if err := Check(r); err != nil {
			return Plan{}, uerr.Wrap(err, uerr.Denied, "route smaller subnets (also-proxy), or none of these", "route refused")
		}
		if slices.Contains(w.Exclude, r) {
			return Plan{}, uerr.New(uerr.Conflict, "remove it from one of the two", "subnet %v is both routed to the cluster and kept out (an API server or never-proxy address)", r)
		}
	}
	cut := slices.Clone(w.Exclude)
	for _, a := range w.Resolvers {
		a = a.Unmap().WithZone("")
		if p := netip.PrefixFrom(a, a.BitLen()); a.IsValid() && !slices.Contains(cut, p) {
			cut = append(cut, p)
		}
	}
	var plan Plan
	for _, r := range w.Routes {
		left := Subtract([]netip.Prefix{r}, cut)
		if len(left) == 0 {
			plan.warn("%v is not routed to the cluster: it is kept out (never-proxy, API server or resolver)", r)
		}
		if len(plan.Routes)+len(left) > MaxRoutes {
			return Plan{}, uerr.New(uerr.Usage, "keep fewer or larger subnets out", "more than %d routes result from cutting out the excluded subnets", MaxRoutes)
		}
		plan.Routes = append(plan.Routes, left...)
	}
	plan.Routes = Tidy(plan.Routes)
	plan.avoid(existing)
	return plan, nil
}

func (p *Plan) warn(format string, args ...any) {
	p.Warnings = append(p.Warnings, fmt.Sprintf(format, args...))
}

// avoid leaves out what another interface is routed to exactly, and tells of what stays with another interface because it is smaller.
func (p *Plan) avoid(existing []Existing) {
	p.Routes = slices.DeleteFunc(p.Routes, func(r netip.Prefix) bool {
		for _, e := range existing {
			if e.Prefix == r {
				p.warn("%v is not routed to the cluster: it is routed to %s already", r, e.Link)
				return true
			}
		}
		return false
	})
	for _, e := range existing {
		for _, r := range p.Routes {
			if r.Bits() < e.Prefix.Bits() && r.Overlaps(e.Prefix) {
				p.warn("%v inside %v stays with %s", e.Prefix, r, e.Link)
				break
			}
		}
	}
}

// Subtract cuts each of cut out of the prefixes.
func Subtract(from, cut []netip.Prefix) []netip.Prefix {
	for _, x := range cut {
		var rest []netip.Prefix
		for _, p := range from {
			rest = append(rest, around(p, x)...)
		}
		from = rest
	}
	return from
}

// around returns p without x: p itself when they are apart, nothing when x covers p, else the halves on the way down from p to x that
// x is not in.
func around(p, x netip.Prefix) []netip.Prefix {
	if !p.Overlaps(x) {
		return []netip.Prefix{p}
	}
	if x.Bits() <= p.Bits() {
		return nil
	}
	var out []netip.Prefix
	for bits := p.Bits() + 1; bits <= x.Bits(); bits++ {
		out = append(out, sibling(netip.PrefixFrom(x.Addr(), bits)))
	}
	return out
}

// sibling returns the other half of the prefix that is one bit shorter than p.
func sibling(p netip.Prefix) netip.Prefix {
	b := p.Masked().Addr().AsSlice()
	i := p.Bits() - 1
	b[i/8] ^= 0x80 >> (i % 8)
	a, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(a, p.Bits()).Masked()
}

// Tidy sorts in place and drops duplicates.
func Tidy(ps []netip.Prefix) []netip.Prefix {
	slices.SortFunc(ps, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	return slices.Compact(ps)
}

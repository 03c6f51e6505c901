package subnets

import (
	"net/netip"

	"github.com/doppel-dev/doppel/internal/osroute"
)

// inside says whether p is outer or a part of it.
func inside(p, outer netip.Prefix) bool {
	return p.Bits() >= outer.Bits() && outer.Overlaps(p)
}

func hosts(as []netip.Addr) []netip.Prefix {
	var out []netip.Prefix
	for _, a := range as {
		a = a.Unmap().WithZone("")
		out = append(out, netip.PrefixFrom(a, a.BitLen()))
	}
	return out
}

// halves returns the two prefixes that are one bit longer; a host has none but itself.
func halves(p netip.Prefix) []netip.Prefix {
	if p.IsSingleIP() {
		return []netip.Prefix{p}
	}
	low := netip.PrefixFrom(p.Addr(), p.Bits()+1)
	return []netip.Prefix{low, netip.PrefixFrom(end(low), low.Bits())}
}

// end is the first address behind p; invalid at the end of all addresses.
func end(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits() - 1; i >= 0; i-- {
		bit := byte(0x80 >> (i % 8))
		b[i/8] ^= bit
		if b[i/8]&bit != 0 { // no carry
			a, _ := netip.AddrFromSlice(b)
			return a
		}
	}
	return netip.Addr{}
}

// aggregate drops what is a part of another and joins halves: a /24 for each of many nodes becomes few routes.
func aggregate(ps []netip.Prefix) []netip.Prefix {
	in := make([]netip.Prefix, 0, len(ps))
	for _, p := range ps {
		in = append(in, p.Masked())
	}
	var out []netip.Prefix
	for _, p := range osroute.Tidy(in) { // a prefix comes before its parts
		for {
			n := len(out)
			if n > 0 && inside(p, out[n-1]) {
				break
			}
			if n > 0 && p.Bits() > 0 && out[n-1].Bits() == p.Bits() && netip.PrefixFrom(p.Addr(), p.Bits()-1).Masked() == netip.PrefixFrom(out[n-1].Addr(), p.Bits()-1).Masked() {
				p = netip.PrefixFrom(p.Addr(), p.Bits()-1).Masked()
				out = out[:n-1]
				continue
			}
			out = append(out, p)
			break
		}
	}
	return out
}

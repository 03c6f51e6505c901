package resolver

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

const (
	// maxDomains bounds what a resolver of the laptop is told; systemd-resolved takes 256 for a link.
	maxDomains = 200
	// maxDomainBytes bounds their length together.
	maxDomainBytes = 16 << 10
)

// RouteDomains lists the domains that a resolver which chooses servers by domain (systemd-resolved, a router's) has to send here: in its way of
// writing, with "~" before those that are no search domains. With few services, each has its own, so that no name outside
// comes this way; with more, each namespace has one, and names outside that end like it come this way and are passed on; with still more, all do.
func RouteDomains(all ...Names) []string { return compileAll(all).routeDomains() }

// RouteDomains are those for the names that the server has.
func (s *Server) RouteDomains() []string {
	if d := s.names.Load(); d != nil {
		return d.routeDomains()
	}
	return nil
}

func (d directory) routeDomains() []string {
	if len(d) == 0 {
		return nil
	}
	var base []string
	namespaces, services := map[string]bool{}, map[string]bool{}
	add := func(to map[string]bool, d string) {
		if len(to) <= maxDomains && sendable(d) { // of thousands none is told
			to[d] = true
		}
	}
	for _, t := range d {
		base = append(base, SearchDomain, "~"+t.domain, "~svc")
		for _, p := range t.prefixes {
			base = append(base, zones(p)...)
		}
		for _, d := range t.include {
			base = append(base, "~"+d)
		}
		for name := range t.mappings {
			base = append(base, "~"+name)
		}
		for ns, names := range t.services {
			add(namespaces, "~"+ns)
			if len(services) <= maxDomains {
				for name := range names {
					add(services, "~"+name+"."+ns)
				}
			}
		}
	}
	for _, more := range []map[string]bool{services, namespaces} {
		list := slices.AppendSeq(slices.Clone(base), maps.Keys(more))
		slices.Sort(list)
		list = slices.Compact(slices.DeleteFunc(list, func(d string) bool { return !sendable(d) }))
		if len(list) <= maxDomains && len(strings.Join(list, "")) <= maxDomainBytes {
			return list
		}
	}
	return []string{SearchDomain, "~."}
}

// sendable keeps out what is no host name: a suffix that a user made up must not spoil the others.
func sendable(d string) bool {
	for label := range strings.SplitSeq(strings.TrimPrefix(d, "~"), ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	return len(d) <= 254
}

// zones are the reverse zones that hold a subnet (RFC 1035 section 3.5, RFC 3596 section 2.5): exactly it, or a larger one where
// that would be too many.
func zones(p netip.Prefix) []string {
	step, suffix := 8, "in-addr.arpa"
	if p.Addr().Is6() {
		step, suffix = 4, "ip6.arpa"
	}
	bits := (p.Bits() + step - 1) / step * step
	if bits-p.Bits() > 4 { // more than 16 zones: the one around them
		bits -= step
	}
	bits = max(bits, step)
	var out []string
	for i := range 1 << max(bits-p.Bits(), 0) {
		raw := p.Addr().AsSlice()
		raw[(bits-1)/8] |= byte(i << ((8 - bits%8) % 8))
		labels := []string{suffix}
		for b := 0; b < bits; b += step {
			v := int(raw[b/8])
			if step == 8 {
				labels = append(labels, strconv.Itoa(v))
			} else {
				labels = append(labels, fmt.Sprintf("%x", v>>(4-b%8)&0xf))
			}
		}
		slices.Reverse(labels)
		out = append(out, "~"+strings.Join(labels, "."))
	}
	return out
}

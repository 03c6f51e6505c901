// Package osdns owns the capture of the laptop's DNS queries: which resolvers the laptop has, how to capture them, and the rules in the kernel.
package osdns

import (
	"bufio"
	"bytes"
	"net/netip"
	"slices"
	"strings"
)

const (
	// maxResolvers bounds what is taken from resolv.conf; glibc itself uses 3 and ignores the rest, musl too, others more.
	maxResolvers = 8
	maxSearch    = 32
)

// ResolvConf is what resolv.conf(5) says.
type ResolvConf struct {
	Resolvers []netip.Addr
	Search    []string
}

// ParseResolvConf reads a resolv.conf. Like the resolvers themselves it ignores what it does not understand.
func ParseResolvConf(data []byte) ResolvConf {
	var rc ResolvConf
	sc := bufio.NewScanner(bytes.NewReader(data))
	for sc.Scan() {
		line := sc.Text()
		if line == "" || strings.ContainsRune("#;", rune(line[0])) {
			continue
		}
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			// No deviation from glibc: one address a line, rest ignored.
			if a, err := netip.ParseAddr(f[1]); err == nil && len(rc.Resolvers) < maxResolvers {
				a = a.Unmap()
				// resolv.conf(5): "nameserver 0.0.0.0" is the local host.
				if a == netip.IPv4Unspecified() {
					a = netip.AddrFrom4([4]byte{127, 0, 0, 1})
				}
				if a == netip.IPv6Unspecified() {
					a = netip.IPv6Loopback()
				}
				if !slices.Contains(rc.Resolvers, a) {
					rc.Resolvers = append(rc.Resolvers, a)
				}
			}
		case "search":
			rc.Search = slices.Clone(f[1:min(len(f), 1+maxSearch)]) // the last line wins
		case "domain":
			rc.Search = []string{f[1]}
		}
	}
	// Without a nameserver the resolver asks the local host (resolv.conf(5)).
	if len(rc.Resolvers) == 0 {
		rc.Resolvers = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	}
	for i, s := range rc.Search {
		rc.Search[i] = strings.TrimSuffix(s, ".")
	}
	rc.Search = slices.DeleteFunc(rc.Search, func(s string) bool { return s == "" || len(s) > 253 })
	return rc
}

// Package rootapi owns what the user daemon and doppel-rootd say to each other: the messages, their strict decoding, and the client.
package rootapi

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"sync"
)

const (
	// DefaultSocket is where doppel-rootd listens unless told otherwise.
	DefaultSocket = "/run/doppel/rootd.sock"
	// Protocol is the version of the messages; both sides must have the same.
	Protocol = 3

	// MaxLevelSeconds bounds how long a log level can be changed for: a week.
	MaxLevelSeconds = 7 * 24 * 3600
	// MaxPacket bounds one message in bytes.
	MaxPacket = 64 << 10
	// MaxAddrs, MaxRoutes and MaxExclude bound the lists of a Network. MaxRoutes also bounds what results when excluded
	// addresses are cut out of routes.
	MaxAddrs, MaxRoutes, MaxExclude = 16, 1024, 256
	// MaxScoped and MaxDomains bound those of a DNS, and MaxDomainBytes all domains together: systemd-resolved takes 256 for a link.
	MaxScoped, MaxDomains, MaxDomainBytes = 16, 256, 16 << 10
)

// Network is the wanted state; the zero value removes everything.
type Network struct {
	// Name of the TUN device: "doppel", then up to 9 letters, digits, '-', '_' or '.'. Firewalls know interfaces by name, so
	// rootd makes none that could pass for another program's.
	Name string `json:"name,omitempty"`
	// MTU in bytes; 0 means 1500.
	MTU int `json:"mtu,omitempty"`
	// Addrs are the addresses of the device with the length of its own subnet, best /32 and /128.
	Addrs []netip.Prefix `json:"addrs,omitempty"`
	// Routes are the subnets routed into the device. A subnet that some other interface is routed to exactly is left alone, with a
	// warning.
	Routes []netip.Prefix `json:"routes,omitempty"`
	// Exclude are kept out of the routes: the API server's addresses and never-proxy subnets. A route that covers one is cut into
	// the subnets around it, so that the excluded one goes where it went before, wherever that is at the time. A route equal to one
	// is refused; one inside an excluded subnet is left out with a warning. rootd excludes the resolvers that it finds by itself.
	Exclude []netip.Prefix `json:"exclude,omitempty"`
	// DNS captures the laptop's DNS; nil leaves it alone.
	DNS *DNS `json:"dns,omitempty"`
}

// DNS says where captured queries go. Which way they take there is rootd's to decide.
type DNS struct {
	// Listen is the user daemon's UDP and TCP listener on 127.0.0.1; not a wildcard one, whose answers would leave from another address.
	Listen netip.AddrPort `json:"listen"`
	// Listen6 is its listener on [::1], for resolvers with IPv6 addresses; they are not captured without it.
	Listen6 netip.AddrPort `json:"listen6,omitzero"`
	// Scoped are listeners on link-local addresses of this machine, with their links as zones, for resolvers with link-local addresses on
	// the same link.
	Scoped []netip.AddrPort `json:"scoped,omitempty"`
	// Server is an address behind the device at which the user daemon answers queries too. rootd routes it into the device where
	// systemd-resolved is to ask it.
	Server netip.Addr `json:"server,omitzero"`
	// Domains are what systemd-resolved asks Server for, with "~" before those that are no search domains.
	Domains []string `json:"domains,omitempty"`
	// ResolvedFails says that systemd-resolved took the settings and queries did not come: another way is to be taken.
	ResolvedFails bool `json:"resolvedFails,omitempty"`
}

// IsZero reports whether n asks for everything to be removed.
func (n Network) IsZero() bool {
	return n.Name == "" && n.MTU == 0 && len(n.Addrs) == 0 && len(n.Routes) == 0 && len(n.Exclude) == 0 && n.DNS == nil
}

// The ways of DNS capture that State.DNSMode names.
const (
	DNSResolved = "systemd-resolved"
	DNSNftables = "nftables"
	DNSRouted   = "routed"
	DNSNone     = "none"
	// DNSNamespace: the command of doppel run has a resolv.conf of its own.
	DNSNamespace = "namespace"
)

// State is what is in force.
type State struct {
	// Seq grows with each other state of one doppel-rootd: a reply and an OpChanged may be looked at in another order than they were sent.
	Seq uint64 `json:"seq,omitempty"`
	// Name of the device, empty without one.
	Name string `json:"name,omitempty"`
	// Routes as installed: those wanted, less what was left out, with excluded addresses cut out of them.
	Routes []netip.Prefix `json:"routes,omitempty"`
	// DNSMode is one of the ways above, and DNSReason says why it is this one.
	DNSMode   string `json:"dnsMode"`
	DNSReason string `json:"dnsReason,omitempty"`
	// Resolvers and SearchDomains are what the laptop uses without doppel: where names that are not the cluster's go.
	Resolvers     []netip.AddrPort `json:"resolvers,omitempty"`
	SearchDomains []string         `json:"searchDomains,omitempty"`
	// Bypass names the links that lead to those resolvers whose addresses are routed into the device (DNSRouted).
	Bypass []Bypass `json:"bypass,omitempty"`
	// Warnings are sentences for the user.
	Warnings []string `json:"warnings,omitempty"`
}

// Bypass is a resolver that is to be asked through a socket bound to Link.
type Bypass struct {
	Resolver netip.Addr `json:"resolver"`
	Link     string     `json:"link"`
}

// Version describes a running doppel-rootd.
type Version struct {
	Program  string `json:"program"`
	Protocol int    `json:"protocol"`
	PID      int    `json:"pid"`
	// Service says that the system runs it: it goes on when the last laptop session has ended, and no client can end it.
	Service bool `json:"service,omitempty"`
}

var ifname = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^doppel[a-z0-9._-]{0,9}$`) })

// Validate checks the form of n: names, sizes, families. Which routes a machine may have is rootd's to decide.
func (n Network) Validate() error {
	if n.IsZero() {
		return nil
	}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !ifname().MatchString(n.Name) {
		bad("name %q: want doppel and up to 9 more of a-z 0-9 . _ -", n.Name)
	}
	if n.MTU != 0 && (n.MTU < 1280 || n.MTU > 65535) {
		bad("mtu %d: want 1280 to 65535", n.MTU)
	}
	if len(n.Addrs) > MaxAddrs || len(n.Routes) > MaxRoutes || len(n.Exclude) > MaxExclude {
		bad("more than %d addresses, %d routes or %d excluded subnets", MaxAddrs, MaxRoutes, MaxExclude)
		return errors.Join(errs...)
	}
	for _, p := range n.Addrs {
		if a := p.Addr(); !p.IsValid() || a.Is4In6() || !a.IsGlobalUnicast() {
			bad("address %v: want a unicast address with a prefix length", p)
		}
	}
	for _, list := range [][]netip.Prefix{n.Routes, n.Exclude} {
		for _, p := range list {
			if !p.IsValid() || p.Addr().Is4In6() || p != p.Masked() {
				bad("subnet %v: want one without host bits", p)
			}
		}
	}
	if n.DNS != nil {
		errs = append(errs, n.DNS.validate()...)
	}
	return errors.Join(errs...)
}

// domain is what a DNS may name: a host name's letters, "." alone for all names, and "~" before it. To compile it takes 2 ms, which no command has to spare.
var domain = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^~?(\.|[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*)$`)
})

func (d DNS) validate() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if l := d.Listen; !l.Addr().Is4() || !l.Addr().IsLoopback() || l.Port() == 0 {
		bad("dns listener %v: want 127.0.0.1 and a port", l)
	}
	if l := d.Listen6; l.IsValid() && (l.Addr() != netip.IPv6Loopback() || l.Port() == 0) {
		bad("dns listener %v: want [::1] and a port", l)
	}
	if a := d.Server; a.IsValid() && (a.Is4In6() || a.Zone() != "" || !a.IsGlobalUnicast()) {
		bad("dns server %v: want a unicast address", a)
	}
	if len(d.Scoped) > MaxScoped || len(d.Domains) > MaxDomains {
		bad("more than %d dns listeners or %d domains", MaxScoped, MaxDomains)
		return errs
	}
	for _, l := range d.Scoped {
		if a := l.Addr(); !a.Is6() || !a.IsLinkLocalUnicast() || a.Zone() == "" || l.Port() == 0 {
			bad("dns listener %v: want a link-local IPv6 address with its link, and a port", l)
		}
	}
	size := 0
	for _, name := range d.Domains {
		size += len(name)
		if len(name) > 254 || !domain().MatchString(name) {
			bad("domain %q: want lower case letters, digits, - and _ between dots", name)
		}
	}
	if size > MaxDomainBytes {
		bad("more than %d bytes of domains", MaxDomainBytes)
	}
	return errs
}

// The kinds of socket that MarkedSocket gives.
const (
	UDP4 = "udp4"
	UDP6 = "udp6"
	TCP4 = "tcp4"
	TCP6 = "tcp6"
)

// ValidSocket reports whether network is one of those kinds.
func ValidSocket(network string) bool {
	switch network {
	case UDP4, UDP6, TCP4, TCP6:
		return true
	}
	return false
}

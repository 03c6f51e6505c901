package osdns

import (
	"fmt"
	"net/netip"
	"slices"
)

// Mark is the SO_MARK of sockets whose DNS queries the capture lets pass ("doppel" would be too long). Its bits avoid the masks that
// others match by: kube-proxy's 0x4000 and 0x8000, Tailscale's 0xff0000 = 0x080000 and 0x040000, wg-quick's 0xca6c.
const Mark = 0x00d00b1e

// Port is the port that is captured.
const Port = 53

// Mode is a way for the laptop's queries to reach doppel. Each cleans up after itself when the processes die, however they do.
type Mode string

// The modes, in order of preference.
const (
	// Resolved: systemd-resolved sends the cluster's domains to a server behind the device, and drops the setting with the device.
	Resolved Mode = "systemd-resolved"
	// NFTables: a table redirects the queries for each resolver, and goes with the socket that made it.
	NFTables Mode = "nftables"
	// Routed: the resolvers' addresses are routed into the device, and the routes go with it.
	Routed Mode = "routed"
	None   Mode = "none"
)

// Want is what the user daemon has to offer.
type Want struct {
	// Listen and Listen6 are where queries are redirected to; an invalid one takes nothing of its family.
	Listen, Listen6 netip.AddrPort
	// Scoped are listeners on the laptop's own link-local addresses, for resolvers with such an address on the same link.
	Scoped []netip.AddrPort
	// Server is an address behind the device at which the cluster's names are answered, and Domains what to ask it for: "~" before a
	// domain that is no search domain.
	Server  netip.Addr
	Domains []string
}

// Facts is what a machine is like.
type Facts struct {
	// Stub says that all queries go to the stub of systemd-resolved, which can be told things unless ResolvedError.
	Stub          bool
	ResolvedError error
	// NFTError says why nftables tables with an owner do not work here (they want Linux 5.12 and CAP_NET_ADMIN); nil when they do.
	NFTError error
	// Resolvers are the laptop's own, as resolv.conf names them.
	Resolvers []Resolver
	// LinkLocal are the machine's own addresses of that kind, with their links as zones.
	LinkLocal []netip.Addr
}

// Resolver is one of the laptop's own, with what decides whether it can be routed into the device.
type Resolver struct {
	Addr netip.Addr
	// Link is the interface that leads to it, "" for none.
	Link string
	// Gateway says that routes go through it, and Host that one leads to exactly its address.
	Gateway, Host bool
	// RPFilter is net.ipv4.conf.*.rp_filter in force on Link: 0 off, 1 strict, 2 loose.
	RPFilter int
}

// Redirect sends queries for one resolver elsewhere; Link restricts it to queries that leave by this interface.
type Redirect struct {
	Resolver netip.Addr
	Link     string
	To       netip.AddrPort
}

// LinkDNS is what systemd-resolved is told about the device.
type LinkDNS struct {
	Server  netip.Addr
	Domains []string
}

// Plan is how a machine's queries reach doppel, and why this way.
type Plan struct {
	Mode      Mode
	Reason    string
	Link      LinkDNS    // Resolved
	Redirects []Redirect // NFTables
	Routed    []Resolver // Routed
	Warnings  []string
}

// Choose decides how to capture DNS on such a machine.
func Choose(f Facts, w Want) Plan {
	if !w.Listen.IsValid() && !w.Listen6.IsValid() {
		return Plan{Mode: None, Reason: "not asked for"}
	}
	if f.Stub && f.ResolvedError == nil && w.Server.IsValid() {
		return Plan{Mode: Resolved, Reason: "programs here ask systemd-resolved", Link: LinkDNS{w.Server, slices.Clone(w.Domains)}}
	}
	p := Plan{Mode: NFTables, Reason: "programs here ask the resolvers of resolv.conf"}
	if f.Stub {
		p.Reason = fmt.Sprintf("systemd-resolved cannot be told of the cluster's domains (%v)", f.ResolvedError)
		p.warn("programs that look names up through nss-resolve do not find the cluster's: %s", p.Reason)
	}
	if f.NFTError == nil {
		p.redirect(f, w)
	} else {
		p.Mode = Routed
		p.Reason = fmt.Sprintf("nftables cannot be used (%v)", f.NFTError)
		p.route(f.Resolvers)
	}
	if len(p.Redirects)+len(p.Routed) == 0 {
		p.warn("cluster names do not resolve: %s, and no resolver can be captured", p.Reason)
		p.Mode = None
	}
	return p
}

// redirect captures the queries for each resolver.
func (p *Plan) redirect(f Facts, w Want) {
	for _, r := range f.Resolvers {
		re := Redirect{Resolver: r.Addr.WithZone(""), To: w.Listen}
		if r.Addr.Is6() {
			re.To = w.Listen6
		}
		if r.Addr.Is6() && r.Addr.IsLinkLocalUnicast() {
			// Sockets that ask it are bound to its link (RFC 4007), and from there no packet reaches ::1; one of the laptop's own addresses on that
			// link they do reach.
			re.Link, re.To = r.Addr.Zone(), netip.AddrPort{}
			for _, l := range w.Scoped {
				if l.Addr().Zone() == re.Link && slices.Contains(f.LinkLocal, l.Addr()) {
					re.To = netip.AddrPortFrom(l.Addr().WithZone(""), l.Port())
				}
			}
		}
		if !re.To.IsValid() {
			p.warn("queries to resolver %v are not captured: no listener that they could reach", r.Addr)
			continue
		}
		p.Redirects = append(p.Redirects, re)
	}
}

// route captures those resolvers whose addresses may be routed into the device without harm.
func (p *Plan) route(resolvers []Resolver) {
	for _, r := range resolvers {
		why := ""
		switch {
		case r.Addr.IsLoopback():
			why = "it is on this machine"
		case r.Addr.IsLinkLocalUnicast():
			why = "it has a link-local address"
		case r.Link == "":
			why = "no route leads to it"
		case r.Gateway:
			why = "it is a gateway too"
		case r.Host:
			why = "a route to it alone exists"
		case r.RPFilter == 1:
			why = "strict reverse path filtering (rp_filter 1) on " + r.Link + " would drop its answers"
		}
		if why != "" {
			p.warn("queries to resolver %v are not captured: it cannot be routed to doppel, as %s", r.Addr, why)
			continue
		}
		p.Routed = append(p.Routed, r)
	}
}

// Routes are what has to lead into the device besides the cluster's subnets: addresses of this machine's resolvers only.
func (p Plan) Routes() []netip.Prefix {
	var out []netip.Prefix
	for _, r := range p.Routed {
		out = append(out, netip.PrefixFrom(r.Addr, r.Addr.BitLen()))
	}
	return out
}

func (p *Plan) warn(format string, args ...any) {
	p.Warnings = append(p.Warnings, fmt.Sprintf(format, args...))
}

package osdns

import (
	"fmt"
	"net/netip"
)

// Mark is the SO_MARK of sockets whose DNS queries the capture lets pass ("doppel" would be too long). Its bits avoid the masks that
// others match by: kube-proxy's 0x4000 and 0x8000, Tailscale's 0xff0000 = 0x080000 and 0x040000, wg-quick's 0xca6c.
const Mark = 0x00d00b1e

// Port is the port that is captured.
const Port = 53

// Mode is how queries are captured.
type Mode string

// The modes.
const (
	None     Mode = "none"
	NFTables Mode = "nftables"
)

// Facts is what a machine is like.
type Facts struct {
	// NFT says that nftables tables with an owner work here (Linux 5.12, and CAP_NET_ADMIN).
	NFT bool
	// NFTError says why not.
	NFTError error
	// ResolvedActive says that systemd-resolved runs. Recorded only, for now.
	ResolvedActive bool
	// Resolvers are the laptop's own.
	Resolvers []netip.Addr
	// RPFilter is the strictest net.ipv4.conf.*.rp_filter. Recorded only, for now: routing resolvers into the TUN would need it.
	RPFilter int
	// Listen and Listen6 are where captured queries go; an invalid one captures nothing of its family.
	Listen, Listen6 netip.AddrPort
}

// Redirect sends queries for one resolver elsewhere.
type Redirect struct {
	Resolver netip.Addr
	To       netip.AddrPort
}

// Plan is how a machine's queries are captured.
type Plan struct {
	Mode      Mode
	Redirects []Redirect
	Warnings  []string
}

// Choose decides how to capture DNS on such a machine.
func Choose(f Facts) Plan {
	if !f.Listen.IsValid() && !f.Listen6.IsValid() {
		return Plan{Mode: None}
	}
	p := Plan{Mode: NFTables}
	if !f.NFT {
		p.Mode = None
		p.warn("cluster names do not resolve: nftables is not usable here (%v)", f.NFTError)
		return p
	}
	for _, r := range f.Resolvers {
		to := f.Listen
		if r.Is6() {
			to = f.Listen6
		}
		switch {
		case r.Is6() && r.IsLinkLocalUnicast():
			// Its sockets are bound to their interface (RFC 4007), and from there no packet reaches a listener on ::1.
			p.warn("queries to resolver %v are not captured: it has a link-local address", r)
		case !to.IsValid():
			p.warn("queries to resolver %v are not captured: no listener of its address family", r)
		default:
			p.Redirects = append(p.Redirects, Redirect{Resolver: r.WithZone(""), To: to})
		}
	}
	if len(p.Redirects) == 0 {
		p.Mode = None
	}
	return p
}

func (p *Plan) warn(format string, args ...any) {
	p.Warnings = append(p.Warnings, fmt.Sprintf(format, args...))
}

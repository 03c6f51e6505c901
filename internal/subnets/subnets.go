// Package subnets owns the decision what becomes of each subnet of the clusters on this laptop: routed as it is, behind virtual addresses, or left as it was.
package subnets

import (
	"net/netip"
	"slices"

	"github.com/doppel-dev/doppel/internal/osroute"
)

// Kind is why a subnet is wanted.
type Kind string

// The kinds of subnet; users name them as well where they name subnets.
const (
	Service   Kind = "service"
	Pod       Kind = "pod"
	Node      Kind = "node"
	AlsoProxy Kind = "also-proxy"
	ProxyVia  Kind = "proxy-via"
)

// Way is what becomes of a subnet.
type Way string

// The ways.
const (
	Routed  Way = "routed"   // into the VIF, with its own addresses
	Mapped  Way = "mapped"   // into the VIF, with virtual addresses
	Direct  Way = "direct"   // the laptop reaches it without doppel
	KeptOut Way = "kept out" // never-proxy, not routable, or a node in the way of the laptop's routes
)

// Subnet is one subnet with what becomes of it.
type Subnet struct {
	Session  string       `json:"session"`
	Kind     Kind         `json:"kind"`
	Real     netip.Prefix `json:"real"`             // what the cluster calls it
	Virtual  netip.Prefix `json:"virtual,omitzero"` // what the laptop calls it, if Mapped
	Way      Way          `json:"way"`
	Why      string       `json:"why,omitempty"`
	Workload string       `json:"workload,omitempty"` // whose agent its flows leave from, if not the manager

	routes []netip.Prefix // into the VIF
	cuts   []netip.Prefix // parts that stay as they are
}

// here is the subnet as the laptop sees it.
func (s Subnet) here() netip.Prefix {
	if s.Way == Mapped {
		return s.Virtual
	}
	return s.Real
}

// Selector names subnets: one by its prefix, or all of a kind.
type Selector struct {
	Prefix netip.Prefix
	Kinds  []Kind // used without a Prefix
}

// Via sends what it selects out of the agent of a workload.
type Via struct {
	Selector
	Workload string
}

// Cluster is what one session has and wants.
type Cluster struct {
	Session        string
	Services, Pods []netip.Prefix
	Nodes          []netip.Addr
	// Direct are the kinds that the laptop reaches without doppel.
	Direct []Kind
	// Servers are the API server's addresses, which stay as they are whatever else is wanted.
	Servers []netip.Addr

	AlsoProxy, NeverProxy []netip.Prefix
	AllowConflicts        []netip.Prefix
	VNAT                  []Selector
	Via                   []Via
}

// Facts is all that a decision depends on.
type Facts struct {
	Clusters []Cluster // in the order in which they were connected
	// Others are the routes of the laptop's other interfaces.
	Others []osroute.Existing
	// Pools are where virtual subnets are taken from; default DefaultPools.
	Pools []netip.Prefix
	// Reserved is where no virtual subnet may be.
	Reserved []netip.Prefix
	// Before is the plan in force: what was mapped stays so, with the same virtual addresses, because applications have them.
	Before Plan
}

// DefaultPools are ranges that no network routes: class E (RFC 1112) and a random prefix of unique local addresses (RFC 4193).
var DefaultPools = []netip.Prefix{netip.MustParsePrefix("240.0.0.0/5"), netip.MustParsePrefix("fd64:6f70:7065::/48")}

// Plan is what becomes of every subnet. It is never changed.
type Plan struct {
	Subnets []Subnet
}

// Routes are what the VIF needs, sorted.
func (p Plan) Routes() []netip.Prefix {
	var out []netip.Prefix
	for _, s := range p.Subnets {
		out = append(out, s.routes...)
	}
	return osroute.Tidy(out)
}

// Of returns a session's subnets of a kind as the laptop sees them; what is kept out is not among them.
func (p Plan) Of(session string, kind Kind) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range p.Subnets {
		if s.Session == session && s.Kind == kind && s.Way != KeptOut {
			out = append(out, s.here())
		}
	}
	return out
}

// Only is the plan of one session.
func (p Plan) Only(session string) Plan {
	return Plan{Subnets: slices.DeleteFunc(slices.Clone(p.Subnets), func(s Subnet) bool { return s.Session != session })}
}

// Find returns the subnet that an address of the laptop's view belongs to, and the address in the cluster. The longest prefix decides.
func (p Plan) Find(a netip.Addr) (Subnet, netip.Addr, bool) {
	best := -1
	for i, s := range p.Subnets {
		if len(s.routes) > 0 && s.here().Contains(a) && (best < 0 || s.here().Bits() > p.Subnets[best].here().Bits()) {
			best = i
		}
	}
	if best < 0 {
		return Subnet{}, netip.Addr{}, false
	}
	s := p.Subnets[best]
	return s, translate(a, s.here(), s.Real), true
}

// Here returns what the laptop calls an address of a session's cluster.
func (p Plan) Here(session string, a netip.Addr) netip.Addr {
	best := -1
	for i, s := range p.Subnets {
		if s.Session == session && s.Real.Contains(a) && (best < 0 || s.Real.Bits() > p.Subnets[best].Real.Bits()) {
			best = i
		}
	}
	if best < 0 || p.Subnets[best].Way != Mapped || slices.ContainsFunc(p.Subnets[best].cuts, func(c netip.Prefix) bool { return c.Contains(a) }) {
		return a
	}
	return translate(a, p.Subnets[best].Real, p.Subnets[best].Virtual)
}

// Maps says whether a session has virtual addresses.
func (p Plan) Maps(session string) bool {
	return slices.ContainsFunc(p.Subnets, func(s Subnet) bool { return s.Session == session && s.Way == Mapped })
}

// HasMapped says whether a subnet of a kind has virtual addresses.
func (p Plan) HasMapped(kind Kind) bool {
	return slices.ContainsFunc(p.Subnets, func(s Subnet) bool { return s.Kind == kind && s.Way == Mapped })
}

// translate moves a from one prefix to another of the same length.
func translate(a netip.Addr, from, to netip.Prefix) netip.Addr {
	if from == to {
		return a
	}
	b, base := a.AsSlice(), to.Masked().Addr().AsSlice()
	for i := range b {
		keep := byte(0xff >> min(8, max(0, from.Bits()-8*i))) // the host's bits
		b[i] = base[i] | b[i]&keep
	}
	out, _ := netip.AddrFromSlice(b)
	return out
}

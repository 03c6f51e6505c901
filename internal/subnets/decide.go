package subnets

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/doppel-dev/doppel/internal/osroute"
)

// Decide makes the plan. An earlier session's subnets are facts for a later one, which yields where they overlap.
//
//	kept out   a never-proxy subnet or the API server covers it, it is none that may be routed, or it is a node and would be mapped: without a
//	           name nobody would find it
//	mapped     --vnat asks for it, it was mapped before or is a part of what was, or it overlaps a route of the laptop or an earlier session's subnet
//	direct     the laptop reached it without us when it connected
//	routed     otherwise, and in spite of an overlap that --allow-conflicting-subnets allows
//
// Of a session's nested subnets the longest decides for its addresses.
func Decide(f Facts) Plan {
	d := &decision{Facts: f}
	if len(d.Pools) == 0 {
		d.Pools = DefaultPools
	}
	for _, c := range f.Clusters {
		for _, p := range slices.Concat(c.Services, c.Pods, c.AlsoProxy, c.NeverProxy, hosts(c.Servers), hosts(c.Nodes)) {
			if conflicts(p, p) {
				d.rivals = append(d.rivals, p)
			}
		}
	}
	for _, e := range f.Others {
		if conflicts(e.Prefix, e.Prefix) {
			d.rivals = append(d.rivals, e.Prefix)
		}
	}
	d.taken = slices.Concat(d.rivals, f.Reserved)
	for _, s := range f.Before.Subnets { // reserved, whoever comes first now
		if s.Way == Mapped {
			d.taken = append(d.taken, s.Virtual)
		}
	}
	for i := range f.Clusters {
		d.cluster(&f.Clusters[i])
	}
	return d.plan
}

type decision struct {
	Facts
	plan   Plan
	rivals []netip.Prefix // what is in use by the laptop or a cluster
	taken  []netip.Prefix // where no new virtual subnet may be: the rivals, and virtual subnets
}

// maxNodes is how many subnets of nodes of a cluster are routed: mostly each is one address, and there is room for osroute.MaxRoutes in all.
const maxNodes = 512

func (d *decision) cluster(c *Cluster) {
	all := wanted(c, d.Before)
	node := func(s *candidate) bool { return s.Kind == Node }
	if n := len(slices.DeleteFunc(slices.Clone(all), func(s *candidate) bool { return !node(s) })); n > maxNodes {
		first := all[slices.IndexFunc(all, node)]
		first.Way = KeptOut
		first.Why = fmt.Sprintf("as all %d subnets of nodes are: more than %d would be too many routes; name what holds them with --also-proxy", n, maxNodes)
		d.plan.Subnets = append(d.plan.Subnets, first.Subnet)
		all = slices.DeleteFunc(all, node)
	}
	for _, s := range all {
		d.subnet(c, s)
		d.plan.Subnets = append(d.plan.Subnets, s.Subnet)
	}
}

// candidate is a subnet before its decision.
type candidate struct {
	Subnet
	vnat bool // --vnat asks for virtual addresses
}

// wanted lists a cluster's subnets, each prefix once. What was mapped before and is a part of a larger one now stays a subnet of its own.
func wanted(c *Cluster, before Plan) []*candidate {
	var out []*candidate
	add := func(k Kind, ps []netip.Prefix) {
		for _, p := range aggregate(ps) {
			if !slices.ContainsFunc(out, func(o *candidate) bool { return o.Real == p }) {
				out = append(out, &candidate{Subnet: Subnet{Session: c.Session, Kind: k, Real: p}})
			}
		}
	}
	add(Service, c.Services)
	add(Pod, c.Pods)
	add(AlsoProxy, c.AlsoProxy)
	add(Node, hosts(c.Nodes))
	for _, v := range c.Via {
		if v.Prefix.IsValid() {
			add(ProxyVia, []netip.Prefix{v.Prefix})
		}
	}
	for _, v := range c.VNAT { // a part of a subnet is a subnet of its own
		if v.Prefix.IsValid() && !slices.ContainsFunc(out, func(o *candidate) bool { return v.covers(o) }) {
			add(kindAround(out, v.Prefix), []netip.Prefix{v.Prefix})
		}
	}
	for _, b := range before.Subnets {
		if b.Session == c.Session && b.Way == Mapped && slices.ContainsFunc(out, func(o *candidate) bool { return inside(b.Real, o.Real) }) {
			add(kindAround(out, b.Real), []netip.Prefix{b.Real})
		}
	}
	for _, o := range out {
		o.vnat = slices.ContainsFunc(c.VNAT, func(s Selector) bool { return s.covers(o) })
		longest := -1
		for _, v := range c.Via { // a prefix goes before a kind, a longer one before a shorter
			bits := 0
			if v.Prefix.IsValid() {
				bits = 1 + v.Prefix.Bits()
			}
			if v.covers(o) && bits > longest {
				longest, o.Workload = bits, v.Workload
			}
		}
	}
	return out
}

// kindAround is the kind of the subnet that p is a part of.
func kindAround(all []*candidate, p netip.Prefix) Kind {
	for _, o := range all {
		if inside(p, o.Real) {
			return o.Kind
		}
	}
	return AlsoProxy
}

func (s Selector) covers(c *candidate) bool {
	if s.Prefix.IsValid() {
		return inside(c.Real, s.Prefix)
	}
	return slices.Contains(s.Kinds, c.Kind)
}

func (d *decision) subnet(c *Cluster, s *candidate) {
	if why := keptOut(c, s); why != "" {
		s.Way, s.Why = KeptOut, why
		return
	}
	s.cuts = cuts(c, s.Real)
	if direct(c, s) {
		s.Way, s.Why = Direct, "this machine reaches it without doppel"
		return
	}
	if why := d.whyMapped(c, s); why != "" && s.Kind == Node && !s.vnat {
		s.Way, s.Why = KeptOut, why
		return
	} else if why != "" {
		d.mapped(s, why)
		return
	}
	s.Way = Routed
	s.routes = osroute.Subtract([]netip.Prefix{s.Real}, s.cuts)
	d.override(s)
}

// direct says whether a subnet is left to the way that the laptop has already; not if the user wants it through doppel.
func direct(c *Cluster, s *candidate) bool {
	return slices.Contains(c.Direct, s.Kind) && s.Workload == "" && !s.vnat && !slices.Contains(c.AlsoProxy, s.Real)
}

// keptOut says what keeps a subnet out as a whole, or "". Between never-proxy and also-proxy the longer prefix decides; the cluster's own
// subnets have a length by accident (one of a node, or several joined), so never-proxy goes before them.
func keptOut(c *Cluster, s *candidate) string {
	for _, n := range c.NeverProxy {
		longer := func(a netip.Prefix) bool { return inside(s.Real, a) && a.Bits() > n.Bits() }
		asked := s.Kind == ProxyVia && s.Real.Bits() > n.Bits() || slices.ContainsFunc(c.AlsoProxy, longer)
		if inside(s.Real, n) && !asked {
			return fmt.Sprintf("kept out by --never-proxy %v", n)
		}
	}
	if slices.Contains(hosts(c.Servers), s.Real) {
		return "the API server's address"
	}
	if err := osroute.Check(s.Real); err != nil && !mappable(s) {
		return err.Error()
	}
	return ""
}

// mappable says whether a subnet that no laptop may route can be had by virtual addresses: a pod's loopback through its agent.
func mappable(s *candidate) bool {
	return s.Workload != "" && s.Real == s.Real.Masked() && s.Real.Bits() >= osroute.MinBits4
}

// whyMapped says why a subnet gets virtual addresses, or "".
func (d *decision) whyMapped(c *Cluster, s *candidate) string {
	if s.vnat {
		return "asked for by --vnat"
	}
	if osroute.Check(s.Real) != nil {
		return "its own addresses cannot be routed"
	}
	if b, ok := d.earlier(s); ok {
		return b.Why
	}
	for _, e := range d.Others {
		if conflicts(s.Real, e.Prefix) && !allowed(c, s.Real, e.Prefix) {
			return fmt.Sprintf("overlaps %v of %s", e.Prefix, e.Link)
		}
	}
	for _, o := range d.plan.Subnets {
		if o.Session != c.Session && o.Way == Routed && o.Real.Overlaps(s.Real) {
			return fmt.Sprintf("overlaps %v of connection %s", o.Real, o.Session)
		}
	}
	return ""
}

// conflicts says whether a route of the laptop is in the way of p. Very short prefixes are default routes in disguise: a VPN that takes all
// traffic sets 0.0.0.0/1 and 128.0.0.0/1, or all of the internet around private ranges.
func conflicts(p, other netip.Prefix) bool {
	shortest := osroute.MinBits4
	if other.Addr().Is6() {
		shortest = osroute.MinBits6
	}
	return other.Bits() >= shortest && p.Overlaps(other)
}

// allowed says whether the user lets the cluster have what p and other share.
func allowed(c *Cluster, p, other netip.Prefix) bool {
	shared := p
	if other.Bits() > p.Bits() {
		shared = other
	}
	return slices.ContainsFunc(c.AllowConflicts, func(a netip.Prefix) bool { return inside(shared, a) })
}

// override makes an allowed conflict work: a route equal to another interface's is set as its two halves, which are longer and win. Parts
// that another interface has with a longer prefix stay with it.
func (d *decision) override(s *candidate) {
	for _, e := range d.Others {
		if conflicts(s.Real, e.Prefix) {
			s.Why = fmt.Sprintf("overlaps %v of %s, which --allow-conflicting-subnets allows", e.Prefix, e.Link)
			if i := slices.Index(s.routes, e.Prefix); i >= 0 {
				s.routes = append(slices.Delete(s.routes, i, i+1), halves(e.Prefix)...)
			}
		}
	}
}

func (d *decision) mapped(s *candidate, why string) {
	s.Way, s.Why = Mapped, why
	if b, ok := d.earlier(s); ok {
		if v := netip.PrefixFrom(translate(s.Real.Addr(), b.Real, b.Virtual), s.Real.Bits()); d.usable(v) {
			s.Virtual = v
		}
	}
	if !s.Virtual.IsValid() {
		s.Virtual = d.free(s.Real)
	}
	if !s.Virtual.IsValid() {
		s.Way, s.Why = KeptOut, why+", and no virtual range is free for it"
		return
	}
	d.taken = append(d.taken, s.Virtual)
	s.routes = []netip.Prefix{s.Virtual}
}

// earlier is the mapped subnet of before that s is, or is a part of: the one that decided for its addresses.
func (d *decision) earlier(s *candidate) (best Subnet, ok bool) {
	for _, b := range d.Before.Subnets {
		if b.Session == s.Session && b.Way == Mapped && inside(s.Real, b.Real) && (!ok || b.Real.Bits() > best.Real.Bits()) {
			best, ok = b, true
		}
	}
	return best, ok
}

// usable says whether a virtual subnet of before still has no rival.
func (d *decision) usable(v netip.Prefix) bool {
	return !slices.ContainsFunc(d.rivals, v.Overlaps)
}

// free finds the first subnet of p's size in the pools that overlaps nothing; invalid if there is none.
func (d *decision) free(p netip.Prefix) netip.Prefix {
	for _, pool := range d.Pools {
		if pool.Addr().Is4() != p.Addr().Is4() || pool.Bits() > p.Bits() {
			continue
		}
		next := netip.PrefixFrom(pool.Masked().Addr(), p.Bits())
		for pool.Contains(next.Addr()) {
			i := slices.IndexFunc(d.taken, next.Overlaps)
			if i < 0 {
				return next
			}
			last := next
			if d.taken[i].Bits() < next.Bits() {
				last = d.taken[i] // go past all of it
			}
			a := end(last)
			if !a.IsValid() {
				break
			}
			next = netip.PrefixFrom(a, p.Bits())
		}
	}
	return netip.Prefix{}
}

// cuts are what has to stay out of p: the API server, and never-proxy subnets inside it.
func cuts(c *Cluster, p netip.Prefix) []netip.Prefix {
	out := hosts(c.Servers)
	for _, n := range c.NeverProxy {
		if n.Bits() > p.Bits() {
			out = append(out, n)
		}
	}
	return out
}

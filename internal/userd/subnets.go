package userd

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/osroute"
	"github.com/doppel-dev/doppel/internal/resolver"
	"github.com/doppel-dev/doppel/internal/subnets"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// directTimeout bounds the try whether the laptop reaches the cluster without us. It is made only where a route of the laptop overlaps the
// cluster's subnets.
const directTimeout = 500 * time.Millisecond

// own are the ranges of the VIF's addresses, which no virtual address may be from.
var own = []netip.Prefix{netip.MustParsePrefix("198.18.0.0/30"), netip.MustParsePrefix("2001:2::/48")}

// noRoutes are the routes of a network that has none but ours.
func noRoutes() ([]osroute.Existing, error) { return nil, nil }

// addresses are a session's subnets on this laptop: the facts, and the plan that follows from them.
type addresses struct {
	key      string // the manager's, by which it is known again
	pools    []netip.Prefix
	existing func() ([]osroute.Existing, error)
	probe    func(ctx context.Context, link string, to netip.AddrPort, key string) error
	around   func() (before []subnets.Cluster, others []subnets.Subnet) // see network.around; nil: there is no other session
	log      *slog.Logger

	deciding sync.Mutex // one decision at a time; it may probe

	mu sync.Mutex
	// guarded by mu
	cluster subnets.Cluster
	info    control.Cluster
	plan    subnets.Plan
}

// newAddresses reads the options of a connect.
func newAddresses(o localapi.NetworkOptions, servers []netip.Addr, key string, log *slog.Logger) (*addresses, error) {
	a := &addresses{
		key: key, log: log, probe: probeManager,
		existing: func() ([]osroute.Existing, error) { return osroute.Existings(vifName) },
		cluster:  subnets.Cluster{Servers: servers, AlsoProxy: o.AlsoProxy, NeverProxy: o.NeverProxy, AllowConflicts: o.AllowConflicting},
	}
	if o.VirtualSubnet.IsValid() {
		a.pools = append([]netip.Prefix{o.VirtualSubnet.Masked()}, subnets.DefaultPools...)
	}
	var err error
	if a.cluster.VNAT, err = selectors("vnat", o.VNAT); err != nil {
		return nil, err
	}
	for _, v := range o.ProxyVia {
		subnet, workload, ok := strings.Cut(v, "=")
		if !ok || workload == "" {
			return nil, uerr.New(uerr.Usage, "for example: 10.1.0.0/16=web, or service=web", "proxy-via %q: want SUBNET=WORKLOAD", v)
		}
		sel, err := selectors("proxy-via", []string{subnet})
		if err != nil {
			return nil, err
		}
		a.cluster.Via = append(a.cluster.Via, subnets.Via{Selector: sel[0], Workload: workload})
	}
	for _, p := range slices.Concat(o.AlsoProxy, o.NeverProxy, o.AllowConflicting) {
		if !p.IsValid() || p != p.Masked() {
			return nil, uerr.New(uerr.Usage, "write it like 10.1.0.0/16", "%v is no subnet", p)
		}
	}
	for _, p := range o.AlsoProxy {
		if err := osroute.Check(p); err != nil {
			return nil, uerr.Wrap(err, uerr.Usage, "name a smaller subnet", "also-proxy")
		}
		if slices.Contains(o.NeverProxy, p) {
			return nil, uerr.New(uerr.Usage, "leave out one of the two", "%v is given to both also-proxy and never-proxy", p)
		}
	}
	return a, nil
}

// selectors reads subnets and the words for all subnets of a kind.
func selectors(option string, texts []string) ([]subnets.Selector, error) {
	kinds := map[string][]subnets.Kind{
		"service": {subnets.Service}, "pods": {subnets.Pod}, "also": {subnets.AlsoProxy},
		"all": {subnets.Service, subnets.Pod, subnets.AlsoProxy},
	}
	var out []subnets.Selector
	for _, t := range texts {
		if k, ok := kinds[t]; ok {
			out = append(out, subnets.Selector{Kinds: k})
			continue
		}
		p, err := netip.ParsePrefix(t)
		if err != nil {
			return nil, uerr.Wrap(err, uerr.Usage, "give a subnet like 10.1.0.0/16, or one of: service, pods, also, all", "%s", option)
		}
		out = append(out, subnets.Selector{Prefix: p.Masked()})
	}
	return out, nil
}

// learn decides anew for what the cluster says of itself, and says whether the plan is another one than before.
func (a *addresses) learn(ctx context.Context, info control.Cluster) bool {
	a.deciding.Lock()
	defer a.deciding.Unlock()
	a.mu.Lock()
	a.info = info
	a.cluster.Services, a.cluster.Pods, a.cluster.Nodes = info.ServiceCIDRs, info.PodCIDRs, info.Nodes
	a.mu.Unlock()
	return a.decide(ctx)
}

// look decides anew after the laptop's routes have changed.
func (a *addresses) look(ctx context.Context) bool {
	a.deciding.Lock()
	defer a.deciding.Unlock()
	return a.decide(ctx)
}

func (a *addresses) decide(ctx context.Context) bool {
	others, err := a.existing()
	if err != nil {
		a.log.Warn("routes of this machine not read, conflicts are not seen", "err", err)
	}
	a.mu.Lock()
	c, info, before := a.cluster, a.info, a.plan
	a.mu.Unlock()
	c.Direct = a.direct(ctx, c, info, others)
	var earlier []subnets.Cluster
	var taken []subnets.Subnet
	if a.around != nil {
		earlier, taken = a.around()
	}
	plan := subnets.Decide(subnets.Facts{
		Clusters: append(earlier, c), Others: others, Pools: a.pools, Reserved: own,
		Before: subnets.Plan{Subnets: slices.Concat(before.Subnets, taken)},
	}).Only(c.Session)
	if reflect.DeepEqual(plan, before) {
		return false
	}
	for _, s := range plan.Subnets {
		virtual := ""
		if s.Way == subnets.Mapped {
			virtual = s.Virtual.String()
		}
		a.log.Info("subnet", "subnet", s.Real.String(), "way", string(s.Way), "virtual", virtual, "why", s.Why)
	}
	a.mu.Lock()
	a.cluster, a.plan = c, plan
	a.mu.Unlock()
	return true
}

// direct finds the kinds of subnet that the laptop reaches by routes of its own, such as a VPN into the cluster's network: the manager answers
// there with its key. Only an overlap gives reason to try. What was mapped already stays so.
func (a *addresses) direct(ctx context.Context, c subnets.Cluster, info control.Cluster, others []osroute.Existing) []subnets.Kind {
	was := c.Direct
	c.Direct = nil
	a.mu.Lock()
	before := a.plan
	a.mu.Unlock()
	alone := subnets.Decide(subnets.Facts{Clusters: []subnets.Cluster{c}, Others: others, Pools: a.pools, Reserved: own})
	var out []subnets.Kind
	for kind, to := range map[subnets.Kind]netip.AddrPort{subnets.Service: info.ManagerService, subnets.Pod: info.ManagerPod} {
		if !to.IsValid() || before.HasMapped(kind) || !alone.HasMapped(kind) {
			continue
		}
		link := longest(others, to.Addr())
		if link == "" {
			continue
		}
		if a.reaches(ctx, link, to) {
			out = append(out, kind)
		}
	}
	// A node reaches services by rules, not by routes. Through the VIF they would get a source address that other nodes cannot answer.
	if slices.Contains(out, subnets.Pod) && !slices.Contains(out, subnets.Service) && !alone.HasMapped(subnets.Service) {
		first := len(before.Subnets) == 0 // later on the try would go through the VIF
		if first && info.ManagerService.IsValid() && a.reaches(ctx, "", info.ManagerService) || !first && slices.Contains(was, subnets.Service) {
			out = append(out, subnets.Service)
		}
	}
	slices.Sort(out)
	return out
}

// reaches says whether the manager answers behind an interface, or anywhere for "".
func (a *addresses) reaches(ctx context.Context, link string, to netip.AddrPort) bool {
	ctx, cancel := context.WithTimeout(ctx, directTimeout)
	defer cancel()
	err := a.probe(ctx, link, to, a.key)
	a.log.Info("tried to reach the manager without the tunnel", "addr", to.String(), "interface", link, "err", err)
	return err == nil
}

// longest is the interface of the longest route that an address has.
func longest(routes []osroute.Existing, a netip.Addr) string {
	link, bits := "", -1
	for _, r := range routes {
		if r.Prefix.Contains(a) && r.Prefix.Bits() > bits {
			link, bits = r.Link, r.Prefix.Bits()
		}
	}
	return link
}

// probeManager tries whether the manager with this key answers behind an interface.
func probeManager(ctx context.Context, link string, to netip.AddrPort, key string) error {
	var d net.Dialer
	if link != "" {
		d.Control = bindTo(link)
	}
	rt := &http.Transport{DialContext: d.DialContext, DisableKeepAlives: true}
	raw, err := tunnel.Upgrade(ctx, rt, fmt.Sprintf("http://%v/attach", to))
	if err != nil {
		return err
	}
	return tunnel.Probe(ctx, raw, key)
}

// known is what the cluster said of itself last.
func (a *addresses) known() control.Cluster {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.info
}

func (a *addresses) current() subnets.Plan {
	_, p := a.decided()
	return p
}

// decided is what the session has and wants, and what became of it.
func (a *addresses) decided() (subnets.Cluster, subnets.Plan) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cluster, a.plan
}

// here is the cluster's information in the laptop's addresses.
func (a *addresses) here(info control.Cluster) control.Cluster {
	c, p := a.decided()
	info.ServiceCIDRs, info.PodCIDRs = p.Of(c.Session, subnets.Service), p.Of(c.Session, subnets.Pod)
	return info
}

// real translates a flow's destination, and names the workload whose pods it leaves from, if any; false: no subnet of the cluster is there.
func (a *addresses) real(dst netip.AddrPort) (workload string, real netip.AddrPort, ok bool) {
	s, addr, ok := a.current().Find(dst.Addr())
	return s.Workload, netip.AddrPortFrom(addr, dst.Port()), ok
}

// workloads are those whose pods flows leave from.
func (a *addresses) workloads() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []string
	for _, v := range a.cluster.Via {
		if !slices.Contains(out, v.Workload) {
			out = append(out, v.Workload)
		}
	}
	return out
}

// mapped has the cluster's DNS answer in the laptop's addresses.
func (a *addresses) mapped(ask resolver.Ask) resolver.Ask {
	return func(ctx context.Context, query []byte) ([]byte, error) {
		c, p := a.decided()
		if !p.Maps(c.Session) {
			return ask(ctx, query)
		}
		return resolver.Translated(ask, resolver.Translation{
			Here: func(a netip.Addr) netip.Addr { return p.Here(c.Session, a) },
			There: func(l netip.Addr) netip.Addr {
				if _, c, ok := p.Find(l); ok {
					return c
				}
				return l
			},
		})(ctx, query)
	}
}

// list is for people and programs to read.
func (a *addresses) list() []localapi.Subnet {
	var out []localapi.Subnet
	for _, s := range a.current().Subnets {
		out = append(out, localapi.Subnet{Kind: string(s.Kind), Real: s.Real, Virtual: s.Virtual, Way: string(s.Way), Why: s.Why, Workload: s.Workload})
	}
	return out
}

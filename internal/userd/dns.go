package userd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/resolver"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/tunnel"
)

// vifDNS is where DNS is answered behind the VIF, for resolvers of the laptop that choose servers by domain.
var vifDNS = netip.MustParseAddr("198.18.0.2")

const (
	// probeName is answered with vifDNS: who gets that answer asks us.
	probeName = "probe." + resolver.SearchDomain
	// stubAddr is where systemd-resolved answers.
	stubAddr = "127.0.0.53:53"

	resolvedTimeout = 2 * time.Second // from its settings to its first question
	resolvedPause   = 50 * time.Millisecond
	listenPause     = time.Second // until a listener is tried again
)

// dnsState is what the root daemon is told of DNS.
type dnsState struct {
	listen6       netip.AddrPort
	scoped        []netip.AddrPort
	resolvedFails bool
	gaveUp        []netip.AddrPort // the laptop's resolvers when that was found out
}

// tryAgain says that systemd-resolved was given up on a machine that had other resolvers then: what failed there says little of it now.
func (d dnsState) tryAgain(st rootapi.State) bool {
	return d.resolvedFails && !slices.Equal(st.Resolvers, d.gaveUp)
}

// startResolver starts the resolver with a listener on loopback.
func (n *network) startResolver() error {
	var err error
	if n.resolver, err = resolver.New(resolver.Config{Cluster: noCluster, DialUpstream: n.dialUpstream, Log: n.log}); err != nil {
		return fmt.Errorf("DNS listener: %w", err)
	}
	n.group.Go("resolver", n.resolver.Run)
	return nil
}

// noCluster is asked for names of no session, which there are none of.
func noCluster(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("the name is no cluster's")
}

// setNamesLocked has the resolver know the names of all sessions.
func (n *network) setNamesLocked() { n.resolver.SetNames(n.namesLocked()...) }

// namesLocked are the names of all sessions; those of one that joined earlier go before.
func (n *network) namesLocked() []resolver.Names {
	var out []resolver.Names
	var servers []string
	for _, s := range n.sessions {
		if u, err := url.Parse(s.cluster.Server); err == nil {
			servers = append(servers, u.Hostname())
		}
	}
	for _, s := range n.sessions {
		hosts := podHosts(s.intercepts.hosts(), slices.Concat(servers, s.cfg.dns.ExcludeSuffixes))
		ns := names(s.addrs.here(s.addrs.known()), s.cluster.Namespace, s.cfg.dns, hosts)
		ns.Session, ns.Ask, ns.Asked = s.cfg.name, s.addrs.mapped(s.query), s.intercepts.resolving()
		out = append(out, ns)
	}
	return out
}

// podHosts are the names in pods' hosts files that get their addresses here: none at or under one of the suffixes. To reach an API server elsewhere, or
// through its own tunnel, would cost the session; and what the user said goes before what a pod template says.
func podHosts(hosts []control.Host, but []string) []control.Host {
	return slices.DeleteFunc(hosts, func(h control.Host) bool {
		return slices.ContainsFunc(but, func(suffix string) bool {
			suffix = strings.ToLower(strings.Trim(suffix, "."))
			return h.Name == suffix || suffix != "" && strings.HasSuffix(h.Name, "."+suffix)
		})
	})
}

// names translates the manager's message and the user's options for the resolver.
func names(info control.Cluster, namespace string, o localapi.DNSOptions, hosts []control.Host) resolver.Names {
	out := resolver.Names{
		ClusterDomain: info.Domain, Namespace: namespace, PodCIDRs: info.PodCIDRs, ServiceCIDRs: info.ServiceCIDRs,
		Services: map[string][]string{}, Headless: map[string][]string{},
		MappedNamespaces: o.MappedNamespaces, IncludeSuffixes: o.IncludeSuffixes, ExcludeSuffixes: o.ExcludeSuffixes,
		Mappings: []resolver.Mapping{{Name: probeName, Addr: vifDNS}},
	}
	for _, h := range hosts { // before the user's own, which win
		out.Mappings = append(out.Mappings, resolver.Mapping{Name: h.Name, Addr: h.Addr})
	}
	for ns, list := range info.Services {
		for _, s := range list {
			out.Services[ns] = append(out.Services[ns], s.Name)
			if s.Headless {
				out.Headless[ns] = append(out.Headless[ns], s.Name)
			}
		}
	}
	for _, m := range o.Mappings {
		to := resolver.Mapping{Name: m.Name, Target: m.AliasFor}
		if a, err := netip.ParseAddr(m.AliasFor); err == nil {
			to = resolver.Mapping{Name: m.Name, Addr: a}
		}
		out.Mappings = append(out.Mappings, to)
	}
	return out
}

func (n *network) desiredDNSLocked() *rootapi.DNS {
	return &rootapi.DNS{
		Listen: n.resolver.Addr(), Listen6: n.dns.listen6, Scoped: n.dns.scoped, Server: vifDNS,
		Domains:       n.resolver.RouteDomains(),
		ResolvedFails: n.dns.resolvedFails,
	}
}

// followDNS keeps up with where the laptop's queries come from, until ctx ends.
func (n *network) followDNS(ctx context.Context) error {
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-n.moved:
		case <-again:
		}
		again = nil
		if err := n.listenDNS(); err != nil {
			n.log.Debug("not all DNS listeners", "err", err) // an address that is being checked for duplicates, for one
			again = time.After(listenPause)
		}
		n.mu.Lock()
		mode, tryAgain := n.state.DNSMode, n.dns.tryAgain(n.state)
		n.mu.Unlock()
		if tryAgain {
			if err := n.change(func() { n.dns.resolvedFails = false }); err != nil {
				n.log.Warn("network not changed", "err", err)
			}
		}
		if mode != rootapi.DNSResolved {
			continue
		}
		if err := resolvedAsks(ctx); err != nil && ctx.Err() == nil {
			n.log.Warn("systemd-resolved does not ask here, taking another way", "err", err)
			if err := n.change(func() { n.dns.resolvedFails = true }); err != nil {
				n.log.Warn("network not changed", "err", err)
			}
			n.mu.Lock()
			n.dns.gaveUp = slices.Clone(n.state.Resolvers)
			n.mu.Unlock()
		}
	}
}

// listenDNS has the resolver listen on ::1 and, for each link that a resolver with a link-local address is on, on the laptop's own such
// address, and tells the root daemon.
func (n *network) listenDNS() error {
	want := []netip.Addr{netip.IPv6Loopback()}
	n.mu.Lock()
	for _, r := range n.state.Resolvers {
		if a, ok := linkLocal(r.Addr().Zone()); ok && !slices.Contains(want, a) {
			want = append(want, a)
		}
	}
	n.mu.Unlock()
	got, err := n.resolver.SetListeners(want)
	if len(want) == 1 {
		err = nil // IPv6 is off, and stays so
	}
	var listen6 netip.AddrPort
	var scoped []netip.AddrPort
	for _, l := range got {
		if l.Addr().IsLoopback() {
			listen6 = l
		} else {
			scoped = append(scoped, l)
		}
	}
	if cerr := n.change(func() { n.dns.listen6, n.dns.scoped = listen6, scoped }); cerr != nil {
		n.log.Warn("network not changed", "err", cerr)
	}
	return err
}

// linkLocal returns the laptop's own link-local address on a link.
func linkLocal(link string) (netip.Addr, bool) {
	if link == "" {
		return netip.Addr{}, false
	}
	l, err := net.InterfaceByName(link)
	if err != nil {
		return netip.Addr{}, false
	}
	addrs, err := l.Addrs()
	if err != nil {
		return netip.Addr{}, false
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() {
			return p.Addr().WithZone(link), true
		}
	}
	return netip.Addr{}, false
}

// resolvedAsks waits until systemd-resolved asks us, and says why it does not.
func resolvedAsks(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, resolvedTimeout)
	defer cancel()
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, stubAddr)
	}}
	for {
		got, err := r.LookupNetIP(ctx, "ip4", probeName+".")
		if err == nil && slices.Contains(got, vifDNS) {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, errors.New("it did not pass a question on in time"))
		case <-time.After(resolvedPause):
		}
	}
}

// dialHere serves what enters the VIF and is not for the cluster: queries to vifDNS, and everything for a resolver whose address
// is routed there. own is false for all else.
func (n *network) dialHere(ctx context.Context, network string, dst netip.AddrPort) (c net.Conn, own bool, err error) {
	n.mu.Lock()
	link := n.bypassLocked(dst.Addr())
	n.mu.Unlock()
	var d net.Dialer
	switch {
	case dst.Addr() != vifDNS && link == "":
		return nil, false, nil
	case dst.Port() == 53:
		c, err = d.DialContext(ctx, network, n.resolver.Addr().String())
	case link != "":
		d.Control = bindTo(link)
		c, err = d.DialContext(ctx, network, dst.String())
	default:
		err = syscall.ECONNREFUSED
	}
	return c, true, err
}

// bypassLocked returns the link through which a resolver is reached whose address is routed into the VIF, "" for any other.
func (n *network) bypassLocked(a netip.Addr) string {
	for _, b := range n.state.Bypass {
		if b.Resolver == a {
			return b.Link
		}
	}
	return ""
}

// query asks the cluster's DNS.
func (s *session) query(ctx context.Context, q []byte) ([]byte, error) {
	m, err := s.tunnel(ctx, queryPatience)
	if err != nil {
		return nil, fmt.Errorf("the tunnel is down: %w", err)
	}
	return tunnel.Query(ctx, m, q)
}

// dialUpstream asks a resolver that the laptop had before, through a socket that the DNS capture lets pass.
func (n *network) dialUpstream(ctx context.Context, nw string, addr netip.AddrPort) (net.Conn, error) {
	n.mu.Lock()
	root, link := n.root, n.bypassLocked(addr.Addr())
	n.mu.Unlock()
	var d net.Dialer
	if link != "" {
		d.Control = bindTo(link)
		return d.DialContext(ctx, nw, addr.String())
	}
	if root != nil {
		c, err := root.DialMarked(ctx, nw, addr)
		if !errors.Is(err, rootapi.ErrClosed) {
			return c, err
		}
	}
	return d.DialContext(ctx, nw, addr.String()) // without a root daemon there is no capture (D5), so nothing has to pass it
}

package userd

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/netstack"
	"github.com/doppel-dev/doppel/internal/resolver"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/tundev"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/wire"
)

// vifName is the TUN device's name.
const vifName = "doppel0"

// vifAddr is the TUN device's own address, the source of the laptop's connections into the cluster as far as the laptop sees.
// It is from the range for benchmarks of interconnected devices (RFC 2544, RFC 6890), which no network routes.
var vifAddr = netip.MustParsePrefix("198.18.0.1/32")

// vifAddr6 is its IPv6 address, from the range for the same purpose (RFC 5180, RFC 6890).
var vifAddr6 = netip.MustParsePrefix("2001:2::1/128")

// rootRecovery is how long the laptop may be without a root daemon before the network is taken down (D4).
const rootRecovery = 5 * time.Second

// network is the laptop's side of the cluster's network: the VIF, the stack behind it, and the resolver.
type network struct {
	s        *session
	stack    *netstack.Stack
	resolver *resolver.Server
	addrs    *addresses
	exclude  []netip.Prefix
	group    *lifecycle.Group
	moved    chan struct{} // the state is another one, for followDNS

	apply sync.Mutex // one SetNetwork at a time

	mu sync.Mutex
	// guarded by mu
	info   control.Cluster
	dns    dnsState
	root   *rootapi.Client
	wanted rootapi.Network
	state  rootapi.State
	closed bool
}

// openNetwork creates the VIF through the root daemon and starts the stack and the resolver behind it.
func openNetwork(ctx context.Context, s *session, info control.Cluster) (_ *network, err error) {
	n := &network{s: s, group: lifecycle.New(context.Background(), s.log), moved: make(chan struct{}, 1), info: info}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	servers, err := s.cluster.ServerAddrs(ctx)
	if err != nil {
		return nil, err
	}
	for _, a := range servers {
		n.exclude = append(n.exclude, netip.PrefixFrom(a, a.BitLen()))
	}
	if n.addrs, err = newAddresses(s.cfg.network, servers, s.manager.Key, s.log); err != nil {
		return nil, err
	}
	if s.cfg.outside != nil {
		n.addrs.existing = noRoutes
	}
	n.addrs.learn(ctx, info)
	if err := n.startResolver(info); err != nil {
		return nil, err
	}
	if n.root, err = s.cfg.root(ctx, n.rootOptions()); err != nil {
		return nil, err
	}
	n.wanted = n.desiredLocked()
	st, tun, err := n.root.SetNetwork(ctx, n.wanted)
	if err != nil {
		return nil, uerr.Wrap(err, uerr.Internal, "see the root daemon's log with: doppel status", "the root daemon could not set up the network")
	}
	n.setState(st)
	if err := n.startStack(tun); err != nil {
		return nil, err
	}
	n.group.Go("dns", n.followDNS)
	if s.cfg.outside == nil {
		n.group.Go("routes", func(ctx context.Context) error { return n.addrs.follow(ctx, n.renew) })
	}
	return n, nil
}

func (n *network) startStack(tun *os.File) error {
	if tun == nil {
		return errors.New("the root daemon passed no TUN device")
	}
	dev, err := tundev.New(tun)
	if err != nil {
		return errors.Join(err, tun.Close())
	}
	n.stack, err = netstack.New(netstack.Config{Device: dev, DialTCP: n.dialTCP, DialUDP: n.dialUDP, DialEcho: n.dialEcho, Log: n.s.log})
	if err != nil {
		return errors.Join(err, dev.Close())
	}
	n.group.Go("stack", n.stack.Run)
	return nil
}

// rootOptions has the root daemon tell us of new resolvers: DHCP, a VPN, another network.
func (n *network) rootOptions() rootapi.Options {
	return rootapi.Options{Changed: n.setState, Log: n.s.log}
}

// desiredLocked is the state asked of the root daemon for what the cluster says of itself.
func (n *network) desiredLocked() rootapi.Network {
	w := rootapi.Network{Name: vifName, Exclude: n.exclude, DNS: n.desiredDNSLocked(), Routes: n.addrs.current().Routes()}
	w.Addrs = vifAddrs(w.Routes)
	return w
}

// vifAddrs are the VIF's addresses: IPv4 always, IPv6 where something is routed there, so that a laptop with IPv6 off hears of that only
// when it matters.
func vifAddrs(routes []netip.Prefix) []netip.Prefix {
	out := []netip.Prefix{vifAddr}
	if slices.ContainsFunc(routes, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		out = append(out, vifAddr6)
	}
	return out
}

// setCluster follows changes of the cluster's names and subnets.
func (n *network) setCluster(info control.Cluster) {
	n.addrs.learn(n.group.Context(), info)
	n.renew()
}

// renew puts the names and the plan for the subnets in force.
func (n *network) renew() {
	n.change(func() {
		n.info = n.addrs.known()
		n.resolver.SetNames(names(n.addrs.here(n.info), n.s.cluster.Namespace, n.s.cfg.dns))
	})
}

// change does fn under mu and asks the root daemon for what is desired then, if that is something else.
func (n *network) change(fn func()) {
	n.apply.Lock()
	defer n.apply.Unlock()
	n.mu.Lock()
	fn()
	w := n.desiredLocked()
	same := reflect.DeepEqual(w, n.wanted)
	n.wanted = w
	root, closed := n.root, n.closed
	n.mu.Unlock()
	if same || closed || root == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), rootRecovery)
	defer cancel()
	st, _, err := root.SetNetwork(ctx, w)
	if err != nil {
		n.s.log.Warn("network not changed", "err", err)
		return
	}
	n.setState(st)
}

func (n *network) setState(st rootapi.State) {
	for _, w := range st.Warnings {
		n.s.log.Warn("root daemon", "detail", w)
	}
	n.resolver.SetUpstreams(st.Resolvers)
	n.mu.Lock()
	n.state = st
	n.mu.Unlock()
	select {
	case n.moved <- struct{}{}:
	default:
	}
}

// run watches the stack and the root daemon until ctx ends.
func (n *network) run(ctx context.Context) error {
	for {
		n.mu.Lock()
		root := n.root
		n.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-n.group.Context().Done():
			return context.Cause(n.group.Context())
		case <-root.Done():
		}
		if ctx.Err() != nil || n.isClosed() {
			return nil
		}
		n.s.log.Warn("the root daemon is gone, starting it again")
		if err := n.recoverRoot(ctx); err != nil {
			return err
		}
	}
}

// recoverRoot gets the root daemon back and lets it adopt the VIF, which lives on in this process: open flows do not notice.
func (n *network) recoverRoot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, rootRecovery)
	defer cancel()
	var err error
	for ctx.Err() == nil {
		var root *rootapi.Client
		if root, err = n.s.cfg.root(ctx, n.rootOptions()); err == nil {
			n.mu.Lock()
			n.root = root
			w := n.wanted
			n.mu.Unlock()
			var st rootapi.State
			if st, err = root.AdoptNetwork(ctx, w); err == nil {
				n.setState(st)
				return nil
			}
			_ = root.Close()
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
	return uerr.Wrap(err, uerr.Internal, "connect again with: doppel connect", "the root daemon is gone and could not be started again")
}

func (n *network) isClosed() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.closed
}

// close removes everything from the laptop: the root daemon's part first, so that no query is captured any more.
func (n *network) close() {
	n.mu.Lock()
	root, done := n.root, n.closed
	n.closed = true
	n.mu.Unlock()
	if done {
		return
	}
	if root != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		if _, _, err := root.SetNetwork(ctx, rootapi.Network{}); err != nil {
			n.s.log.Debug("root daemon's part not removed by request", "err", err) // it goes with the connection
		}
		cancel()
		_ = root.Close()
	}
	n.group.Stop()
	if n.resolver != nil {
		n.resolver.Close()
	}
	if err := n.group.Wait(); err != nil {
		n.s.log.Debug("network ended with", "err", err)
	}
}

func (n *network) dialTCP(ctx context.Context, src, dst netip.AddrPort) (flow.Stream, error) {
	if c, own, err := n.dialHere(ctx, "tcp", dst); own {
		if err != nil {
			return nil, err
		}
		return flow.FromTCP(c.(*net.TCPConn)), nil
	}
	if o := n.s.cfg.outside; o != nil {
		if s, ok, err := o.DialTCP(ctx, dst); ok {
			return s, err
		}
	}
	st, err := n.open(ctx, wire.ProtoTCP, src, dst)
	if err != nil {
		return nil, err // not a nil stream in an interface
	}
	return st, nil
}

func (n *network) dialUDP(ctx context.Context, src, dst netip.AddrPort) (flow.Packets, error) {
	if c, own, err := n.dialHere(ctx, "udp", dst); own {
		if err != nil {
			return nil, err
		}
		return flow.FromUDP(c.(*net.UDPConn)), nil
	}
	if o := n.s.cfg.outside; o != nil {
		if p, ok, err := o.DialUDP(ctx, dst); ok {
			return p, err
		}
	}
	st, err := n.open(ctx, wire.ProtoUDP, src, dst)
	if err != nil {
		return nil, err
	}
	return st, nil
}

func (n *network) dialEcho(ctx context.Context, src, dst netip.Addr) (flow.Packets, error) {
	m := n.s.link.Session()
	if m == nil {
		return nil, os.ErrDeadlineExceeded
	}
	workload, real, ok := n.real(netip.AddrPortFrom(dst, 0))
	if !ok || workload != "" { // agents send no pings
		return nil, syscall.EHOSTUNREACH
	}
	st, err := tunnel.DialEcho(ctx, m, src, real.Addr())
	if err != nil {
		return nil, err
	}
	return st, nil
}

// flows counts what the laptop did so far.
func (n *network) flows() *localapi.Flows {
	t, q := n.stack.Stats(), n.resolver.Stats()
	return &localapi.Flows{
		TCPOpen: int(t.TCPOpen), UDPOpen: int(t.UDPOpen), Total: uint64(t.TCPTotal) + uint64(t.UDPTotal),
		UpBytes: uint64(t.TCPUpBytes) + uint64(t.UDPUpBytes), DownBytes: uint64(t.TCPDownBytes) + uint64(t.UDPDownBytes),
		DNSQueries: q.Queries, DNSCluster: q.Cluster, DNSCached: q.CacheHits, DNSFailed: q.Failed,
	}
}

func (n *network) problems() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.state.Warnings
}

func (n *network) status() *localapi.RootStatus {
	n.mu.Lock()
	defer n.mu.Unlock()
	st := &localapi.RootStatus{Interface: n.state.Name, Routes: n.state.Routes, DNS: n.state.DNSMode, DNSReason: n.state.DNSReason}
	for _, r := range n.state.Resolvers {
		st.Resolvers = append(st.Resolvers, r.String())
	}
	return st
}

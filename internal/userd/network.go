package userd

import (
	"context"
	"errors"
	"log/slog"
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
	"github.com/doppel-dev/doppel/internal/kube"
	"github.com/doppel-dev/doppel/internal/lifecycle"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/netstack"
	"github.com/doppel-dev/doppel/internal/netwatch"
	"github.com/doppel-dev/doppel/internal/osroute"
	"github.com/doppel-dev/doppel/internal/resolver"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/subnets"
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

// vif owns the network that the sessions of this process share. It is open while there is one.
type vif struct {
	root    func(context.Context, rootapi.Options) (*rootapi.Client, error)
	outside Outside // nil: the laptop's own routes lead the clusters' addresses alone to us
	log     *slog.Logger

	mu   sync.Mutex // one joins or leaves at a time
	open *network   // guarded by mu
}

// join puts a session into the network, which it opens for the first.
func (v *vif) join(ctx context.Context, s *session, info control.Cluster) (*network, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	n := v.open
	if n == nil || n.group.Context().Err() != nil { // or it has just ended, and its sessions are about to
		n = newNetwork(v)
	}
	if err := n.add(ctx, s, info); err != nil {
		n.remove(s)
		return nil, err
	}
	v.open = n
	return n, nil
}

// leave takes a session out of its network, which is closed after the last.
func (v *vif) leave(n *network, s *session) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if n.remove(s) && v.open == n {
		v.open = nil
	}
}

// network is the laptop's side of the clusters' networks: the VIF, the stack behind it, and the resolver.
type network struct {
	vif      *vif
	log      *slog.Logger
	stack    *netstack.Stack
	resolver *resolver.Server
	group    *lifecycle.Group
	moved    chan struct{} // the state is another one, for followDNS

	apply sync.Mutex // one SetNetwork at a time

	mu sync.Mutex
	// guarded by mu
	sessions []*session // in the order in which they joined
	dns      dnsState
	root     *rootapi.Client
	wanted   rootapi.Network
	applied  bool // wanted is in force
	state    rootapi.State
	closed   bool
}

func newNetwork(v *vif) *network {
	return &network{vif: v, log: v.log, group: lifecycle.New(context.Background(), v.log), moved: make(chan struct{}, 1)}
}

// add makes a session's cluster a part of the network. For the first it creates the VIF through the root daemon and starts the stack and
// the resolver behind it.
func (n *network) add(ctx context.Context, s *session, info control.Cluster) error {
	servers, err := s.cluster.ServerAddrs(ctx)
	if err != nil {
		return err
	}
	servers = append(servers, kube.DirectAddrs(ctx, s.manager.Direct)...) // nor may these lead into the tunnel
	if s.addrs, err = newAddresses(s.cfg.network, servers, s.manager.Key, s.log); err != nil {
		return err
	}
	s.addrs.cluster.Session = s.cfg.name
	s.addrs.around = func() ([]subnets.Cluster, []subnets.Subnet) { return n.around(s) }
	if n.vif.outside != nil {
		s.addrs.existing = noRoutes
	}
	s.addrs.learn(ctx, info)
	if n.stack != nil {
		if err := n.change(func() { n.addLocked(s) }); err != nil {
			return uerr.Wrap(err, uerr.Internal, "see the root daemon's log with: doppel status", "the root daemon could not change the network")
		}
		return nil
	}
	return n.start(ctx, s)
}

// addLocked has a session's names and addresses found from now on.
func (n *network) addLocked(s *session) {
	n.sessions = append(n.sessions, s)
	n.setNamesLocked()
}

func (n *network) start(ctx context.Context, s *session) error {
	if err := n.startResolver(); err != nil {
		return err
	}
	n.mu.Lock()
	n.addLocked(s)
	n.mu.Unlock()
	if err := n.listenDNS(); err != nil {
		return err
	}
	var err error
	if n.root, err = n.vif.root(ctx, n.rootOptions()); err != nil {
		return err
	}
	n.wanted = n.desiredLocked()
	st, tun, err := n.root.SetNetwork(ctx, n.wanted)
	if err != nil {
		return uerr.Wrap(err, uerr.Internal, "see the root daemon's log with: doppel status", "the root daemon could not set up the network")
	}
	n.inForce(st)
	if err := n.startStack(tun); err != nil {
		return err
	}
	n.group.Go("root daemon", n.watchRoot)
	n.group.Go("dns", n.followDNS)
	if n.vif.outside == nil {
		n.group.Go("routes", n.followRoutes)
	}
	return nil
}

// remove takes a session out and says whether it was the last; then nothing is left on the laptop.
func (n *network) remove(s *session) (last bool) {
	n.mu.Lock()
	others := slices.ContainsFunc(n.sessions, func(o *session) bool { return o != s })
	n.mu.Unlock()
	if !others {
		n.close()
		return true
	}
	err := n.change(func() {
		n.sessions = slices.DeleteFunc(slices.Clone(n.sessions), func(o *session) bool { return o == s })
		n.setNamesLocked()
	})
	if err != nil {
		n.log.Warn("network not changed", "err", err)
	}
	return false
}

// members are the sessions in the order in which they joined.
func (n *network) members() []*session {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.sessions // replaced as a whole
}

// around is what a session's subnets have to yield to: the clusters that came before, and the subnets that the others have here.
func (n *network) around(s *session) (before []subnets.Cluster, others []subnets.Subnet) {
	mine := false
	for _, o := range n.members() {
		if o == s {
			mine = true
			continue
		}
		c, p := o.addrs.decided()
		others = append(others, p.Subnets...)
		if !mine {
			before = append(before, c)
		}
	}
	return before, others
}

func (n *network) startStack(tun *os.File) error {
	if tun == nil {
		return errors.New("the root daemon passed no TUN device")
	}
	dev, err := tundev.New(tun)
	if err != nil {
		return errors.Join(err, tun.Close())
	}
	n.stack, err = netstack.New(netstack.Config{Device: dev, DialTCP: n.dialTCP, DialUDP: n.dialUDP, DialEcho: n.dialEcho, Log: n.log})
	if err != nil {
		return errors.Join(err, dev.Close())
	}
	n.group.Go("stack", n.stack.Run)
	return nil
}

// rootOptions has the root daemon tell us of new resolvers: DHCP, a VPN, another network.
func (n *network) rootOptions() rootapi.Options {
	return rootapi.Options{Changed: n.setState, Log: n.log}
}

// desiredLocked is the state asked of the root daemon for what the clusters say of themselves.
func (n *network) desiredLocked() rootapi.Network {
	w := rootapi.Network{Name: vifName, DNS: n.desiredDNSLocked()}
	w.Routes, w.Exclude = n.routesLocked()
	w.Addrs = vifAddrs(w.Routes)
	return w
}

// routesLocked are what is routed to the clusters, and what is kept out of it: their API servers, of which one may be a node of another cluster.
func (n *network) routesLocked() (routes, kept []netip.Prefix) {
	for _, s := range n.sessions {
		c, p := s.addrs.decided()
		for _, a := range c.Servers {
			kept = append(kept, netip.PrefixFrom(a, a.BitLen()))
		}
		routes = append(routes, p.Routes()...)
	}
	return osroute.Tidy(slices.DeleteFunc(routes, func(p netip.Prefix) bool { return slices.Contains(kept, p) })), kept
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

// setCluster follows changes of a cluster's names and subnets. Those of later sessions may have to yield to them.
func (n *network) setCluster(s *session, info control.Cluster) {
	s.addrs.learn(n.group.Context(), info)
	for _, o := range n.members() {
		if o != s {
			o.addrs.look(n.group.Context())
		}
	}
	n.renew()
}

// followRoutes decides anew whenever the laptop's routes have changed, until ctx ends.
func (n *network) followRoutes(ctx context.Context) error {
	err := netwatch.Watch(ctx, func() {
		changed := false
		for _, s := range n.members() {
			changed = s.addrs.look(ctx) || changed
		}
		if changed {
			n.renew()
		}
	})
	if err != nil { // all works until a VPN comes up
		n.log.Warn("changes of the routes are not seen", "err", err)
	}
	return nil
}

// renew puts the names and the plans for the subnets in force.
func (n *network) renew() {
	if err := n.change(n.setNamesLocked); err != nil {
		n.log.Warn("network not changed", "err", err)
	}
}

// changeRetry is when a change is tried again that the root daemon has not made.
const changeRetry = 10 * time.Second

// change does fn under mu and asks the root daemon for what is desired then, if that is something else.
func (n *network) change(fn func()) error {
	n.apply.Lock()
	defer n.apply.Unlock()
	n.mu.Lock()
	fn()
	w := n.desiredLocked()
	same := n.applied && reflect.DeepEqual(w, n.wanted)
	n.wanted, n.applied = w, same
	root, closed := n.root, n.closed
	n.mu.Unlock()
	if same || closed || root == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), rootRecovery)
	defer cancel()
	st, _, err := root.SetNetwork(ctx, w)
	if err != nil {
		time.AfterFunc(changeRetry, n.renew)
		return err
	}
	n.inForce(st)
	return nil
}

// inForce notes that the root daemon has done what is wanted.
func (n *network) inForce(st rootapi.State) {
	n.mu.Lock()
	n.applied = true
	n.mu.Unlock()
	n.setState(st)
}

// setState notes a state of the root daemon's, unless a newer one is known: a reply reaches change on another way than rootOptions' Changed.
func (n *network) setState(st rootapi.State) {
	n.mu.Lock()
	if st.Seq < n.state.Seq {
		n.mu.Unlock()
		return
	}
	n.state = st
	n.resolver.SetUpstreams(st.Resolvers)
	n.mu.Unlock()
	for _, w := range st.Warnings {
		n.log.Warn("root daemon", "detail", w)
	}
	select {
	case n.moved <- struct{}{}:
	default:
	}
}

// run waits for the network's end, which is the session's, until ctx ends.
func (n *network) run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-n.group.Context().Done():
	}
	if n.isClosed() {
		return nil
	}
	return context.Cause(n.group.Context())
}

// watchRoot gets a root daemon that is gone back, until ctx ends.
func (n *network) watchRoot(ctx context.Context) error {
	for {
		n.mu.Lock()
		root := n.root
		n.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-root.Done():
		}
		if ctx.Err() != nil || n.isClosed() {
			return nil
		}
		n.log.Warn("the root daemon is gone, starting it again")
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
		if root, err = n.vif.root(ctx, n.rootOptions()); err == nil {
			if err = n.adopt(ctx, root); err == nil {
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

// adopt has a root daemon adopt the VIF before it is asked for anything else: that would have it make another one.
func (n *network) adopt(ctx context.Context, root *rootapi.Client) error {
	n.apply.Lock()
	defer n.apply.Unlock()
	n.mu.Lock()
	n.root = root
	n.state.Seq = 0 // this one counts anew
	w := n.wanted
	n.mu.Unlock()
	st, err := root.AdoptNetwork(ctx, w)
	if err != nil {
		return err
	}
	n.inForce(st)
	return nil
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
			n.log.Debug("root daemon's part not removed by request", "err", err) // it goes with the connection
		}
		cancel()
		_ = root.Close()
	}
	n.group.Stop()
	if n.resolver != nil {
		n.resolver.Close()
	}
	if err := n.group.Wait(); err != nil {
		n.log.Debug("network ended with", "err", err)
	}
}

func (n *network) dialTCP(ctx context.Context, src, dst netip.AddrPort) (flow.Stream, error) {
	if c, own, err := n.dialHere(ctx, "tcp", dst); own {
		if err != nil {
			return nil, err
		}
		return flow.FromTCP(c.(*net.TCPConn)), nil
	}
	if o := n.vif.outside; o != nil {
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
	if o := n.vif.outside; o != nil {
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
	s, workload, real := n.owner(netip.AddrPortFrom(dst, 0))
	if s == nil || workload != "" { // agents send no pings
		return nil, syscall.EHOSTUNREACH
	}
	m := s.link.Session()
	if m == nil {
		return nil, os.ErrDeadlineExceeded
	}
	st, err := tunnel.DialEcho(ctx, m, src, real.Addr())
	if err != nil {
		return nil, ofFlow(err)
	}
	return st, nil
}

// flows counts what the laptop did so far, with all clusters.
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

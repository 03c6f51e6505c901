// Package resolver owns the DNS engine of the laptop: it decides which names are the cluster's, asks the cluster for those, and hands all others to the resolvers the laptop had.
package resolver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/miekg/dns"

	"github.com/doppel-dev/doppel/internal/lifecycle"
)

// Config is everything a Server is made from. Cluster and Log are required.
type Config struct {
	// Listen is the address for UDP and TCP, on the same port; default "127.0.0.1:0". It should not be a wildcard: answers
	// to a redirected query leave with the listener's address.
	Listen string

	// Cluster carries one DNS message to the cluster's DNS and returns the answer. It must return when ctx ends (at most
	// 2.8 s). The query offers EDNS0 with 4096 bytes; an implementation whose far end speaks UDP asks again by TCP when the
	// answer is truncated. It is called from many goroutines.
	Cluster func(ctx context.Context, query []byte) ([]byte, error)

	// DialUpstream connects to one of the upstream resolvers; network is "udp" or "tcp". Default: net.Dialer. The root
	// daemon's marked sockets come in here, so that our own queries are not captured again. Sockets are reused for a while.
	DialUpstream func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error)

	// Upstreams are the first resolvers; see SetUpstreams.
	Upstreams []netip.AddrPort

	Log *slog.Logger
}

// Server answers DNS queries on loopback. A query runs through a short chain:
//
//	parse → find ─ the cluster's → cache → one flight per question → rewrite → Config.Cluster
//	             ├ mapped        → find, for the name that it stands for
//	             ├ nowhere       → NXDOMAIN
//	             └ all others    → limit → forward to the upstreams, bytes untouched
//
// The two branches share no limit and no lock that is held over I/O, so a slow cluster never slows an outside name.
type Server struct {
	cfg      Config
	log      *slog.Logger
	main     *listener // nil in tests of the chain alone
	addr     netip.AddrPort
	cache    *cache
	cluster  *clusterHandler
	upstream *forwarder
	stats    counters

	names atomic.Pointer[directory]

	mu sync.Mutex
	// guarded by mu
	more   []*listener      // beside udp and tcp; see SetListeners
	group  *lifecycle.Group // while Run runs
	closed bool
}

// New validates cfg and binds the sockets; nothing is answered before Run. A Server that is never run must be closed.
func New(cfg Config) (*Server, error) {
	var errs []error
	if cfg.Cluster == nil {
		errs = append(errs, errors.New("resolver: Config.Cluster is missing"))
	}
	if cfg.Log == nil {
		errs = append(errs, errors.New("resolver: Config.Log is missing"))
	}
	if cfg.Listen == "" {
		cfg.Listen = "127.0.0.1:0"
	}
	listen, err := netip.ParseAddrPort(cfg.Listen)
	if err != nil {
		errs = append(errs, fmt.Errorf("resolver: Config.Listen: %w", err))
	}
	if cfg.DialUpstream == nil {
		cfg.DialUpstream = func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, addr.String())
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	l, err := bind(listen)
	if err != nil {
		return nil, fmt.Errorf("listen for DNS: %w", err)
	}
	s := newServer(cfg)
	s.main, s.addr = l, l.addr
	s.SetUpstreams(cfg.Upstreams)
	return s, nil
}

// newServer wires the chain without sockets.
func newServer(cfg Config) *Server {
	s := &Server{cfg: cfg, log: cfg.Log, cache: newCache(maxCacheEntries, maxCacheBytes)}
	s.cluster = newClusterHandler(cfg.Cluster, s.cache, &s.stats, cfg.Log)
	s.upstream = newForwarder(cfg.DialUpstream, &s.stats, cfg.Log)
	return s
}

// Addr is the address of the listeners on cfg.Listen.
func (s *Server) Addr() netip.AddrPort { return s.addr }

// SetNames replaces the sets that decide which names are the clusters', in the order in which they are asked; cached answers it may
// have changed are dropped. The zero value makes no name the cluster's.
func (s *Server) SetNames(all ...Names) {
	d := compileAll(all)
	var old directory
	if p := s.names.Swap(&d); p != nil {
		old = *p
	}
	s.cache.invalidate(old, d)
}

// SetUpstreams replaces the resolvers that answer everything else, in order of preference. Port 0 means 53; the server's own
// address is left out. The same list again keeps sockets and health.
func (s *Server) SetUpstreams(addrs []netip.AddrPort) {
	var list []netip.AddrPort
	for _, a := range addrs {
		if a.IsValid() && a.Port() == 0 {
			a = netip.AddrPortFrom(a.Addr(), 53)
		}
		if a.IsValid() && a != s.addr {
			list = append(list, a)
		}
	}
	s.upstream.set(list)
}

// SetListeners makes addrs the addresses that are listened on beside Addr, each on a port of its own, and returns them with their ports in
// the same order. Those that are listened on already keep theirs. An address that cannot be listened on is left out and told of.
func (s *Server) SetListeners(addrs []netip.Addr) ([]netip.AddrPort, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errClosed
	}
	var keep []*listener
	var out []netip.AddrPort
	var errs []error
	for _, a := range addrs {
		i := slices.IndexFunc(s.more, func(l *listener) bool { return l.addr.Addr() == a })
		if i >= 0 {
			keep, out = append(keep, s.more[i]), append(out, s.more[i].addr)
			continue
		}
		l, err := bind(netip.AddrPortFrom(a, 0))
		if err != nil {
			errs = append(errs, fmt.Errorf("listen for DNS: %w", err))
			continue
		}
		keep, out = append(keep, l), append(out, l.addr)
		if s.group != nil {
			s.serveLocked(l)
		}
	}
	for _, l := range s.more {
		if !slices.Contains(keep, l) {
			l.close()
		}
	}
	s.more = keep
	return out, errors.Join(errs...)
}

// serveLocked answers the queries to l until it is closed.
func (s *Server) serveLocked(l *listener) {
	g := s.group
	g.Go("dns-udp", func(ctx context.Context) error { return s.serveUDP(ctx, g, l.udp) })
	g.Go("dns-tcp", func(ctx context.Context) error { return s.serveTCP(ctx, g, l.tcp) })
}

// FlushCache drops all cached answers, for when another part of the cluster answers from now on (an intercept's agent).
func (s *Server) FlushCache() { s.cache.flush() }

// Run answers queries until ctx ends, then closes the sockets and waits for the queries in flight, whose contexts have ended.
func (s *Server) Run(ctx context.Context) error {
	g := lifecycle.New(ctx, s.log)
	stop := context.AfterFunc(g.Context(), s.closeSockets)
	defer stop()
	s.mu.Lock()
	if !s.closed {
		s.group = g
		for _, l := range append([]*listener{s.main}, s.more...) {
			s.serveLocked(l)
		}
	}
	s.mu.Unlock()
	g.Go("dns-sweep", s.upstream.sweep)
	err := g.Wait()
	s.Close()
	return err
}

// Close releases the sockets and ends all queries in flight. Run does it by itself.
func (s *Server) Close() {
	s.closeSockets()
	s.cluster.close()
	s.upstream.close()
}

func (s *Server) closeSockets() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.main == nil {
		return
	}
	s.closed = true
	s.main.close()
	for _, l := range s.more {
		l.close()
	}
}

// Exchange answers one DNS message as the sockets do; network is "udp" or "tcp" and decides the limit of the answer's size. A
// nil answer means that none may be sent. It is the way in for queries that arrive otherwise (through the stack).
func (s *Server) Exchange(ctx context.Context, network string, msg []byte) []byte {
	s.stats.queries.Add(1)
	q, err := parseQuery(msg, network == "tcp")
	switch {
	case errors.Is(err, errNoAnswer):
		s.stats.malformed.Add(1)
		return nil
	case err != nil:
		s.stats.malformed.Add(1)
		return formErr(msg)
	}
	answer, err := s.handle(ctx, q)
	if err != nil {
		s.stats.failed.Add(1)
		s.log.Debug("dns query failed", "name", q.name, "type", q.qtype, "cluster", q.cluster, "err", err)
		return q.failure(err)
	}
	return answer
}

// handle decides whose the query is and runs that branch. A panic fails this query only.
func (s *Server) handle(ctx context.Context, q *query) (answer []byte, err error) {
	defer func() {
		if r := recover(); r != nil {
			s.log.Error("dns query panicked", "name", q.name, "err", fmt.Sprint(r))
			err = errors.New("internal error")
		}
	}()
	q.generation = s.cache.generation()
	var d directory
	if p := s.names.Load(); p != nil {
		d = *p
	}
	return s.answer(ctx, q, d, maxAliases)
}

// answer is handle for a question that may be asked for a mapping's sake, of which aliases may follow.
func (s *Server) answer(ctx context.Context, q *query, d directory, aliases int) ([]byte, error) {
	var t *table
	var m Mapping
	to := toUpstream
	if q.standard() {
		if t, to, q.suffix, m = d.find(q.name); to == toCluster {
			q.service, q.session, q.ask = t.serviceOf(q.fqdn()), t.session, t.ask
		}
	}
	switch to {
	case toCluster:
		q.cluster = true
		s.stats.cluster.Add(1)
		return s.cluster.serve(ctx, q)
	case toNowhere:
		s.stats.cluster.Add(1)
		return q.nothing(dns.RcodeNameError)
	case toMapping:
		s.stats.cluster.Add(1)
		return s.alias(ctx, q, m, directory{t}, aliases)
	case toUpstream:
	}
	s.stats.upstream.Add(1)
	return s.upstream.serve(ctx, q)
}

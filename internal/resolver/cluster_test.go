package resolver

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

var clusterRecords = []string{
	"web.default.svc.cluster.local. 5 IN A 10.96.0.10",
	"web.default.svc.cluster.local. 5 IN AAAA fd00:10:96::a",
	"_http._tcp.web.default.svc.cluster.local. 30 IN SRV 0 100 80 web.default.svc.cluster.local.",
	"ext.default.svc.cluster.local. 30 IN CNAME mid.example.com.",
	"mid.example.com. 20 IN CNAME end.example.com.",
	"end.example.com. 10 IN A 192.0.2.7",
	"empty.default.svc.cluster.local. 5 IN TXT \"x\"",
	"db.shop.svc.cluster.local. 5 IN A 10.244.0.7",
	"db.shop.svc.cluster.local. 3 IN A 10.244.0.8",
	"db-0.db.shop.svc.cluster.local. 5 IN A 10.244.0.7",
	"db.shop.svc.cluster.local. 5 IN MX 10 db-0.db.shop.svc.cluster.local.",
	"10.0.96.10.in-addr.arpa. 5 IN PTR web.default.svc.cluster.local.",
}

// server is a Server without sockets.
func server(tb testing.TB, cluster func(context.Context, []byte) ([]byte, error)) *Server {
	tb.Helper()
	s := newServer(Config{Cluster: cluster, Log: slog.New(slog.DiscardHandler)})
	s.SetNames(names)
	tb.Cleanup(s.Close)
	return s
}

func exchange(tb testing.TB, s *Server, network string, m *dns.Msg) *dns.Msg {
	tb.Helper()
	return unpack(tb, s.Exchange(context.Background(), network, pack(tb, m)))
}

func TestClusterAnswers(t *testing.T) {
	tests := []struct {
		name   string
		qtype  uint16
		rcode  int
		answer []string
		ns     []string
	}{
		{"web", dns.TypeA, 0, []string{"web. 5 IN A 10.96.0.10"}, nil},
		{"web.default", dns.TypeA, 0, []string{"web.default. 5 IN A 10.96.0.10"}, nil},
		{"web.default.svc", dns.TypeAAAA, 0, []string{"web.default.svc. 5 IN AAAA fd00:10:96::a"}, nil},
		{"web.default.svc.cluster.local", dns.TypeA, 0, []string{"web.default.svc.cluster.local. 5 IN A 10.96.0.10"}, nil},
		{"WEB.DeFault", dns.TypeA, 0, []string{"WEB.DeFault. 5 IN A 10.96.0.10"}, nil},
		{"_http._tcp.web", dns.TypeSRV, 0, []string{"_http._tcp.web. 30 IN SRV 0 100 80 web.default.svc.cluster.local."}, nil},
		{"db.shop", dns.TypeA, 0, []string{"db.shop. 5 IN A 10.244.0.7", "db.shop. 3 IN A 10.244.0.8"}, nil},
		{"db-0.db.shop", dns.TypeA, 0, []string{"db-0.db.shop. 5 IN A 10.244.0.7"}, nil},
		{"db.shop", dns.TypeMX, 0, []string{"db.shop. 5 IN MX 10 db-0.db.shop.svc.cluster.local."}, nil},
		{"empty", dns.TypeTXT, 0, []string{`empty. 5 IN TXT "x"`}, nil},
		{"ext", dns.TypeA, 0, []string{
			"ext. 30 IN CNAME mid.example.com.", "mid.example.com. 20 IN CNAME end.example.com.", "end.example.com. 10 IN A 192.0.2.7",
		}, nil},
		{"ext", dns.TypeCNAME, 0, []string{
			"ext. 30 IN CNAME mid.example.com.", "mid.example.com. 20 IN CNAME end.example.com.",
		}, nil},
		{"10.0.96.10.in-addr.arpa", dns.TypePTR, 0, []string{"10.0.96.10.in-addr.arpa. 5 IN PTR web.default.svc.cluster.local."}, nil},
		{"empty", dns.TypeA, 0, nil, []string{"empty. 30 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 1 7200 1800 86400 12"}},
		{"gone", dns.TypeA, dns.RcodeNameError, nil, []string{"gone. 30 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 1 7200 1800 86400 12"}},
		{"gone.default.svc.cluster.local", dns.TypeA, dns.RcodeNameError, nil, []string{soa}},
	}
	c := newFakeCluster(t, clusterRecords...)
	s := server(t, c.ask)
	for _, tt := range tests {
		for _, pass := range []string{"fresh", "cached"} {
			m := question(tt.name, tt.qtype)
			r := exchange(t, s, "udp", m)
			if r.Id != m.Id || r.Rcode != tt.rcode || !r.Response || !r.RecursionAvailable || !r.RecursionDesired || r.Authoritative {
				t.Errorf("%s %s: header %+v", tt.name, pass, r.MsgHdr)
			}
			if diff := cmp.Diff(m.Question, r.Question); diff != "" {
				t.Errorf("%s %s: question: %s", tt.name, pass, diff)
			}
			if diff := cmp.Diff(append([]string{}, tt.answer...), texts(r.Answer)); diff != "" {
				t.Errorf("%s %s: answer: %s", tt.name, pass, diff)
			}
			if diff := cmp.Diff(append([]string{}, tt.ns...), texts(r.Ns)); diff != "" {
				t.Errorf("%s %s: authority: %s", tt.name, pass, diff)
			}
			if len(r.Extra) > 0 {
				t.Errorf("%s %s: an OPT record for a client without EDNS0: %v", tt.name, pass, r.Extra)
			}
		}
	}
	if st := s.Stats(); st.CacheHits < uint64(len(tests)) || st.ClusterErrors != 0 {
		t.Errorf("stats: %+v", st)
	}
}

func TestClusterQuery(t *testing.T) {
	var seen *dns.Msg
	c := newFakeCluster(t, clusterRecords...)
	c.hook = func(_ context.Context, m *dns.Msg) error { seen = m.Copy(); return nil }
	s := server(t, c.ask)
	m := question("WeB.default", dns.TypeA)
	m.SetEdns0(1232, true)
	r := exchange(t, s, "udp", m)
	if got := seen.Question[0].Name; got != "web.default.svc.cluster.local." {
		t.Errorf("asked for %q", got)
	}
	if o := seen.IsEdns0(); o == nil || o.UDPSize() != ourUDP || !o.Do() {
		t.Errorf("asked with %v", o)
	}
	if o := r.IsEdns0(); o == nil || o.UDPSize() != ourUDP || !o.Do() || o.Version() != 0 {
		t.Errorf("answered with %v", o)
	}
}

func TestClusterCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newFakeCluster(t, clusterRecords...)
		s := server(t, c.ask)
		ttl := func(name string) uint32 {
			r := exchange(t, s, "udp", question(name, dns.TypeA))
			if len(r.Answer) > 0 {
				return r.Answer[0].Header().Ttl
			}
			return r.Ns[0].Header().Ttl
		}
		steps := []struct {
			name  string
			wait  time.Duration
			ttl   uint32
			asked int64
		}{
			{"web", 0, 5, 1},
			{"web", 2500 * time.Millisecond, 3, 1},
			{"web", 2499 * time.Millisecond, 1, 1},
			{"web", time.Millisecond, 5, 2},
			{"web.default", 0, 5, 3},
			{"db.shop", 0, 5, 4},
			{"db.shop", 2 * time.Second, 3, 4},
			{"db.shop", time.Second, 5, 5}, // the least TTL of the set was 3
			{"gone", 0, 30, 6},
			{"gone", 11 * time.Second, 19, 6},
			{"gone", time.Second, 30, 7}, // the SOA's minimum is 12
		}
		for i, step := range steps {
			time.Sleep(step.wait)
			got := ttl(step.name)
			if n := c.asked.Load(); got != step.ttl || n != step.asked {
				t.Errorf("step %d, %s: TTL %d after %d questions, want %d after %d", i, step.name, got, n, step.ttl, step.asked)
			}
		}
	})
}

func TestClusterCacheSkips(t *testing.T) {
	for name, change := range map[string]func(*dns.Msg){
		"no SOA":      func(m *dns.Msg) { m.Answer, m.Ns = nil, nil },
		"truncated":   func(m *dns.Msg) { m.Truncated = true },
		"server fail": func(m *dns.Msg) { m.Rcode = dns.RcodeServerFailure },
		"TTL 0":       func(m *dns.Msg) { m.Answer[0].Header().Ttl = 0 },
		"odd TTL":     func(m *dns.Msg) { m.Answer[0].Header().Ttl = 1 << 31 },
	} {
		c := newFakeCluster(t, clusterRecords...)
		s := server(t, func(ctx context.Context, query []byte) ([]byte, error) {
			raw, err := c.ask(ctx, query)
			if err != nil {
				return nil, err
			}
			m := unpack(t, raw)
			change(m)
			return m.Pack()
		})
		for range 2 {
			exchange(t, s, "udp", question("web", dns.TypeA))
		}
		if n := c.asked.Load(); n != 2 {
			t.Errorf("%s: asked %d times, want 2", name, n)
		}
	}
}

func TestNamesInvalidate(t *testing.T) {
	c := newFakeCluster(t, clusterRecords...)
	s := server(t, c.ask)
	all := func() int64 {
		before := c.asked.Load()
		for _, name := range []string{"web", "db.shop", "_http._tcp.web.default", "gone"} {
			exchange(t, s, "udp", question(name, dns.TypeA))
		}
		exchange(t, s, "udp", question("10.0.96.10.in-addr.arpa", dns.TypePTR))
		return c.asked.Load() - before
	}
	with := func(change func(*Names)) Names {
		n := names
		n.Services = map[string][]string{}
		for ns, list := range names.Services {
			n.Services[ns] = slices.Clone(list)
		}
		change(&n)
		return n
	}
	for _, tt := range []struct {
		name  string
		names Names
		asks  int64
	}{
		{"first", names, 5},
		{"the same", with(func(*Names) {}), 0},
		{"the same in another order", with(func(n *Names) { n.PodCIDRs = []netip.Prefix{n.PodCIDRs[1], n.PodCIDRs[0]} }), 0},
		{"another service came", with(func(n *Names) { n.Services["shop"] = append(n.Services["shop"], "new") }), 1}, // PTR
		{"back", names, 1},
		{"web went from another namespace", with(func(n *Names) { n.Services["dev"] = nil }), 1},
		{"db is no longer headless", with(func(n *Names) { n.Headless, n.Services["dev"] = nil, nil }), 2},
		{"a new pod CIDR", with(func(n *Names) { n.PodCIDRs = nil }), 5},
	} {
		s.SetNames(tt.names)
		if got := all(); got != tt.asks {
			t.Errorf("%s: asked %d times, want %d", tt.name, got, tt.asks)
		}
	}
	if s.FlushCache(); s.Stats().CacheEntries != 0 {
		t.Error("flush left something")
	}
}

// An answer that was on its way when its service changed is neither kept nor given to who asks afterwards.
func TestNamesChangeInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hold := make(chan struct{})
		c := newFakeCluster(t, clusterRecords...)
		c.hook = func(context.Context, *dns.Msg) error { <-hold; return nil }
		s := server(t, c.ask)
		var wg sync.WaitGroup
		wg.Go(func() { exchange(t, s, "udp", question("web", dns.TypeA)) })
		synctest.Wait()
		wg.Go(func() { exchange(t, s, "udp", question("api", dns.TypeA)) })
		synctest.Wait()
		n := names
		n.Services = map[string][]string{"default": {"web"}}
		s.SetNames(n)
		wg.Go(func() { exchange(t, s, "udp", question("web", dns.TypeA)) })
		synctest.Wait()
		if got := c.asked.Load(); got != 3 {
			t.Errorf("asked %d times, want 3", got)
		}
		close(hold)
		wg.Wait()
		if got := s.Stats().CacheEntries; got != 1 {
			t.Errorf("%d answers kept, want that of the last question", got)
		}
	})
}

func TestClusterSingleflight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hold := make(chan struct{})
		c := newFakeCluster(t, clusterRecords...)
		c.hook = func(context.Context, *dns.Msg) error { <-hold; return nil }
		s := server(t, c.ask)
		gone, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { // the first goes away; the others keep its flight
			r := unpack(t, s.Exchange(gone, "udp", pack(t, question("web", dns.TypeA))))
			if r.Rcode != dns.RcodeServerFailure {
				t.Errorf("the client that went away got %v", r)
			}
		})
		synctest.Wait()
		for i := range 20 {
			wg.Go(func() {
				m := question([]string{"web", "WEB"}[i%2], dns.TypeA)
				if r := exchange(t, s, "udp", m); len(r.Answer) != 1 || r.Answer[0].Header().Name != m.Question[0].Name {
					t.Errorf("got %v", r)
				}
			})
		}
		synctest.Wait()
		cancel()
		synctest.Wait()
		close(hold)
		wg.Wait()
		if got := c.asked.Load(); got != 1 {
			t.Errorf("asked %d times, want 1", got)
		}
	})
}

func TestClusterFailures(t *testing.T) {
	good := newFakeCluster(t, clusterRecords...)
	for name, ask := range map[string]func(context.Context, []byte) ([]byte, error){
		"error":   func(context.Context, []byte) ([]byte, error) { return nil, errors.New("no tunnel") },
		"garbage": func(context.Context, []byte) ([]byte, error) { return []byte("no DNS message at all"), nil },
		"nothing": func(context.Context, []byte) ([]byte, error) { return nil, nil },
		"panic":   func(context.Context, []byte) ([]byte, error) { panic("defect") },
		"hangs":   func(ctx context.Context, _ []byte) ([]byte, error) { <-ctx.Done(); return nil, ctx.Err() },
		"wrong id": func(ctx context.Context, q []byte) ([]byte, error) {
			return good.ask(ctx, withID(q, ^binary.BigEndian.Uint16(q)))
		},
		"truncated bytes": func(ctx context.Context, q []byte) ([]byte, error) {
			raw, err := good.ask(ctx, q)
			return raw[:len(raw)-20], err
		},
		"another question": func(ctx context.Context, q []byte) ([]byte, error) {
			m := unpack(t, q)
			m.Question[0].Name = "api.default.svc.cluster.local."
			return good.ask(ctx, pack(t, m))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := server(t, ask)
				began := time.Now()
				m := question("web", dns.TypeA)
				m.SetEdns0(1232, false)
				r := exchange(t, s, "udp", m)
				if took := time.Since(began); r.Rcode != dns.RcodeServerFailure || took > 3*time.Second {
					t.Errorf("rcode %d after %v", r.Rcode, took)
				}
				o := r.IsEdns0()
				if o == nil || len(o.Option) != 1 || !strings.Contains(o.Option[0].String(), "doppel: cluster DNS: ") {
					t.Errorf("without the reason: %v", r)
				}
				synctest.Wait() // for the flight to count its error, after the client had its answer
				if st := s.Stats(); st.ClusterErrors != 1 || st.Failed != 1 || st.CacheEntries != 0 {
					t.Errorf("stats: %+v", st)
				}
			})
		})
	}
}

// A cluster function that breaks its contract and never returns still costs its clients no more than 3 s.
func TestClusterNeverReturns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		s := server(t, func(context.Context, []byte) ([]byte, error) { <-release; return nil, errors.New("late") })
		began := time.Now()
		r := exchange(t, s, "udp", question("web", dns.TypeA))
		if took := time.Since(began); r.Rcode != dns.RcodeServerFailure || took > 3*time.Second {
			t.Errorf("rcode %d after %v", r.Rcode, took)
		}
		close(release)
	})
}

// With the cluster hung, its limit is reached and refused at once, cached names are answered, and outside names do not notice.
func TestClusterLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newFakeCluster(t, clusterRecords...)
		hang := false
		c.hook = func(ctx context.Context, _ *dns.Msg) error {
			if hang {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}
		s := server(t, c.ask)
		u := newPipeUpstream(answerA("192.0.2.1"))
		s.upstream.dial = u.dial
		s.SetUpstreams(pipeAddrs(1))
		exchange(t, s, "udp", question("web", dns.TypeA))
		hang = true
		var wg sync.WaitGroup
		for i := range maxClusterFlights {
			wg.Go(func() {
				exchange(t, s, "udp", question("x"+string(rune('0'+i%10))+string(rune('a'+i/10))+".y.svc", dns.TypeA))
			})
		}
		synctest.Wait()
		began := time.Now()
		if r := exchange(t, s, "udp", question("one.more.svc", dns.TypeA)); r.Rcode != dns.RcodeServerFailure {
			t.Errorf("over the limit: %v", r)
		}
		if r := exchange(t, s, "udp", question("web", dns.TypeA)); len(r.Answer) != 1 {
			t.Errorf("cached: %v", r)
		}
		if r := exchange(t, s, "udp", question("example.com", dns.TypeA)); len(r.Answer) != 1 {
			t.Errorf("outside: %v", r)
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("that took %v", took)
		}
		wg.Wait()
		hang = false
		if r := exchange(t, s, "udp", question("one.more.svc", dns.TypeA)); r.Rcode != dns.RcodeNameError {
			t.Errorf("after the hang: %v", r)
		}
	})
}

func TestClusterSize(t *testing.T) {
	var records []string
	for i := range 100 {
		records = append(records, fmt.Sprintf("big.default.svc.cluster.local. 5 IN A 10.244.0.%d", i))
	}
	c := newFakeCluster(t, records...)
	s := start(t, c.ask)
	for _, tt := range []struct {
		network string
		edns    uint16
		size    int
		full    bool
	}{
		{"udp", 0, 512, false}, {"udp", 100, 512, false}, {"udp", 1232, 1232, false}, {"udp", 4096, 4096, true}, {"udp", 65535, 65535, true}, {"tcp", 0, 65535, true},
	} {
		m := question("big", dns.TypeA)
		if tt.edns > 0 {
			m.SetEdns0(tt.edns, false)
		}
		r := ask(t, s, tt.network, m)
		r.Compress = true
		if r.Truncated == tt.full || (len(r.Answer) == 100) != tt.full || len(r.Answer) == 0 || r.Len() > tt.size {
			t.Errorf("%s, EDNS %d: TC %v with %d records", tt.network, tt.edns, r.Truncated, len(r.Answer))
		}
		if (r.IsEdns0() != nil) != (tt.edns > 0) {
			t.Errorf("%s, EDNS %d: OPT %v", tt.network, tt.edns, r.IsEdns0())
		}
	}
}

func TestCacheBounds(t *testing.T) {
	c := newCache(3, 10000)
	put := func(name string, size int) {
		c.put(cacheKey{name: name}, "", &answer{msg: make([]byte, size), keep: time.Hour}, c.generation())
	}
	has := func(name string) bool { _, _, ok := c.get(cacheKey{name: name}); return ok }
	put("a", 10)
	put("b", 10)
	put("c", 10)
	has("a")
	put("d", 10)
	if has("b") || !has("a") || !has("c") || !has("d") || c.len() != 3 {
		t.Error("the least recently used was not the one to go")
	}
	put("e", 9000)
	if !has("e") || c.bytes > 10000 {
		t.Errorf("%d bytes", c.bytes)
	}
	put("f", 20000)
	if c.len() != 0 || c.bytes != 0 {
		t.Errorf("an answer beyond the bound was kept: %d entries, %d bytes", c.len(), c.bytes)
	}
}

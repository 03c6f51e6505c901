package resolver

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// names is what most tests have synced.
var names = Names{
	Namespace: "default",
	Services: map[string][]string{
		"default": {"web", "api", "db", "ext", "gone", "empty", "big"},
		"shop":    {"cart", "db"},
		"dev":     {"golink"},
	},
	Headless:     map[string][]string{"shop": {"db"}},
	PodCIDRs:     []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/56")},
	ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")},
}

const soa = "cluster.local. 30 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 1 7200 1800 86400 12"

// fakeCluster answers like the cluster's CoreDNS: authoritative for cluster.local, NXDOMAIN and NODATA with a SOA.
type fakeCluster struct {
	records map[string][]dns.RR // owner name in lower case
	hook    func(ctx context.Context, m *dns.Msg) error

	asked atomic.Int64
}

func newFakeCluster(tb testing.TB, records ...string) *fakeCluster {
	tb.Helper()
	c := &fakeCluster{records: make(map[string][]dns.RR)}
	for _, r := range records {
		rr := mustRR(tb, r)
		c.records[rr.Header().Name] = append(c.records[rr.Header().Name], rr)
	}
	return c
}

func mustRR(tb testing.TB, s string) dns.RR {
	tb.Helper()
	rr, err := dns.NewRR(s)
	if err != nil {
		tb.Fatal(err)
	}
	return rr
}

func (c *fakeCluster) ask(ctx context.Context, query []byte) ([]byte, error) {
	c.asked.Add(1)
	var m, r dns.Msg
	if err := m.Unpack(query); err != nil {
		return nil, err
	}
	if c.hook != nil {
		if err := c.hook(ctx, &m); err != nil {
			return nil, err
		}
	}
	r.SetReply(&m)
	r.Authoritative = true
	if m.IsEdns0() != nil {
		r.SetEdns0(4096, m.IsEdns0().Do())
	}
	name, known := m.Question[0].Name, false
	for range 8 {
		rrs, ok := c.records[name]
		known = known || ok
		target := ""
		for _, rr := range rrs {
			switch rr := rr.(type) {
			case *dns.CNAME:
				r.Answer = append(r.Answer, dns.Copy(rr))
				target = rr.Target
			default:
				if rr.Header().Rrtype == m.Question[0].Qtype {
					r.Answer = append(r.Answer, dns.Copy(rr))
				}
			}
		}
		if target == "" {
			break
		}
		name = target
	}
	if len(r.Answer) == 0 {
		rr, _ := dns.NewRR(soa)
		r.Ns = append(r.Ns, rr)
		if !known {
			r.Rcode = dns.RcodeNameError
		}
	}
	return r.Pack()
}

// fakeUpstream is a resolver on loopback, UDP and TCP on one port.
type fakeUpstream struct {
	addr netip.AddrPort
	udp  *net.UDPConn
	tcp  *net.TCPListener
	wg   sync.WaitGroup

	mu     sync.Mutex
	answer func(network string, query []byte) []byte // nil: silence
	seen   [][]byte
}

// newFakeUpstream answers every A question with addr.
func newFakeUpstream(tb testing.TB, addr string) *fakeUpstream {
	tb.Helper()
	l, err := bind(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		tb.Fatal(err)
	}
	u := &fakeUpstream{addr: l.addr, udp: l.udp, tcp: l.tcp, answer: answerA(addr)}
	u.wg.Go(u.serveUDP)
	u.wg.Go(u.serveTCP)
	tb.Cleanup(u.stop)
	return u
}

func (u *fakeUpstream) stop() {
	_ = u.udp.Close()
	_ = u.tcp.Close()
	u.wg.Wait()
}

func (u *fakeUpstream) set(answer func(network string, query []byte) []byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.answer = answer
}

func (u *fakeUpstream) reply(network string, query []byte) []byte {
	u.mu.Lock()
	u.seen = append(u.seen, append([]byte(nil), query...))
	answer := u.answer
	u.mu.Unlock()
	return answer(network, query)
}

func (u *fakeUpstream) queries() [][]byte {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.seen
}

func (u *fakeUpstream) serveUDP() {
	buf := make([]byte, maxMessage)
	for {
		n, from, err := u.udp.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		if a := u.reply("udp", buf[:n]); a != nil {
			_, _ = u.udp.WriteToUDPAddrPort(a, from)
		}
	}
}

func (u *fakeUpstream) serveTCP() {
	for {
		c, err := u.tcp.Accept()
		if err != nil {
			return
		}
		u.wg.Go(func() {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			msg, err := readTCP(c)
			if err != nil {
				return
			}
			if a := u.reply("tcp", msg); a != nil {
				_ = writeTCP(c, a)
			}
		})
	}
}

// answerA answers with one A record, or NODATA.
func answerA(addr string) func(string, []byte) []byte {
	return func(_ string, query []byte) []byte {
		var m, r dns.Msg
		if m.Unpack(query) != nil || len(m.Question) != 1 {
			return nil
		}
		r.SetReply(&m)
		r.RecursionAvailable = true
		if q := m.Question[0]; q.Qtype == dns.TypeA {
			r.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: q.Qclass, Ttl: 300}, A: net.ParseIP(addr)}}
		}
		out, _ := r.Pack()
		return out
	}
}

func answerCode(code int) func(string, []byte) []byte {
	return func(_ string, query []byte) []byte {
		var m, r dns.Msg
		if m.Unpack(query) != nil {
			return nil
		}
		r.SetRcode(&m, code)
		out, _ := r.Pack()
		return out
	}
}

func silence(string, []byte) []byte { return nil }

// start runs a server on loopback until the test ends.
func start(tb testing.TB, cluster func(context.Context, []byte) ([]byte, error), upstreams ...netip.AddrPort) *Server {
	tb.Helper()
	s, err := New(Config{Cluster: cluster, Upstreams: upstreams, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		tb.Fatal(err)
	}
	s.SetNames(names)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	tb.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Errorf("Run: %v", err)
		}
	})
	return s
}

// ask sends one question over network to the server's socket.
func ask(tb testing.TB, s *Server, network string, m *dns.Msg) *dns.Msg {
	tb.Helper()
	c := dns.Client{Net: network, Timeout: 10 * time.Second, UDPSize: maxMessage}
	r, _, err := c.Exchange(m, s.Addr().String())
	if err != nil {
		tb.Fatalf("%s %s: %v", network, m.Question[0].String(), err)
	}
	return r
}

func question(name string, qtype uint16) *dns.Msg {
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(name), qtype)
	return m
}

func pack(tb testing.TB, m *dns.Msg) []byte {
	tb.Helper()
	b, err := m.Pack()
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func unpack(tb testing.TB, b []byte) *dns.Msg {
	tb.Helper()
	m := new(dns.Msg)
	if err := m.Unpack(b); err != nil {
		tb.Fatalf("unpack %x: %v", b, err)
	}
	return m
}

// texts gives the records without the blanks of their text form.
func texts(rrs []dns.RR) []string {
	out := []string{}
	for _, rr := range rrs {
		s := []rune(rr.String())
		for i, c := range s {
			if c == '\t' {
				s[i] = ' '
			}
		}
		out = append(out, string(s))
	}
	return out
}

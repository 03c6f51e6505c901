package resolver

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// pipeUpstreams are resolvers over in-memory connections, for tests with a fake clock: the i-th answers on 192.0.2.i:53.
type pipeUpstreams struct {
	mu      sync.Mutex
	answers []func(network string, query []byte) []byte
	delays  []time.Duration
	refuse  []bool
	asked   []atomic.Int64
	dialled atomic.Int64
	open    atomic.Int64
	cuts    atomic.Int64 // sockets made before the last cut are silent
}

func newPipeUpstream(answers ...func(string, []byte) []byte) *pipeUpstreams {
	return &pipeUpstreams{
		answers: answers, delays: make([]time.Duration, len(answers)), refuse: make([]bool, len(answers)), asked: make([]atomic.Int64, len(answers)),
	}
}

func pipeAddrs(n int) []netip.AddrPort {
	var out []netip.AddrPort
	for i := range n {
		out = append(out, netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 0))
	}
	return out
}

func (p *pipeUpstreams) set(i int, answer func(string, []byte) []byte, delay time.Duration, refuse bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answers[i], p.delays[i], p.refuse[i] = answer, delay, refuse
}

func (p *pipeUpstreams) dial(_ context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
	i := addr.Addr().As4()[3]
	p.mu.Lock()
	refuse := p.refuse[i]
	p.mu.Unlock()
	if refuse || addr.Port() != 53 {
		return nil, errors.New("connection refused")
	}
	p.dialled.Add(1)
	p.open.Add(1)
	near, far := net.Pipe()
	cuts := p.cuts.Load()
	go func() {
		defer p.open.Add(-1)
		defer far.Close()
		buf := make([]byte, 4096)
		for {
			n, err := far.Read(buf)
			if err != nil {
				return
			}
			p.asked[i].Add(1)
			p.mu.Lock()
			answer, delay := p.answers[i], p.delays[i]
			p.mu.Unlock()
			time.Sleep(delay)
			if cuts != p.cuts.Load() {
				continue
			}
			if a := answer(network, buf[:n]); a != nil {
				if _, err := far.Write(a); err != nil {
					return
				}
			}
		}
	}()
	return near, nil
}

func noCluster(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("the cluster was asked")
}

// outside asks for an outside name and returns the address in the answer, or the code's name.
func outside(t *testing.T, s *Server) string {
	t.Helper()
	r := exchange(t, s, "udp", question("example.com", dns.TypeA))
	for _, rr := range r.Answer {
		if a, ok := rr.(*dns.A); ok {
			return a.A.String()
		}
	}
	return dns.RcodeToString[r.Rcode]
}

func upstreamServer(t *testing.T, answers ...func(string, []byte) []byte) (*Server, *pipeUpstreams) {
	t.Helper()
	p := newPipeUpstream(answers...)
	s := server(t, noCluster)
	s.upstream.dial = p.dial
	s.SetUpstreams(pipeAddrs(len(answers)))
	return s, p
}

// losing is an upstream to which the first n datagrams get lost.
func losing(n int64, answer func(string, []byte) []byte) func(string, []byte) []byte {
	var seen atomic.Int64
	return func(network string, q []byte) []byte {
		if seen.Add(1) <= n {
			return nil
		}
		return answer(network, q)
	}
}

// answerAlias answers with an alias whose target has nothing of the type.
func answerAlias(_ string, query []byte) []byte {
	var m, r dns.Msg
	if m.Unpack(query) != nil {
		return nil
	}
	r.SetReply(&m)
	r.Answer = []dns.RR{&dns.CNAME{Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeCNAME, Class: dns.ClassINET, Ttl: 300}, Target: "elsewhere.example."}}
	out, _ := r.Pack()
	return out
}

func took(began time.Time) time.Duration { return time.Since(began).Round(time.Millisecond) }

func TestUpstreamFailover(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, p := upstreamServer(t, answerA("192.0.2.100"), answerA("192.0.2.101"))
		steps := []struct {
			what   string
			change func()
			want   string
			took   time.Duration
		}{
			{"the first answers", func() {}, "192.0.2.100", 0},
			{"the first is silent", func() { p.set(0, silence, 0, false) }, "192.0.2.101", upstreamStagger},
			{"one lost datagram is no reason", func() {}, "192.0.2.101", upstreamStagger},
			{"silent for all its time is remembered", func() { time.Sleep(upstreamTimeout) }, "192.0.2.101", 0},
			{"time to look, still silent", func() { time.Sleep(upstreamRetry + 1) }, "192.0.2.101", 0},
			{"again, alive", func() { p.set(0, answerA("192.0.2.100"), 0, false); time.Sleep(probeTimeout + upstreamRetry + 1) }, "192.0.2.101", 0},
			{"so it is the first again", func() {}, "192.0.2.100", 0},
			{"the first is slow", func() { p.set(0, answerA("192.0.2.100"), 2*time.Second, false); p.set(1, silence, 0, false) }, "192.0.2.100", 2 * time.Second},
			{"the first is gone", func() {
				p.set(0, nil, 0, true)
				p.set(1, answerA("192.0.2.101"), 0, false)
				s.SetUpstreams(nil)
				s.SetUpstreams(pipeAddrs(2))
			}, "192.0.2.101", 0},
			{"all are gone", func() { p.set(1, nil, 0, true); s.SetUpstreams(nil); s.SetUpstreams(pipeAddrs(2)) }, "SERVFAIL", 0},
			{"all are silent", func() { p.set(0, silence, 0, false); p.set(1, silence, 0, false) }, "SERVFAIL", upstreamTimeout},
			{"both are back", func() { p.set(0, answerA("192.0.2.100"), 0, false); p.set(1, answerA("192.0.2.101"), 0, false) }, "192.0.2.100", 0},
			{"none is known", func() { s.SetUpstreams(nil) }, "SERVFAIL", 0},
		}
		for _, step := range steps {
			synctest.Wait() // for what the step before left running
			step.change()
			began := time.Now()
			if got := outside(t, s); got != step.want || took(began) != step.took {
				t.Errorf("%s: %s after %v, want %s after %v", step.what, got, took(began), step.want, step.took)
			}
		}
		s.Close()
		synctest.Wait()
		if n := p.open.Load(); n != 0 {
			t.Errorf("%d sockets left open", n)
		}
	})
}

// A single upstream that loses a datagram is asked a second time, on another socket.
func TestUpstreamLostDatagram(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n atomic.Int64
		s, p := upstreamServer(t, func(network string, q []byte) []byte {
			if n.Add(1) == 2 {
				return nil
			}
			return answerA("192.0.2.100")(network, q)
		})
		for i, want := range []time.Duration{0, upstreamStagger, 0} {
			began := time.Now()
			if got := outside(t, s); got != "192.0.2.100" || took(began) != want {
				t.Errorf("query %d: %s after %v, want %v", i, got, took(began), want)
			}
		}
		if got := p.dialled.Load(); got != 2 {
			t.Errorf("%d sockets, want 2", got)
		}
	})
}

func TestUpstreamRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tt := range []struct {
			first, second func(string, []byte) []byte
			want          string
		}{
			{answerCode(dns.RcodeServerFailure), answerA("192.0.2.101"), "192.0.2.101"},
			{answerCode(dns.RcodeRefused), answerA("192.0.2.101"), "192.0.2.101"},
			{answerCode(dns.RcodeRefused), answerCode(dns.RcodeServerFailure), "REFUSED"},
			{answerCode(dns.RcodeNameError), answerA("192.0.2.101"), "NXDOMAIN"},
		} {
			s, _ := upstreamServer(t, tt.first, tt.second)
			if got := outside(t, s); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
			s.Close()
		}
	})
}

// What a less preferred upstream does not know counts only when those before it have said so, or cannot: a datagram to them may be lost.
func TestUpstreamUnknownNames(t *testing.T) {
	unknown, alias := answerCode(dns.RcodeNameError), answerAlias
	for _, tt := range []struct {
		what   string
		first  func(string, []byte) []byte
		delay  time.Duration
		refuse bool
		second func(string, []byte) []byte
		want   string
		took   time.Duration
	}{
		{"the first loses a datagram", losing(1, answerA("192.0.2.100")), 0, false, unknown, "192.0.2.100", 2 * upstreamStagger},
		{"the first is slow", answerA("192.0.2.100"), 3 * time.Second, false, unknown, "192.0.2.100", 3 * time.Second},
		{"no such type", answerA("192.0.2.100"), 3 * time.Second, false, answerCode(dns.RcodeSuccess), "192.0.2.100", 3 * time.Second},
		{"an alias of nothing", answerA("192.0.2.100"), 3 * time.Second, false, alias, "192.0.2.100", 3 * time.Second},
		{"both say so", unknown, 3 * time.Second, false, unknown, "NXDOMAIN", 3 * time.Second},
		{"the first does not help", answerCode(dns.RcodeServerFailure), 3 * time.Second, false, unknown, "NXDOMAIN", 3 * time.Second},
		{"the first refuses", nil, 0, true, unknown, "NXDOMAIN", 0},
		{"the first is dead", silence, 0, false, unknown, "NXDOMAIN", upstreamTimeout},
		{"what the second knows", answerA("192.0.2.100"), 3 * time.Second, false, answerA("192.0.2.101"), "192.0.2.101", upstreamStagger},
	} {
		synctest.Test(t, func(t *testing.T) {
			s, p := upstreamServer(t, tt.first, tt.second)
			p.set(0, tt.first, tt.delay, tt.refuse)
			began := time.Now()
			if got := outside(t, s); got != tt.want || took(began) != tt.took {
				t.Errorf("%s: %s after %v, want %s after %v", tt.what, got, took(began), tt.want, tt.took)
			}
			s.Close()
			time.Sleep(time.Minute) // for who is slow
		})
	}
}

// An upstream that loses one datagram, or is slow for one name, stays the first; one that answers nothing at all does not.
func TestUpstreamSuspect(t *testing.T) {
	for _, tt := range []struct {
		what  string
		first func(string, []byte) []byte
		delay time.Duration
		other bool // the first answers another query meanwhile
		want  string
	}{
		{"a lost datagram", losing(1, answerA("192.0.2.100")), 0, false, "192.0.2.100"},
		{"slow", answerA("192.0.2.100"), 2 * time.Second, false, "192.0.2.100"},
		{"never for this name", losing(2, answerA("192.0.2.100")), 0, true, "192.0.2.100"},
		{"dead", silence, 0, false, "192.0.2.101"},
	} {
		synctest.Test(t, func(t *testing.T) {
			s, p := upstreamServer(t, tt.first, answerA("192.0.2.101"))
			p.set(0, tt.first, tt.delay, false)
			if got := outside(t, s); got != "192.0.2.101" {
				t.Errorf("%s: %s", tt.what, got)
			}
			if synctest.Wait(); tt.other {
				outside(t, s)
			}
			time.Sleep(upstreamTimeout)
			synctest.Wait()
			if tt.delay > 0 {
				p.set(0, tt.first, 0, false)
			}
			if got := outside(t, s); got != tt.want {
				t.Errorf("%s, later: %s, want %s", tt.what, got, tt.want)
			}
			s.Close()
			time.Sleep(time.Minute) // for who is slow
		})
	}
}

// Sockets are used again for a while, and closed by the sweep when nobody does.
func TestUpstreamSockets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, p := upstreamServer(t, answerA("192.0.2.100"))
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = s.upstream.sweep(ctx) })
		for range maxConnUses {
			outside(t, s)
		}
		if got := p.dialled.Load(); got != 1 {
			t.Errorf("%d sockets for %d queries, want 1", got, maxConnUses)
		}
		outside(t, s)
		if got := p.dialled.Load(); got != 2 {
			t.Errorf("%d sockets for one more, want 2", got)
		}
		time.Sleep(2 * maxConnAge)
		synctest.Wait()
		if got := p.open.Load(); got != 0 {
			t.Errorf("%d sockets open after the sweep", got)
		}
		outside(t, s)
		s.SetUpstreams(pipeAddrs(1)) // the same list: nothing changes
		outside(t, s)
		if got := p.dialled.Load(); got != 3 {
			t.Errorf("%d sockets, want 3", got)
		}
		s.SetUpstreams(nil)
		synctest.Wait()
		if got := p.open.Load(); got != 0 {
			t.Errorf("%d sockets open without upstreams", got)
		}
		cancel()
		wg.Wait()
	})
}

// After a change of network the sockets made before it are silent; that costs one query one step, not each socket one.
func TestUpstreamCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, p := upstreamServer(t, answerA("192.0.2.100"))
		p.set(0, answerA("192.0.2.100"), time.Millisecond, false)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() { outside(t, s) })
		}
		wg.Wait()
		p.cuts.Add(1)
		for i, want := range []time.Duration{upstreamStagger + time.Millisecond, time.Millisecond, time.Millisecond} {
			began := time.Now()
			if got := outside(t, s); got != "192.0.2.100" || took(began) != want {
				t.Errorf("query %d: %s after %v, want %v", i, got, took(began), want)
			}
		}
	})
}

// A query that is on its way when the upstreams change keeps its socket, and nobody else gets it.
func TestUpstreamChangeInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, p := upstreamServer(t, answerA("192.0.2.100"))
		p.set(0, answerA("192.0.2.100"), time.Second, false)
		var wg sync.WaitGroup
		wg.Go(func() {
			if got := outside(t, s); got != "192.0.2.100" {
				t.Errorf("got %s", got)
			}
		})
		synctest.Wait()
		s.SetUpstreams(nil)
		wg.Wait()
		synctest.Wait()
		if got := p.open.Load(); got != 0 {
			t.Errorf("%d sockets left open", got)
		}
	})
}

// What does not fit the question is not the answer, wherever it comes from.
func TestUpstreamForged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		forge := map[string]func(*dns.Msg){
			"id":       func(m *dns.Msg) { m.Id++ },
			"question": func(m *dns.Msg) { m.Question[0].Name = "evil.example." },
			"type":     func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeTXT },
			"query":    func(m *dns.Msg) { m.Response = false },
			"opcode":   func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate },
			"empty":    func(m *dns.Msg) { m.Question = nil },
		}
		for name, change := range forge {
			s, _ := upstreamServer(t, func(network string, q []byte) []byte {
				m := unpack(t, answerA("192.0.2.66")(network, q))
				change(m)
				return pack(t, m)
			})
			if got := outside(t, s); got != "SERVFAIL" {
				t.Errorf("%s: took %s", name, got)
			}
			s.Close()
		}
	})
}

// The bytes of query and answer pass as they are, on both ways, whatever they say.
func TestUpstreamUntouched(t *testing.T) {
	odd := question("WwW.ExAmPlE.cOm", dns.TypeHTTPS)
	odd.SetEdns0(1400, true)
	odd.IsEdns0().Option = append(odd.IsEdns0().Option, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "24a5ac1234567890"},
		&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(192, 0, 2, 0)})
	odd.CheckingDisabled, odd.AuthenticatedData = true, true
	chaos := question("version.bind", dns.TypeTXT)
	chaos.Question[0].Qclass = dns.ClassCHAOS
	local := question("web.default.svc.cluster.local", dns.TypeA)
	local.Question[0].Qclass = dns.ClassCHAOS
	update := new(dns.Msg)
	update.SetUpdate("corp.example.")
	update.Insert([]dns.RR{mustRR(t, "laptop.corp.example. 60 IN A 192.0.2.9")})

	u := newFakeUpstream(t, "192.0.2.1")
	s := start(t, noCluster, u.addr)
	for _, m := range []*dns.Msg{odd, chaos, local, update} {
		for _, network := range []string{"udp", "tcp"} {
			query := pack(t, m)
			junk := []byte{0xc0, 0xff, 0xee} // behind the message: even that
			sent := make(chan []byte, 1)
			u.set(func(_ string, q []byte) []byte {
				answer := append(append([]byte(nil), q...), junk...)
				answer[2] |= flagQR
				answer[3] |= flagRA
				sent <- answer
				return answer
			})
			query = append(query, junk...)
			got, answer := s.Exchange(t.Context(), network, query), <-sent
			seen := u.queries()[len(u.queries())-1]
			if !bytes.Equal(seen[2:], query[2:]) {
				t.Errorf("%s: sent %x, the upstream got %x", network, query, seen)
			}
			if !bytes.Equal(got[2:], answer[2:]) || !bytes.Equal(got[:2], query[:2]) {
				t.Errorf("%s: answered %x, the client got %x", network, answer, got)
			}
		}
	}
}

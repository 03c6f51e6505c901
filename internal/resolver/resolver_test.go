package resolver

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestNewValidates(t *testing.T) {
	_, err := New(Config{Listen: "nonsense"})
	for _, want := range []string{"Cluster", "Log", "Listen"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not name %s", err, want)
		}
	}
}

func TestCloseWithoutRun(t *testing.T) {
	s, err := New(Config{Cluster: noCluster, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if !s.Addr().IsValid() || !s.Addr().Addr().IsLoopback() {
		t.Errorf("address %v", s.Addr())
	}
	s.Close()
	s.Close()
}

// Both kinds of names, over both protocols and real sockets, with a real upstream.
func TestServe(t *testing.T) {
	u := newFakeUpstream(t, "192.0.2.1")
	s := start(t, newFakeCluster(t, clusterRecords...).ask, u.addr)
	for _, network := range []string{"udp", "tcp"} {
		for name, want := range map[string]string{
			"web": "10.96.0.10", "web.default.svc.cluster.local": "10.96.0.10", "db-0.db.shop": "10.244.0.7",
			"example.com": "192.0.2.1", "web.dev": "192.0.2.1", "localhost": "192.0.2.1",
		} {
			r := ask(t, s, network, question(name, dns.TypeA))
			if len(r.Answer) != 1 || r.Answer[0].(*dns.A).A.String() != want || r.Answer[0].Header().Name != dns.Fqdn(name) {
				t.Errorf("%s %s: %v", network, name, r)
			}
		}
	}
	for _, q := range u.queries() {
		if name := unpack(t, q).Question[0].Name; name == "web." || under(trimDots(name), "cluster.local") {
			t.Errorf("%s was asked outside", name)
		}
	}
}

// The Go resolver is a client like any other: search lists, ndots and all.
func TestGoResolver(t *testing.T) {
	u := newFakeUpstream(t, "192.0.2.1")
	s := start(t, newFakeCluster(t, clusterRecords...).ask, u.addr)
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, s.Addr().String())
	}}
	ctx := t.Context()
	addrs, err := r.LookupNetIP(ctx, "ip4", "web.default.svc.cluster.local.")
	if err != nil || len(addrs) != 1 || addrs[0] != netip.MustParseAddr("10.96.0.10") {
		t.Errorf("A: %v, %v", addrs, err)
	}
	_, srv, err := r.LookupSRV(ctx, "http", "tcp", "web.default.")
	if err != nil || len(srv) != 1 || srv[0].Port != 80 {
		t.Errorf("SRV: %v, %v", srv, err)
	}
	ptr, err := r.LookupAddr(ctx, "10.96.0.10")
	if err != nil || len(ptr) != 1 || ptr[0] != "web.default.svc.cluster.local." {
		t.Errorf("PTR: %v, %v", ptr, err)
	}
	mx, err := r.LookupMX(ctx, "db.shop.")
	if err != nil || len(mx) != 1 || mx[0].Pref != 10 {
		t.Errorf("MX: %v, %v", mx, err)
	}
	_, err = r.LookupHost(ctx, "gone.default.")
	var de *net.DNSError
	if !errors.As(err, &de) || !de.IsNotFound {
		t.Errorf("NXDOMAIN: %v", err)
	}
}

func TestUpstreamTruncated(t *testing.T) {
	u := newFakeUpstream(t, "192.0.2.1")
	u.set(func(network string, q []byte) []byte {
		a := answerA("192.0.2.1")(network, q)
		if network == "udp" {
			a[2] |= flagTC
		}
		return a
	})
	s := start(t, noCluster, u.addr)
	if r := ask(t, s, "udp", question("example.com", dns.TypeA)); !r.Truncated {
		t.Errorf("TC was lost: %v", r)
	}
	if r := ask(t, s, "tcp", question("example.com", dns.TypeA)); r.Truncated || len(r.Answer) != 1 {
		t.Errorf("by TCP: %v", r)
	}
}

// A closed port is an error at once (ICMP), and so is failover; afterwards the socket pool must not keep the dead ones.
func TestUpstreamRefusedPort(t *testing.T) {
	dead, alive := newFakeUpstream(t, "192.0.2.1"), newFakeUpstream(t, "192.0.2.2")
	s := start(t, noCluster, dead.addr, alive.addr)
	first := ask(t, s, "udp", question("example.com", dns.TypeA))
	dead.stop()
	for _, network := range []string{"udp", "tcp", "udp"} {
		began := time.Now()
		r := ask(t, s, network, question("example.com", dns.TypeA))
		if len(r.Answer) != 1 || r.Answer[0].(*dns.A).A.String() != "192.0.2.2" || time.Since(began) > time.Second {
			t.Errorf("%s: %v after %v; before: %v", network, r, time.Since(began), first)
		}
	}
}

func TestOwnAddressIsNoUpstream(t *testing.T) {
	s := start(t, noCluster)
	s.SetUpstreams([]netip.AddrPort{s.Addr()})
	if r := ask(t, s, "udp", question("example.com", dns.TypeA)); r.Rcode != dns.RcodeServerFailure {
		t.Errorf("got %v", r)
	}
	if n := s.Stats().Queries; n != 1 {
		t.Errorf("one query became %d", n)
	}
}

// Answers of our own echo what a header must (RFC 1035 section 4.1.1).
func TestOwnAnswerHeader(t *testing.T) {
	s := server(t, noCluster)
	for _, rd := range []bool{true, false} {
		for _, m := range []*dns.Msg{question("example.com", dns.TypeA), question("web", dns.TypeA), new(dns.Msg).SetUpdate("corp.example.")} {
			m.RecursionDesired = rd
			r := exchange(t, s, "udp", m)
			if r.Id != m.Id || !r.Response || r.RecursionDesired != rd || r.Opcode != m.Opcode || r.Rcode != dns.RcodeServerFailure {
				t.Errorf("RD %v, opcode %d: %v", rd, m.Opcode, r)
			}
		}
	}
}

func TestMalformed(t *testing.T) {
	good := pack(t, question("web", dns.TypeA))
	edit := func(fn func([]byte) []byte) []byte { return fn(append([]byte(nil), good...)) }
	withOPT := question("web", dns.TypeA)
	withOPT.SetEdns0(1232, false)
	opt := pack(t, withOPT)
	for name, tt := range map[string]struct {
		msg   []byte
		rcode int // -1: no answer
	}{
		"empty":              {nil, -1},
		"half a header":      {good[:11], -1},
		"an answer":          {edit(func(b []byte) []byte { b[2] |= flagQR; return b }), -1},
		"header only":        {good[:12], dns.RcodeFormatError},
		"name cut":           {good[:14], dns.RcodeFormatError},
		"class cut":          {good[:len(good)-1], dns.RcodeFormatError},
		"no question":        {edit(func(b []byte) []byte { b[5] = 0; return b }), dns.RcodeFormatError},
		"two questions":      {edit(func(b []byte) []byte { b[5] = 2; return b }), dns.RcodeFormatError},
		"pointer":            {edit(func(b []byte) []byte { b[12] = 0xc0; return b }), dns.RcodeFormatError},
		"odd label type":     {edit(func(b []byte) []byte { b[12] = 0x41; return b }), dns.RcodeFormatError},
		"records missing":    {edit(func(b []byte) []byte { b[11] = 1; return b }), dns.RcodeFormatError},
		"two OPT":            {append(edit(func([]byte) []byte { b := append([]byte(nil), opt...); b[11] = 2; return b }), opt[len(opt)-11:]...), dns.RcodeFormatError},
		"EDNS version 1":     {edit(func([]byte) []byte { b := append([]byte(nil), opt...); b[len(b)-5] = 1; return b }), dns.RcodeBadVers},
		"name of 256 bytes":  {longQuery(t, 256), dns.RcodeFormatError},
		"name cannot expand": {longQuery(t, 250), dns.RcodeNameError},
	} {
		s := server(t, newFakeCluster(t, clusterRecords...).ask)
		got := s.Exchange(t.Context(), "udp", tt.msg)
		if tt.rcode == -1 {
			if got != nil {
				t.Errorf("%s: answered %x", name, got)
			}
			continue
		}
		if r := unpack(t, got); r.Rcode != tt.rcode || !r.Response || binary.BigEndian.Uint16(tt.msg) != r.Id {
			t.Errorf("%s: %v", name, r)
		}
	}
}

// longQuery asks for a name of size bytes on the wire that ends in .x.svc.
func longQuery(t *testing.T, size int) []byte {
	t.Helper()
	tail := []byte("\x01x\x03svc\x00")
	b := pack(t, question(".", dns.TypeA))[:headerLen]
	for rest := size - len(tail); rest > 0; {
		n := min(rest-1, 63)
		if rest-1-n == 1 {
			n--
		}
		b = append(append(b, byte(n)), make([]byte, n)...)
		rest -= n + 1
	}
	b = append(b, tail...)
	if len(b)-headerLen != size {
		t.Fatalf("built a name of %d bytes, want %d", len(b)-headerLen, size)
	}
	return append(b, 0, 1, 0, 1)
}

// Many queries on one TCP connection are answered as they become ready, the client's half-close waits for all.
func TestTCPPipelining(t *testing.T) {
	hold := make(chan struct{})
	c := newFakeCluster(t, clusterRecords...)
	c.hook = func(_ context.Context, m *dns.Msg) error {
		if m.Question[0].Name == "web.default.svc.cluster.local." {
			<-hold
		}
		return nil
	}
	s := start(t, c.ask)
	conn, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	slow, fast := question("web", dns.TypeA), question("db-0.db.shop", dns.TypeA)
	for _, m := range []*dns.Msg{slow, fast} {
		if err := writeTCP(conn, pack(t, m)); err != nil {
			t.Fatal(err)
		}
	}
	_ = conn.(*net.TCPConn).CloseWrite()
	for _, want := range []*dns.Msg{fast, slow} {
		msg, err := readTCP(conn)
		if err != nil {
			t.Fatal(err)
		}
		if r := unpack(t, msg); r.Id != want.Id || len(r.Answer) != 1 {
			t.Errorf("got %v, want the answer to %v", r, want.Question)
		}
		if want == fast {
			close(hold)
		}
	}
	if _, err := readTCP(conn); !errors.Is(err, io.EOF) {
		t.Errorf("then %v, want the end", err)
	}
}

// One connection may carry any number of queries, though only so many at once.
func TestTCPManyQueries(t *testing.T) {
	s := start(t, newFakeCluster(t, clusterRecords...).ask)
	conn, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	const n = 3 * maxPipelined
	for range n {
		if err := writeTCP(conn, pack(t, question("web", dns.TypeA))); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n {
		if _, err := readTCP(conn); err != nil {
			t.Fatalf("answer %d: %v", i, err)
		}
	}
}

// Run ends at once though queries hang and connections are open.
func TestRunEnds(t *testing.T) {
	inCluster := make(chan struct{}, 1)
	u := newFakeUpstream(t, "192.0.2.1")
	u.set(silence)
	s, err := New(Config{
		Cluster: func(ctx context.Context, _ []byte) ([]byte, error) {
			inCluster <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		},
		Upstreams: []netip.AddrPort{u.addr},
		Log:       slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	s.SetNames(names)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	conn, err := net.Dial("tcp", s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, name := range []string{"example.com", "web"} {
		if err := writeTCP(conn, pack(t, question(name, dns.TypeA))); err != nil {
			t.Fatal(err)
		}
	}
	<-inCluster
	began := time.Now()
	cancel()
	if err := <-done; err != nil || time.Since(began) > time.Second {
		t.Errorf("Run: %v after %v", err, time.Since(began))
	}
}

// Names, upstreams and queries change places without a data race or a wrong answer.
func TestConcurrentChanges(t *testing.T) {
	u1, u2 := newFakeUpstream(t, "192.0.2.1"), newFakeUpstream(t, "192.0.2.1")
	s := start(t, newFakeCluster(t, clusterRecords...).ask, u1.addr)
	other := names
	other.Namespace = "shop"
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for i := range 200 {
				s.SetNames([]Names{names, other}[i%2])
				s.SetUpstreams([][]netip.AddrPort{{u1.addr}, {u2.addr}, {u2.addr, u1.addr}}[i%3])
				name, want := "web.default", "10.96.0.10"
				if i%2 == 0 {
					name, want = "example.com", "192.0.2.1"
				}
				r := exchange(t, s, "udp", question(name, dns.TypeA))
				if len(r.Answer) != 1 || r.Answer[0].(*dns.A).A.String() != want {
					t.Errorf("%s: %v", name, r)
				}
			}
		})
	}
	clients.Wait()
}

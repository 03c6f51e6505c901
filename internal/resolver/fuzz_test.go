package resolver

import (
	"context"
	"encoding/binary"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// FuzzExchange sends arbitrary queries through the packet path, to an upstream that echoes and a cluster that knows some names.
func FuzzExchange(f *testing.F) {
	for _, m := range []*dns.Msg{
		question("web", dns.TypeA), question("WEB.default", dns.TypeANY), question("example.com", dns.TypeAAAA),
		question("10.0.96.10.in-addr.arpa", dns.TypePTR), question(`a\.b\000.x.svc`, dns.TypeTXT), question(".", dns.TypeNS),
	} {
		b, _ := m.Pack()
		f.Add(b, false)
		m.SetEdns0(1232, true)
		b, _ = m.Pack()
		f.Add(b, true)
	}
	c := newFakeCluster(f, clusterRecords...)
	s := server(f, c.ask)
	p := newPipeUpstream(func(_ string, q []byte) []byte {
		a := append([]byte(nil), q...)
		a[2] |= flagQR
		return a
	})
	s.upstream.dial = p.dial
	s.SetUpstreams(pipeAddrs(1))
	f.Fuzz(func(t *testing.T, msg []byte, tcp bool) {
		if len(msg) > 4000 { // the fake reads no more
			return
		}
		network := map[bool]string{true: "tcp", false: "udp"}[tcp]
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		answer := s.Exchange(ctx, network, msg)
		if answer == nil {
			if len(msg) >= headerLen && msg[2]&flagQR == 0 {
				t.Errorf("no answer to %x", msg)
			}
			return
		}
		if len(answer) < headerLen || answer[2]&flagQR == 0 || binary.BigEndian.Uint16(answer) != binary.BigEndian.Uint16(msg) {
			t.Fatalf("%x answered with %x", msg, answer)
		}
		q, err := parseQuery(msg, tcp)
		if err != nil || !q.standard() {
			return
		}
		if suffix, ok := (*s.names.Load())[0].decide(q.name); ok {
			var m dns.Msg
			if err := m.Unpack(answer); err != nil {
				t.Errorf("the answer to %q + %q does not parse: %v", q.name, suffix, err)
			}
		}
	})
}

// FuzzRewrite feeds arbitrary answers of the cluster to the rewriting.
func FuzzRewrite(f *testing.F) {
	c := newFakeCluster(f, clusterRecords...)
	for _, m := range []*dns.Msg{
		question("web.default.svc.cluster.local", dns.TypeA), question("ext.default.svc.cluster.local", dns.TypeA), question("no.default.svc.cluster.local", dns.TypeA),
	} {
		query, _ := m.Pack()
		raw, _ := c.ask(context.Background(), query)
		f.Add(raw)
	}
	msg, _ := question("web", dns.TypeA).Pack()
	q, err := parseQuery(msg, false)
	if err != nil {
		f.Fatal(err)
	}
	q.suffix = "default.svc.cluster.local"
	f.Fuzz(func(t *testing.T, raw []byte) {
		a, err := rewrite(raw, q)
		if err != nil {
			return
		}
		if a.keep < 0 || a.keep > maxCacheTTL {
			t.Errorf("keep %v", a.keep)
		}
		for _, age := range []time.Duration{0, time.Minute} {
			out, err := a.render(q, opt{present: true, size: 512}, age)
			if err != nil {
				t.Fatalf("render %x: %v", a.msg, err)
			}
			var m dns.Msg
			if err := m.Unpack(out); err != nil || len(out) > minUDP && len(m.Answer) > 0 {
				t.Errorf("%d bytes: %v", len(out), err)
			}
		}
	})
}

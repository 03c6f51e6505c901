package resolver

import (
	"context"
	"net"
	"testing"

	"github.com/miekg/dns"
)

func BenchmarkDecide(b *testing.B) {
	table := compile(names)
	for _, name := range []string{"web", "cart.shop", "www.example.com", "7.0.244.10.in-addr.arpa"} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				table.decide(name)
			}
		})
	}
}

// BenchmarkExchange is the chain without sockets.
func BenchmarkExchange(b *testing.B) {
	c := newFakeCluster(b, clusterRecords...)
	s := server(b, c.ask)
	msg := pack(b, question("web.default", dns.TypeA))
	b.Run("cached", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			s.Exchange(context.Background(), "udp", msg)
		}
	})
	b.Run("uncached", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			s.FlushCache()
			s.Exchange(context.Background(), "udp", msg)
		}
	})
}

// BenchmarkSocket is what a client sees over loopback; "direct" asks the fake upstream without us, for comparison.
func BenchmarkSocket(b *testing.B) {
	u := newFakeUpstream(b, "192.0.2.1")
	s := start(b, newFakeCluster(b, clusterRecords...).ask, u.addr)
	u.set(func(_ string, q []byte) []byte {
		a := append([]byte(nil), q...)
		a[2] |= flagQR
		return a
	})
	for _, bb := range []struct{ what, addr, name string }{
		{"cached", s.Addr().String(), "web.default"},
		{"upstream", s.Addr().String(), "example.com"},
		{"direct", u.addr.String(), "example.com"},
	} {
		msg := pack(b, question(bb.name, dns.TypeA))
		b.Run(bb.what, func(b *testing.B) {
			conn, err := net.Dial("udp", bb.addr)
			if err != nil {
				b.Fatal(err)
			}
			defer conn.Close()
			buf := make([]byte, 4096)
			for b.Loop() {
				if _, err := conn.Write(msg); err != nil {
					b.Fatal(err)
				}
				if _, err := conn.Read(buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

package resolver

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

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
		for _, clients := range []int{1, 16} {
			b.Run(fmt.Sprintf("%s/%d", bb.what, clients), func(b *testing.B) { lookups(b, bb.addr, msg, clients) })
		}
	}
}

// lookups sends b.N queries from some clients, each with one on its way, and reports how long the middle and the slowest took.
func lookups(b *testing.B, addr string, msg []byte, clients int) {
	took := make([]time.Duration, b.N)
	var next atomic.Int64
	var wg sync.WaitGroup
	b.ResetTimer()
	for range clients {
		wg.Go(func() {
			conn, err := net.Dial("udp", addr)
			if err != nil {
				b.Error(err)
				return
			}
			defer conn.Close()
			buf := make([]byte, 4096)
			for i := next.Add(1) - 1; i < int64(b.N); i = next.Add(1) - 1 {
				began := time.Now()
				_ = conn.SetDeadline(began.Add(5 * time.Second))
				if _, err := conn.Write(msg); err != nil {
					b.Error(err)
				}
				if _, err := conn.Read(buf); err != nil {
					b.Error(err)
				}
				took[i] = time.Since(began)
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-us")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-us")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "lookups/s")
}

// BenchmarkSetNames is one more service among 10,000.
func BenchmarkSetNames(b *testing.B) {
	n := Names{Services: map[string][]string{}}
	for i := range 5000 {
		n.Services["team-"+strconv.Itoa(i)] = []string{"web-0", "web-1"}
	}
	s := server(b, newFakeCluster(b).ask)
	b.ReportAllocs()
	for i := range b.N {
		n.Services["team-7"] = []string{"web-" + strconv.Itoa(i)}
		s.SetNames(n)
		if d := s.RouteDomains(); len(d) != 2 {
			b.Fatal(d)
		}
	}
}

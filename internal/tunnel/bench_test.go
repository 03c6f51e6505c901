//go:build unix

package tunnel_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// tcpPair returns both ends of a loopback TCP connection.
func tcpPair(b testing.TB) (net.Conn, net.Conn) {
	b.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		b.Fatal(err)
	}
	return c, s
}

type ends struct{ a, b *mux.Session }

// benchTunnel returns both ends of a real tunnel over loopback TCP.
func benchTunnel(b testing.TB) ends {
	b.Helper()
	c, s := tcpPair(b)
	id := newIdentity(b)
	ready := make(chan *mux.Session, 1)
	go func() {
		s, _, err := tunnel.Server(context.Background(), s, tunnel.ServerConfig{Identity: id, Authorize: allow})
		if err != nil {
			b.Error(err)
		}
		ready <- s
	}()
	sa, _, err := tunnel.Client(context.Background(), c, tunnel.ClientConfig{Peer: id.Fingerprint()})
	if err != nil {
		b.Fatal(err)
	}
	e := ends{sa, <-ready}
	b.Cleanup(func() { _ = e.a.Close(); _ = e.b.Close() })
	return e
}

// rawTLS is the same without session: what TLS alone costs.
func rawTLS(b testing.TB) (net.Conn, net.Conn) {
	b.Helper()
	c, s := tcpPair(b)
	server := tls.Server(s, &tls.Config{
		Certificates:                []tls.Certificate{newIdentity(b).TLSCertificate()},
		DynamicRecordSizingDisabled: true, MinVersion: tls.VersionTLS13,
	})
	client := tls.Client(c, &tls.Config{InsecureSkipVerify: true, DynamicRecordSizingDisabled: true})
	go func() { _ = client.Handshake() }()
	if err := server.Handshake(); err != nil {
		b.Fatal(err)
	}
	return client, server
}

// serve answers each of s's requests with fn, until the session ends.
func serve(t testing.TB, s *mux.Session, fn func(*mux.Request)) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			r, err := s.Accept(context.Background())
			if err != nil {
				return
			}
			wg.Go(func() { fn(r) })
		}
	})
	t.Cleanup(func() { _ = s.Close(); wg.Wait() })
}

func echo(r *mux.Request) {
	st, err := r.Accept(nil)
	if err != nil {
		return
	}
	_, _ = io.Copy(st, st)
	_ = st.Close()
}

func open(t testing.TB, s *mux.Session) *mux.Stream {
	t.Helper()
	st, _, err := s.Open(context.Background(), []byte{1})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// cpu returns what this process has used.
func cpu() time.Duration {
	var ru syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &ru)
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

// BenchmarkBulk sends over TLS on loopback; both ends are in this process, so CPU is that of both.
func BenchmarkBulk(b *testing.B) {
	const block = wire.FullPayload // what the relay moves at once
	report := func(b *testing.B, run func()) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		c := cpu()
		run()
		gb := float64(b.N) * block / 1e9
		runtime.ReadMemStats(&after)
		b.ReportMetric((cpu()-c).Seconds()/gb, "cpu-s/GB")
		b.ReportMetric(float64(after.Mallocs-before.Mallocs)/(gb*1000), "allocs/MB")
	}
	b.Run("tls", func(b *testing.B) {
		b.SetBytes(block)
		c, s := rawTLS(b)
		defer s.Close()
		defer c.Close()
		report(b, func() {
			var wg sync.WaitGroup
			wg.Go(func() { _, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, s, make([]byte, block)) })
			buf := make([]byte, block)
			for range b.N {
				if _, err := c.Write(buf); err != nil {
					b.Fatal(err)
				}
			}
			_ = c.Close()
			wg.Wait()
		})
	})
	for _, n := range []int{1, 4} {
		b.Run(fmt.Sprintf("mux%d", n), func(b *testing.B) {
			b.SetBytes(block)
			p := benchTunnel(b)
			type pair struct{ a, b *mux.Stream }
			var streams []pair
			for range n {
				a, z := muxtest.Stream(b, p.a, p.b)
				streams = append(streams, pair{a, z})
			}
			b.ResetTimer()
			report(b, func() {
				var wg sync.WaitGroup
				var left atomic.Int64
				left.Store(int64(b.N))
				for _, e := range streams {
					wg.Go(func() {
						_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{e.b}, make([]byte, block))
						if err != nil {
							b.Error(err)
						}
					})
					wg.Go(func() {
						buf := make([]byte, block)
						for left.Add(-1) >= 0 {
							if _, err := e.a.Write(buf); err != nil {
								b.Error(err)
								return
							}
						}
						_ = e.a.CloseWrite()
					})
				}
				wg.Wait()
			})
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	p := benchTunnel(b)
	serve(b, p.b, func(r *mux.Request) {
		if st, err := r.Accept(nil); err == nil {
			_ = st.Close()
		}
	})
	b.ReportAllocs()
	for b.Loop() {
		st, _, err := p.a.Open(context.Background(), []byte{1, 2, 3})
		if err != nil {
			b.Fatal(err)
		}
		_ = st.Close()
	}
}

func BenchmarkOpenParallel(b *testing.B) {
	p := benchTunnel(b)
	serve(b, p.b, func(r *mux.Request) {
		if st, err := r.Accept(nil); err == nil {
			_ = st.Close()
		}
	})
	b.ReportAllocs()
	b.SetParallelism(16)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			st, _, err := p.a.Open(context.Background(), []byte{1, 2, 3})
			if err != nil {
				b.Error(err)
				return
			}
			_ = st.Close()
		}
	})
}

func BenchmarkCall(b *testing.B) {
	p := benchTunnel(b)
	serve(b, p.b, func(r *mux.Request) { _ = r.Reply([]byte("answer")) })
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.a.Call(context.Background(), []byte("question")); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkEcho100 is a request and an answer of 100 bytes on an open stream.
func BenchmarkEcho100(b *testing.B) {
	p := benchTunnel(b)
	serve(b, p.b, echo)
	st := open(b, p.a)
	buf := make([]byte, 100)
	b.ReportAllocs()
	for b.Loop() {
		_, _ = st.Write(buf)
		if _, err := io.ReadFull(st, buf); err != nil {
			b.Fatal(err)
		}
	}
	_ = st.Close()
}

// BenchmarkPingUnderBulk reports how long an echo of 64 bytes takes beside one bulk stream.
func BenchmarkPingUnderBulk(b *testing.B) {
	p := benchTunnel(b)
	serve(b, p.b, func(r *mux.Request) {
		echoes := r.Header()[0] == 'e'
		st, err := r.Accept(nil)
		if err != nil {
			return
		}
		if echoes {
			_, _ = io.Copy(st, st)
		} else {
			_, _ = io.Copy(io.Discard, st)
		}
		_ = st.Close()
	})
	ctx := context.Background()
	bulk, _, err := p.a.Open(ctx, []byte{'b'})
	if err != nil {
		b.Fatal(err)
	}
	ping, _, err := p.a.Open(ctx, []byte{'e'})
	if err != nil {
		b.Fatal(err)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := bulk.Write(buf); err != nil {
				return
			}
		}
	})
	var times []time.Duration
	buf := make([]byte, 64)
	for b.Loop() {
		start := time.Now()
		_, _ = ping.Write(buf)
		if _, err := io.ReadFull(ping, buf); err != nil {
			b.Fatal(err)
		}
		times = append(times, time.Since(start))
	}
	close(stop)
	wg.Wait()
	_ = bulk.Close()
	_ = ping.Close()
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(times[len(times)*99/100].Microseconds()), "p99-µs")
}

// relayed returns a connection to a server through two relays and a tunnel: TCP, laptop's relay, tunnel, manager's relay, TCP.
func relayed(b testing.TB, server func(*net.TCPConn)) func() net.Conn {
	b.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	e := benchTunnel(b)
	var wg sync.WaitGroup
	accept := func(ln net.Listener, fn func(*net.TCPConn)) {
		wg.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				wg.Go(func() { fn(c.(*net.TCPConn)) })
			}
		})
	}
	accept(ln, server)
	dst := netip.MustParseAddrPort(ln.Addr().String())
	accept(front, func(c *net.TCPConn) {
		st, err := tunnel.DialTCP(context.Background(), e.a, netip.AddrPort{}, dst)
		if err != nil {
			_ = c.Close()
			return
		}
		_, _, _ = flow.Relay(flow.FromTCP(c), st)
	})
	wg.Go(func() {
		_ = tunnel.Serve(context.Background(), e.b, tunnel.Handlers{TCP: func(r *mux.Request, h wire.FlowHeader) {
			_ = tunnel.ServeDial(r, h, &net.Dialer{})
		}})
	})
	b.Cleanup(func() {
		_ = e.a.Close()
		_ = e.b.Close()
		_ = ln.Close()
		_ = front.Close()
		wg.Wait()
	})
	return func() net.Conn {
		c, err := net.Dial("tcp", front.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		return c
	}
}

// BenchmarkRelayBulk sends through the whole way: two relays and the tunnel.
func BenchmarkRelayBulk(b *testing.B) {
	const block = 64 << 10
	b.SetBytes(block)
	got := make(chan int64, 1)
	dial := relayed(b, func(c *net.TCPConn) {
		n, _ := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 256<<10))
		got <- n
		_ = c.Close()
	})
	c := dial()
	buf := make([]byte, block)
	start := cpu()
	b.ResetTimer()
	for range b.N {
		if _, err := c.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
	_ = c.(*net.TCPConn).CloseWrite()
	if n := <-got; n != int64(b.N)*block {
		b.Fatal(n)
	}
	b.ReportMetric((cpu()-start).Seconds()/(float64(b.N)*block/1e9), "cpu-s/GB")
	_ = c.Close()
}

// BenchmarkRelayEcho is a request and an answer of 100 bytes through the whole way.
func BenchmarkRelayEcho(b *testing.B) {
	for _, n := range []int{1, 8} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			dial := relayed(b, func(c *net.TCPConn) { _, _ = io.Copy(c, c); _ = c.Close() })
			b.ReportAllocs()
			var left atomic.Int64
			left.Store(int64(b.N))
			start := cpu()
			b.ResetTimer()
			var wg sync.WaitGroup
			for range n {
				wg.Go(func() {
					c := dial()
					defer c.Close()
					buf := make([]byte, 100)
					for left.Add(-1) >= 0 {
						_, _ = c.Write(buf)
						if _, err := io.ReadFull(c, buf); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64((cpu()-start).Microseconds())/float64(b.N), "cpu-µs/op")
		})
	}
}

// BenchmarkRelayConnect is connect, request, answer, close through the whole way.
func BenchmarkRelayConnect(b *testing.B) {
	dial := relayed(b, func(c *net.TCPConn) { _, _ = io.Copy(c, c); _ = c.Close() })
	buf := make([]byte, 100)
	b.ReportAllocs()
	for b.Loop() {
		c := dial()
		_, _ = c.Write(buf)
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
		_ = c.Close()
	}
}

// BenchmarkIdleFlows reports the memory of a flow that does nothing, both ends of the tunnel and both relays together.
func BenchmarkIdleFlows(b *testing.B) {
	const flows = 1000
	dial := relayed(b, func(c *net.TCPConn) { _, _ = io.Copy(c, c); _ = c.Close() })
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		conns := make([]net.Conn, flows)
		buf := make([]byte, 100)
		for i := range conns {
			conns[i] = dial()
			_, _ = conns[i].Write(buf)
			_, _ = io.ReadFull(conns[i], buf)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapInuse-before.HeapInuse)/flows, "heap-B/flow")
		b.ReportMetric(float64(after.StackInuse-before.StackInuse)/flows, "stack-B/flow")
		for _, c := range conns {
			_ = c.Close()
		}
	}
}

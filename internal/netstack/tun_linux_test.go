package netstack_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/netstack"
	"github.com/doppel-dev/doppel/internal/netstack/netstacktest"
	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/osroute"
	"github.com/doppel-dev/doppel/internal/tundev"
	"github.com/doppel-dev/doppel/internal/wire"
)

// The application's side of the tests: everything in these subnets goes into the TUN.
const (
	host4 = "10.77.0.9"
	host6 = "fd77::9"
)

func openTUN(t testing.TB) *tundev.Device {
	t.Helper()
	dev, err := tundev.New(openTUNFile(t))
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

// openTUNFile makes a device with both subnets routed into it.
func openTUNFile(t testing.TB) *os.File {
	t.Helper()
	f, name, err := tundev.Open("doppel%d", 1500, 0)
	if err != nil {
		t.Fatal(err)
	}
	link, err := osroute.Find(name)
	if err != nil {
		t.Fatal(err)
	}
	// The file's close need not be its last: the runtime's poller holds it while it looks whether there is something to read. The next test
	// needs the routes.
	t.Cleanup(func() {
		nettest.Poll(t, 5*time.Second, name+" gone", func() bool { _, err := osroute.Find(name); return err != nil })
	})
	prefixes := func(s ...string) (out []netip.Prefix) {
		for _, p := range s {
			out = append(out, netip.MustParsePrefix(p))
		}
		return out
	}
	if w, err := link.Apply(1500, prefixes("10.77.0.1/32", "fd77::1/128"), prefixes("10.77.0.0/16", "fd77::/64")); err != nil || len(w) > 0 {
		t.Fatal(w, err)
	}
	return f
}

// start runs a stack with cfg on a TUN until the test ends.
func start(t testing.TB, cfg netstack.Config) *netstack.Stack {
	t.Helper()
	cfg.Device = openTUN(t)
	s, err := netstack.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s
}

// serve accepts on a real listener and hands each connection to fn.
func serve(t testing.TB, fn func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				fn(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

func to(addr string) func(netip.AddrPort) string { return func(netip.AddrPort) string { return addr } }

func dial(t testing.TB, host string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", net.JoinHostPort(host, "80"), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

func echo(c *net.TCPConn) {
	io.Copy(c, c)
	c.CloseWrite()
}

func both(t *testing.T, fn func(t *testing.T, host string)) {
	t.Run("ipv4", func(t *testing.T) { fn(t, host4) })
	t.Run("ipv6", func(t *testing.T) { fn(t, host6) })
}

func TestTUN(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	defer goleak.VerifyNone(t)
	t.Run("echo", func(t *testing.T) { both(t, testEcho) })
	t.Run("dial errors", func(t *testing.T) { both(t, testDialErrors) })
	t.Run("held dial", testHeldDial)
	t.Run("half-close", func(t *testing.T) { both(t, testHalfClose) })
	t.Run("reset by server", func(t *testing.T) { both(t, testResetByServer) })
	t.Run("reset by application", func(t *testing.T) { both(t, testResetByApp) })
	t.Run("bulk", func(t *testing.T) { both(t, testBulk) })
	t.Run("udp", func(t *testing.T) { both(t, testUDP) })
	t.Run("udp refused", func(t *testing.T) { both(t, testUDPRefused) })
	t.Run("udp idle", testUDPIdle)
	t.Run("concurrent", testConcurrent)
	t.Run("connecting limit", testConnectingLimit)
	t.Run("stop with open flows", testStop)
	t.Run("udp refused later", func(t *testing.T) { both(t, testUDPRefusedLater) })
	if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0); err != nil {
		t.Fatal(err)
	}
	t.Run("ping", func(t *testing.T) { both(t, testPing) })
	t.Run("ping unreachable", func(t *testing.T) { both(t, testPingUnreachable) })
	t.Run("ping unanswered", func(t *testing.T) { both(t, testPingUnanswered) })
	t.Run("ping limit and idle", testPingLimit)
}

func testEcho(t *testing.T, host string) {
	s := start(t, netstack.Config{DialTCP: netstacktest.DialTCP(to(serve(t, echo)))})
	c := dial(t, host)
	for _, n := range []int{1, 100, 1460, 1461, 20000, 65528, 200000} {
		want := bytes.Repeat([]byte{byte(n)}, n)
		go c.Write(want)
		got := make([]byte, n)
		if _, err := io.ReadFull(c, got); err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("%d bytes came back changed", n)
		}
	}
	nettest.Poll(t, 5*time.Second, "every byte counted", func() bool { // a write is counted when it has returned
		st := s.Stats()
		return st.TCPOpen == 1 && st.TCPUpBytes > 0 && st.TCPUpBytes == st.TCPDownBytes
	})
	c.Close()
	nettest.Poll(t, 5*time.Second, "flow closed", func() bool { return s.Stats().TCPOpen == 0 })
}

var errSilence = errors.New("silence until the application gives up")

func testDialErrors(t *testing.T, host string) {
	for _, tc := range []struct{ give, want error }{
		{syscall.ECONNREFUSED, syscall.ECONNREFUSED},
		{syscall.ECONNRESET, syscall.ECONNREFUSED}, // a RST in answer to a SYN
		{syscall.EHOSTUNREACH, syscall.EHOSTUNREACH},
		{syscall.ENETUNREACH, syscall.ENETUNREACH},
		{syscall.ETIMEDOUT, errSilence},
		{errors.New("the tunnel is down"), errSilence},
	} {
		t.Run(tc.give.Error(), func(t *testing.T) {
			s := start(t, netstack.Config{DialTCP: func(context.Context, netip.AddrPort, netip.AddrPort) (flow.Stream, error) {
				return nil, fmt.Errorf("dial: %w", tc.give)
			}})
			patience := 10 * time.Second
			if errors.Is(tc.want, errSilence) {
				patience = 700 * time.Millisecond
			}
			c, err := net.DialTimeout("tcp", net.JoinHostPort(host, "80"), patience)
			if err == nil {
				c.Close()
			}
			var ne net.Error
			if silent := errors.Is(tc.want, errSilence) && errors.As(err, &ne) && ne.Timeout(); !silent && !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			// More than one dial would mean that the first answer was not heard and the SYN came again.
			if n := s.Stats().TCPRefused; n != 1 {
				t.Errorf("%d dials refused, want 1", n)
			}
		})
	}
}

// testHeldDial shows that the SYN is answered only after the dial, and dialled once however often it is retransmitted.
func testHeldDial(t *testing.T) {
	addr := serve(t, echo)
	release, dials := make(chan struct{}), make(chan netip.AddrPort, 8)
	s := start(t, netstack.Config{DialTCP: func(ctx context.Context, src, dst netip.AddrPort) (flow.Stream, error) {
		dials <- dst
		<-release
		return netstacktest.DialTCP(to(addr))(ctx, src, dst)
	}})
	res := make(chan error, 1)
	go func() {
		c, err := net.DialTimeout("tcp", host4+":80", 10*time.Second)
		if err == nil {
			c.Close()
		}
		res <- err
	}()
	if dst := <-dials; dst != netip.MustParseAddrPort(host4+":80") {
		t.Errorf("dialled %v", dst)
	}
	// The first retransmission comes after 1 s.
	nettest.Poll(t, 3*time.Second, "the dial running", func() bool { return s.Stats().TCPConnecting == 1 })
	select {
	case err := <-res:
		t.Fatalf("connected before the dial ended: %v", err)
	case <-time.After(1200 * time.Millisecond):
	}
	close(release)
	if err := <-res; err != nil {
		t.Fatal(err)
	}
	if n := len(dials); n != 0 {
		t.Errorf("%d more dials for the same connection", n)
	}
}

func testHalfClose(t *testing.T, host string) {
	gotAll := make(chan int, 1)
	addr := serve(t, func(c *net.TCPConn) {
		first := make([]byte, 1)
		io.ReadFull(c, first)
		if first[0] == 'a' { // the application ends first
			b, _ := io.ReadAll(c)
			fmt.Fprintf(c, "got %d", len(b))
			return
		}
		c.CloseWrite() // the server ends first
		b, _ := io.ReadAll(c)
		gotAll <- len(b)
	})
	s := start(t, netstack.Config{DialTCP: netstacktest.DialTCP(to(addr))})

	c := dial(t, host)
	c.Write([]byte("a"))
	if _, err := c.Write(make([]byte, 300000)); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || string(b) != "got 300000" {
		t.Fatalf("%q, %v", b, err)
	}

	c = dial(t, host)
	c.Write([]byte("b"))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("got %v, want EOF", err)
	}
	for range 3 { // after the server's FIN the other direction still works
		if _, err := c.Write(make([]byte, 100000)); err != nil {
			t.Fatal(err)
		}
	}
	c.CloseWrite()
	if n := <-gotAll; n != 300000 {
		t.Errorf("server got %d", n)
	}
	nettest.Poll(t, 5*time.Second, "flows closed", func() bool { return s.Stats().TCPOpen == 0 })
}

func testResetByServer(t *testing.T, host string) {
	addr := serve(t, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 1))
		c.SetLinger(0)
		c.Close()
	})
	start(t, netstack.Config{DialTCP: netstacktest.DialTCP(to(addr))})
	c := dial(t, host)
	c.Write([]byte{1})
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("got %v, want ECONNRESET", err)
	}
}

// testResetByApp resets while the server neither reads nor writes, so that both of the flow's copies are blocked.
func testResetByApp(t *testing.T, host string) {
	got, ready, stop := make(chan error, 1), make(chan struct{}), make(chan struct{})
	addr := serve(t, func(c *net.TCPConn) {
		c.SetReadBuffer(4096)
		io.ReadFull(c, make([]byte, 1))
		close(ready)
		<-stop
		_, err := io.Copy(io.Discard, c)
		got <- err
	})
	s := start(t, netstack.Config{DialTCP: netstacktest.DialTCP(to(addr))})
	c := dial(t, host)
	c.Write([]byte{1})
	<-ready
	c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	for {
		if _, err := c.Write(make([]byte, 1<<20)); err != nil {
			break // every buffer on the way is full
		}
	}
	c.SetLinger(0)
	c.Close()
	nettest.Poll(t, 5*time.Second, "flow ended by the RST", func() bool { return s.Stats().TCPOpen == 0 })
	close(stop)
	if err := <-got; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("server got %v, want ECONNRESET", err)
	}
}

func testBulk(t *testing.T, host string) {
	const size = 100 << 20
	sums := make(chan [32]byte, 1)
	addr := serve(t, func(c *net.TCPConn) {
		var wg sync.WaitGroup
		wg.Go(func() {
			h := sha256.New()
			if n, err := io.Copy(h, c); n != size || err != nil {
				t.Errorf("server got %d bytes, %v", n, err)
			}
			sums <- [32]byte(h.Sum(nil))
		})
		want := sha256.New()
		io.Copy(io.MultiWriter(c, want), io.LimitReader(rand.NewChaCha8([32]byte{2}), size))
		c.CloseWrite()
		wg.Wait()
	})
	start(t, netstack.Config{DialTCP: netstacktest.DialTCP(to(addr))})
	c := dial(t, host)
	up, down, wantDown := sha256.New(), sha256.New(), sha256.New()
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := io.Copy(io.MultiWriter(c, up), io.LimitReader(rand.NewChaCha8([32]byte{1}), size)); err != nil {
			t.Errorf("send: %v", err)
		}
		c.CloseWrite()
	})
	wg.Go(func() { io.Copy(wantDown, io.LimitReader(rand.NewChaCha8([32]byte{2}), size)) })
	if n, err := io.Copy(down, c); n != size || err != nil {
		t.Errorf("application got %d bytes, %v", n, err)
	}
	wg.Wait()
	if got := <-sums; got != [32]byte(up.Sum(nil)) {
		t.Error("bytes changed on the way up")
	}
	if !bytes.Equal(down.Sum(nil), wantDown.Sum(nil)) {
		t.Error("bytes changed on the way down")
	}
}

func udpEcho(t testing.TB) string {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 65536)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			pc.WriteTo(b[:n], from)
		}
	}()
	t.Cleanup(func() { pc.Close(); <-done })
	return pc.LocalAddr().String()
}

func testUDP(t *testing.T, host string) {
	s := start(t, netstack.Config{DialTCP: netstacktest.DialTCP(to("")), DialUDP: netstacktest.DialUDP(to(udpEcho(t)))})
	c, err := net.Dial("udp", net.JoinHostPort(host, "7"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, n := range []int{0, 1, 1200, 1472, 1473, 9000, 60000} {
		want := bytes.Repeat([]byte{byte(n)}, n)
		if _, err := c.Write(want); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 65536)
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		m, err := c.Read(got)
		if err != nil || !bytes.Equal(got[:m], want) {
			t.Fatalf("%d bytes: got %d, %v", n, m, err)
		}
	}
	if st := s.Stats(); st.UDPOpen != 1 || st.UDPTotal != 1 {
		t.Errorf("stats %+v", st)
	}
}

func testUDPRefused(t *testing.T, host string) {
	start(t, netstack.Config{DialTCP: netstacktest.DialTCP(to("")), DialUDP: func(context.Context, netip.AddrPort, netip.AddrPort) (flow.Packets, error) {
		return nil, syscall.ECONNREFUSED
	}})
	c, err := net.Dial("udp", net.JoinHostPort(host, "7"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("x"))
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("got %v, want ECONNREFUSED", err)
	}
}

func testUDPIdle(t *testing.T) {
	s := start(t, netstack.Config{
		DialTCP: netstacktest.DialTCP(to("")), DialUDP: netstacktest.DialUDP(to(udpEcho(t))),
		UDPIdle: time.Hour, DNSIdle: 200 * time.Millisecond,
	})
	for _, port := range []string{"53", "7"} {
		c, err := net.Dial("udp", net.JoinHostPort(host4, port))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.Write([]byte("x"))
	}
	nettest.Poll(t, 5*time.Second, "two conversations", func() bool { return s.Stats().UDPTotal == 2 })
	nettest.Poll(t, 5*time.Second, "the DNS one expired", func() bool { return s.Stats().UDPOpen == 1 })
}

func testConcurrent(t *testing.T) {
	const n = 1000
	s := start(t, netstack.Config{DialTCP: netstacktest.DialTCP(to(serve(t, echo)))})
	conns := make([]*net.TCPConn, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(host4, "80"), 20*time.Second)
			if err != nil {
				t.Errorf("connection %d: %v", i, err)
				return
			}
			conns[i] = c.(*net.TCPConn)
			fmt.Fprintf(c, "%08d", i)
			b := make([]byte, 8)
			if _, err := io.ReadFull(c, b); err != nil || string(b) != fmt.Sprintf("%08d", i) {
				t.Errorf("connection %d: %q, %v", i, b, err)
			}
		})
	}
	wg.Wait()
	if got := s.Stats().TCPOpen; got != n {
		t.Errorf("%d open, want %d", got, n)
	}
	for _, c := range conns {
		if c != nil {
			c.Close()
		}
	}
	nettest.Poll(t, 30*time.Second, "all closed", func() bool { return s.Stats().TCPOpen == 0 })
	if l, err := netlink.LinkByName("doppel0"); err != nil || l.Attrs().Statistics.TxDropped > 0 {
		t.Errorf("the device's queue lost packets: %+v, %v", l.Attrs().Statistics, err)
	}
}

func testConnectingLimit(t *testing.T) {
	addr, release := serve(t, echo), make(chan struct{})
	s := start(t, netstack.Config{MaxConnecting: 2, DialTCP: func(ctx context.Context, src, dst netip.AddrPort) (flow.Stream, error) {
		<-release
		return netstacktest.DialTCP(to(addr))(ctx, src, dst)
	}})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			c, err := net.DialTimeout("tcp", host4+":80", 10*time.Second)
			if err != nil {
				t.Error(err)
				return
			}
			c.Close()
		})
	}
	nettest.Poll(t, 5*time.Second, "two dials and a dropped SYN", func() bool {
		st := s.Stats()
		return st.TCPConnecting == 2 && st.SYNDropped >= 1
	})
	close(release)
	wg.Wait() // the third comes through with its retransmitted SYN
}

// testStop ends Run with flows open: the application sees them reset.
func testStop(t *testing.T) {
	dev := openTUN(t)
	addr := serve(t, echo)
	s, err := netstack.New(netstack.Config{Device: dev, DialTCP: netstacktest.DialTCP(to(addr))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	for range 20 {
		c := dial(t, host4)
		c.Write([]byte("x"))
		io.ReadFull(c, make([]byte, 1))
	}
	began := time.Now()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("stopping took %v", took)
	}
}

// testUDPRefusedLater is a port that refuses once datagrams come: every conversation ends with what the network said.
func testUDPRefusedLater(t *testing.T, host string) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := pc.LocalAddr().String()
	pc.Close()
	s := start(t, netstack.Config{DialTCP: netstacktest.DialTCP(to("")), DialUDP: netstacktest.DialUDP(to(closed))})
	c, err := net.Dial("udp", net.JoinHostPort(host, "7"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 2 {
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("got %v, want ECONNREFUSED", err)
		}
		nettest.Poll(t, 5*time.Second, "conversation ended", func() bool { return s.Stats().UDPOpen == 0 })
	}
}

// pings is a flow that answers every request by fn, or not.
type pings struct {
	replies chan []byte
	done    chan struct{}
	once    sync.Once
	err     error
}

func newPings() *pings { return &pings{replies: make(chan []byte, 16), done: make(chan struct{})} }

func (p *pings) ReadPacket(b []byte) (int, error) {
	select {
	case m := <-p.replies:
		return copy(b, m), nil
	case <-p.done:
		return 0, errors.Join(p.err, net.ErrClosed)
	}
}

func (p *pings) WritePacket(m []byte) error {
	if p.err != nil {
		p.Close()
		return nil
	}
	p.replies <- bytes.Clone(m)
	return nil
}

func (p *pings) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

// pingSocket is an application that pings host.
func pingSocket(t *testing.T, host string) flow.Packets {
	t.Helper()
	app, err := flow.DialEcho(netip.MustParseAddr(host))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { app.Close() })
	return app
}

func testPing(t *testing.T, host string) {
	var asked netip.Addr
	s := start(t, netstack.Config{DialTCP: netstacktest.DialTCP(to("")), DialEcho: func(_ context.Context, _, dst netip.Addr) (flow.Packets, error) {
		asked = dst
		return newPings(), nil
	}})
	app := pingSocket(t, host)
	got := make([]byte, 65536)
	for seq, n := range []int{0, 56, 1472, 1473, 5000, 60000} {
		want := wire.AppendEchoMessage(nil, uint16(seq), bytes.Repeat([]byte{byte(n)}, n))
		if err := app.WritePacket(want); err != nil {
			t.Fatal(err)
		}
		m, err := app.ReadPacket(got)
		if err != nil || !bytes.Equal(got[:m], want) {
			t.Fatalf("%d bytes: got %d, %v", n, m, err)
		}
	}
	if st := s.Stats(); st.EchoTotal != 1 || st.EchoOpen != 1 || st.EchoReplies != 6 || asked.String() != host {
		t.Errorf("stats %+v, asked for %v", st, asked)
	}
}

func testPingUnreachable(t *testing.T, host string) {
	for name, dial := range map[string]func() (flow.Packets, error){
		"dial": func() (flow.Packets, error) { return nil, syscall.EHOSTUNREACH },
		"flow": func() (flow.Packets, error) {
			p := newPings()
			p.err = syscall.EHOSTUNREACH
			return p, nil
		},
	} {
		t.Run(name, func(t *testing.T) { // each with the device to itself
			start(t, netstack.Config{DialTCP: netstacktest.DialTCP(to("")), DialEcho: func(context.Context, netip.Addr, netip.Addr) (flow.Packets, error) { return dial() }})
			for range 50 { // a dial that fails at once must not be faster than its request
				app := pingSocket(t, host)
				if err := app.WritePacket(wire.AppendEchoMessage(nil, 1, []byte("x"))); err != nil {
					t.Fatal(err)
				}
				select {
				case err := <-answered(app):
					if !errors.Is(err, syscall.EHOSTUNREACH) {
						t.Fatalf("got %v, want EHOSTUNREACH", err)
					}
				case <-time.After(10 * time.Second):
					t.Fatal("no answer")
				}
				app.Close()
			}
		})
	}
}

// answered reads once and says how that ended.
func answered(app flow.Packets) <-chan error {
	res := make(chan error, 1)
	go func() {
		_, err := app.ReadPacket(make([]byte, 100))
		res <- err
	}()
	return res
}

// testPingUnanswered: gVisor must not answer by itself.
func testPingUnanswered(t *testing.T, host string) {
	for name, dial := range map[string]func(context.Context, netip.Addr, netip.Addr) (flow.Packets, error){
		"not served": nil,
		"refused":    func(context.Context, netip.Addr, netip.Addr) (flow.Packets, error) { return nil, syscall.EACCES },
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, netstack.Config{DialTCP: netstacktest.DialTCP(to("")), DialEcho: dial})
			app := pingSocket(t, host)
			if err := app.WritePacket(wire.AppendEchoMessage(nil, 1, []byte("x"))); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-answered(app):
				t.Errorf("an answer, or %v", err)
			case <-time.After(300 * time.Millisecond):
			}
			if n := s.Stats().EchoReplies; n != 0 {
				t.Errorf("%d replies", n)
			}
		})
	}
}

func testPingLimit(t *testing.T) {
	s := start(t, netstack.Config{DialTCP: netstacktest.DialTCP(to("")), MaxEcho: 1, EchoIdle: 200 * time.Millisecond, DialEcho: func(context.Context, netip.Addr, netip.Addr) (flow.Packets, error) {
		return newPings(), nil
	}})
	first, second := pingSocket(t, host4), pingSocket(t, host4)
	got := make([]byte, 100)
	for _, app := range []flow.Packets{first, second} {
		if err := app.WritePacket(wire.AppendEchoMessage(nil, 1, nil)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := first.ReadPacket(got); err != nil {
		t.Fatal(err)
	}
	nettest.Poll(t, 5*time.Second, "the first one idle", func() bool { return s.Stats().EchoOpen == 0 })
	if err := second.WritePacket(wire.AppendEchoMessage(nil, 2, nil)); err != nil {
		t.Fatal(err)
	}
	if n, err := second.ReadPacket(got); err != nil || !bytes.Equal(got[:n], []byte{0, 2}) {
		t.Errorf("got %x, %v: want the second request's reply only", got[:n], err)
	}
}

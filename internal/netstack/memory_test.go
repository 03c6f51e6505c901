package netstack_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/netstack"
	"github.com/doppel-dev/doppel/internal/netstack/netstacktest"
	"github.com/doppel-dev/doppel/internal/tundev"
	"github.com/doppel-dev/doppel/internal/tundev/tuntest"
	"github.com/doppel-dev/doppel/internal/wire"
)

// pipeStream is a flow in memory.
type pipeStream struct {
	net.Conn // one end of two pipes
	in       *io.PipeReader
	out      *io.PipeWriter
}

func (p pipeStream) Read(b []byte) (int, error)  { return p.in.Read(b) }
func (p pipeStream) Write(b []byte) (int, error) { return p.out.Write(b) }
func (p pipeStream) CloseWrite() error           { return p.out.Close() }
func (p pipeStream) Close() error                { p.in.Close(); return p.out.Close() }
func (p pipeStream) Reset() {
	p.in.CloseWithError(syscall.ECONNRESET)
	p.out.CloseWithError(syscall.ECONNRESET)
}

// TestInMemory runs application and stack without root: what one-process tests of the user daemon do.
func TestInMemory(t *testing.T) {
	defer goleak.VerifyNone(t)
	a, b := tuntest.Pair()
	dialled := make(chan [2]netip.AddrPort, 1)
	s, err := netstack.New(netstack.Config{Device: b, DialTCP: func(_ context.Context, src, dst netip.AddrPort) (flow.Stream, error) {
		if dst.Port() == 1 {
			return nil, syscall.ECONNREFUSED
		}
		dialled <- [2]netip.AddrPort{src, dst}
		r1, w1 := io.Pipe()
		return pipeStream{in: r1, out: w1}, nil // what goes up comes down
	}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	host, err := netstacktest.NewHost(a, netip.MustParseAddr("10.1.1.1"), netip.MustParseAddr("fd01::1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dst := range []string{"10.9.9.9", "fd09::9"} {
		if _, err := host.DialTCP(ctx, netip.AddrPortFrom(netip.MustParseAddr(dst), 1)); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("%s: %v, want refused", dst, err)
		}
		c, err := host.DialTCP(ctx, netip.AddrPortFrom(netip.MustParseAddr(dst), 80))
		if err != nil {
			t.Fatal(err)
		}
		if got := <-dialled; got[1].Addr().String() != dst || got[1].Port() != 80 || got[0].Port() == 0 {
			t.Errorf("dialled %v", got)
		}
		want := bytes.Repeat([]byte("0123456789abcdef"), 1<<17) // 2 MiB
		go func() {
			c.Write(want)
			c.CloseWrite()
		}()
		got, err := io.ReadAll(c)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes came back, %v", dst, len(got), err)
		}
		c.Close()
	}
	host.Close()
	if err := <-done; err != nil { // the device's end is the stack's, and no error
		t.Error(err)
	}
}

// sizes is a device that notes the longest packet written to it.
type sizes struct {
	netstack.Device
	mu      sync.Mutex
	longest int
}

func (d *sizes) WritePacket(h tundev.Header, parts [][]byte) error {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	d.mu.Lock()
	d.longest = max(d.longest, n)
	d.mu.Unlock()
	return d.Device.WritePacket(h, parts)
}

// framesStream is a flow of so many full frames.
type framesStream struct {
	echoStream
	left int
}

func (f *framesStream) WriteSome(w io.Writer, _ func()) (bool, error) {
	for ; f.left > 0; f.left-- {
		if _, err := w.Write(make([]byte, wire.FullPayload)); err != nil {
			return false, err
		}
	}
	return false, nil
}

// host is an application's machine on a device of a stack whose flows are made by dial; end ends both.
func host(t *testing.T, device func(netstack.Device) netstack.Device, dial func() flow.Stream) (ctx context.Context, h *netstacktest.Host, end func()) {
	t.Helper()
	a, b := tuntest.Pair()
	s, err := netstack.New(netstack.Config{Device: device(b), DialTCP: func(context.Context, netip.AddrPort, netip.AddrPort) (flow.Stream, error) {
		return dial(), nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	if h, err = netstacktest.NewHost(a, netip.MustParseAddr("10.1.1.1"), netip.MustParseAddr("fd01::1")); err != nil {
		t.Fatal(err)
	}
	return ctx, h, func() {
		t.Helper()
		h.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		cancel()
	}
}

// TestFullFrame sees that what a full frame carries goes out as one packet, and not as one and what is left over.
func TestFullFrame(t *testing.T) {
	for dst, headers := range map[string]int{"10.9.9.9": 20, "fd09::9": 40} {
		var dev *sizes
		ctx, app, end := host(t, func(d netstack.Device) netstack.Device { dev = &sizes{Device: d}; return dev }, func() flow.Stream { return &framesStream{left: 64} })
		c, err := app.DialTCP(ctx, netip.AddrPortFrom(netip.MustParseAddr(dst), 80))
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, c); err != nil || n != 64*wire.FullPayload {
			t.Errorf("%s: %d bytes came, %v", dst, n, err)
		}
		c.Close()
		end()
		if got := dev.longest; got < wire.FullPayload+headers+20 || got-headers > 65535 {
			t.Errorf("%s: the longest packet has %d bytes", dst, got)
		}
	}
}

// whole is a device that takes finished packets only, as those of macOS and Windows.
type whole struct {
	netstack.Device
	t *testing.T
}

func (*whole) Splits() bool { return false }

func (d *whole) WritePacket(h tundev.Header, parts [][]byte) error {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	if h.GSO != tundev.GSONone || n > 1500 {
		d.t.Errorf("a packet of %d bytes, %+v", n, h)
		return errors.New("not taken")
	}
	return d.Device.WritePacket(h, parts)
}

// TestWholePackets sees that what a full frame carries reaches an application also by a device that does not split packets.
func TestWholePackets(t *testing.T) {
	ctx, app, end := host(t, func(d netstack.Device) netstack.Device { return &whole{d, t} }, func() flow.Stream { return &framesStream{left: 16} })
	for _, dst := range []string{"10.9.9.9", "fd09::9"} {
		c, err := app.DialTCP(ctx, netip.AddrPortFrom(netip.MustParseAddr(dst), 80))
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		if n, err := io.Copy(io.Discard, c); err != nil || n != 16*wire.FullPayload {
			t.Errorf("%s: %d bytes came, %v", dst, n, err)
		}
		c.Close()
	}
	end()
}

// overStream is a flow whose peer answered and is over, which shows to who writes before the answer is read.
type overStream struct {
	echoStream
	written chan struct{} // something was, or its end
	once    sync.Once
}

func (o *overStream) Write([]byte) (int, error) { return 0, o.CloseWrite() }
func (o *overStream) Over() bool                { return true }

func (o *overStream) CloseWrite() error {
	o.once.Do(func() { close(o.written) })
	return syscall.ECONNRESET
}

func (o *overStream) Reset() {
	o.change(func() { o.buf, o.err = nil, net.ErrClosed })
}

func (o *overStream) WriteSome(w io.Writer, wake func()) (bool, error) {
	select {
	case <-o.written:
	default:
		go func() {
			<-o.written
			time.Sleep(20 * time.Millisecond) // the one who found it has done what follows
			wake()
		}()
		return true, nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil {
		_, o.err = w.Write([]byte("no"))
		o.err = syscall.ECONNRESET
	}
	return false, o.err
}

// TestEarlyAnswer sees that an application gets what a server said before it closed with a request unread.
func TestEarlyAnswer(t *testing.T) {
	ctx, app, end := host(t, func(d netstack.Device) netstack.Device { return d }, func() flow.Stream { return &overStream{written: make(chan struct{})} })
	for what, do := range map[string]func(*netstacktest.Conn){
		"writes": func(c *netstacktest.Conn) { c.Write([]byte("more")) },
		"ends":   func(c *netstacktest.Conn) { c.CloseWrite() },
	} {
		c, err := app.DialTCP(ctx, netip.MustParseAddrPort("10.9.9.9:80"))
		if err != nil {
			t.Fatal(err)
		}
		do(c)
		if got, err := io.ReadAll(c); string(got) != "no" || err == nil {
			t.Errorf("%s: %q, %v; want the answer and a reset", what, got, err)
		}
		c.Close()
	}
	end()
}

// echoStream is a flow that needs no goroutine: what goes up comes down.
type echoStream struct {
	mu   sync.Mutex
	buf  []byte
	fin  bool
	err  error
	wake func()
}

func (e *echoStream) change(fn func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	fn()
	if wake := e.wake; wake != nil {
		e.wake = nil
		wake()
	}
}

func (e *echoStream) Read([]byte) (int, error) { panic("a flow that is read waits for it") }
func (e *echoStream) CloseWrite() error        { e.change(func() { e.fin = true }); return nil }
func (e *echoStream) Close() error             { return nil }
func (e *echoStream) Reset()                   { e.change(func() { e.err = syscall.ECONNRESET }) }
func (e *echoStream) Write(p []byte) (int, error) {
	e.change(func() { e.buf = append(e.buf, p...) })
	return len(p), nil
}

func (e *echoStream) WriteSome(w io.Writer, wake func()) (bool, error) {
	e.mu.Lock()
	b, fin, err := e.buf, e.fin, e.err
	e.buf = nil
	if len(b) == 0 && err == nil && !fin {
		e.wake = wake
		e.mu.Unlock()
		return true, nil
	}
	e.mu.Unlock()
	if err != nil {
		return false, err
	}
	if _, err := w.Write(b); err != nil {
		return false, err
	}
	if fin {
		return false, nil
	}
	return e.WriteSome(w, wake)
}

// Connections that are silent cost no goroutine, and what comes on them later is passed on all the same.
func TestSilentFlows(t *testing.T) {
	defer goleak.VerifyNone(t)
	a, b := tuntest.Pair()
	s, err := netstack.New(netstack.Config{Device: b, DialTCP: func(context.Context, netip.AddrPort, netip.AddrPort) (flow.Stream, error) {
		return &echoStream{}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	host, err := netstacktest.NewHost(a, netip.MustParseAddr("10.1.1.1"), netip.MustParseAddr("fd01::1"))
	if err != nil {
		t.Fatal(err)
	}
	const flows = 200
	var conns []net.Conn
	use := func(c net.Conn) {
		t.Helper()
		var got [5]byte
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, got[:]); err != nil || string(got[:]) != "hello" {
			t.Fatalf("%q, %v", got, err)
		}
	}
	for range flows {
		c, err := host.DialTCP(ctx, netip.MustParseAddrPort("10.9.9.9:80"))
		if err != nil {
			t.Fatal(err)
		}
		use(c)
		conns = append(conns, c)
	}
	for runtime.NumGoroutine() > flows/2 { // some wait for work, whatever the flows
		if ctx.Err() != nil {
			t.Fatalf("%d goroutines for %d silent flows", runtime.NumGoroutine(), flows)
		}
		runtime.Gosched()
	}
	for i, c := range conns {
		use(c)
		if i%2 == 0 {
			c.Close()
		}
	}
	for s.Stats().TCPOpen > flows/2 {
		if ctx.Err() != nil {
			t.Fatalf("%d flows are open", s.Stats().TCPOpen)
		}
		runtime.Gosched()
	}
	cancel() // with half of them open
	if err := <-done; err != nil {
		t.Error(err)
	}
	host.Close()
}

func TestNewRefuses(t *testing.T) {
	_, b := tuntest.Pair()
	dial := func(context.Context, netip.AddrPort, netip.AddrPort) (flow.Stream, error) { return nil, nil }
	for name, cfg := range map[string]netstack.Config{
		"nothing":         {},
		"no device":       {DialTCP: dial},
		"no dialer":       {Device: b},
		"small mtu":       {Device: b, DialTCP: dial, MTU: 100},
		"negative limit":  {Device: b, DialTCP: dial, MaxUDP: -1},
		"negative budget": {Device: b, DialTCP: dial, BufferBudget: -1},
	} {
		if _, err := netstack.New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

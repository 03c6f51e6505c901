package tunnel_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newIdentity(t testing.TB) *tunnel.Identity {
	t.Helper()
	id, err := tunnel.NewIdentity("traffic-manager")
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func allow(_ context.Context, h wire.Hello, _ string) (wire.HelloReply, error) {
	return wire.HelloReply{Manager: "m-0", Session: h.Session}, nil
}

// newTunnel returns both ends of a tunnel over an in-memory link; the server end serves h.
func newTunnel(t testing.TB, h tunnel.Handlers) (client, server *mux.Session) {
	t.Helper()
	link := muxtest.NewLink(muxtest.Config{})
	server = nil
	ready := make(chan *mux.Session, 1)
	id := newIdentity(t)
	go func() {
		s, _, err := tunnel.Server(context.Background(), link.B, tunnel.ServerConfig{Identity: id, Authorize: allow})
		if err != nil {
			t.Error(err)
		}
		ready <- s
	}()
	client, reply, err := tunnel.Client(context.Background(), link.A, tunnel.ClientConfig{
		Peer: id.Fingerprint(), Hello: wire.Hello{Role: wire.RoleLaptop, Session: "uid-1"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if reply.Manager != "m-0" || reply.Session != "uid-1" || reply.Version != wire.Version {
		t.Errorf("reply %+v", reply)
	}
	server = <-ready
	var wg sync.WaitGroup
	wg.Go(func() { _ = tunnel.Serve(context.Background(), server, h) })
	t.Cleanup(func() { _ = client.Close(); _ = server.Close(); wg.Wait() })
	return client, server
}

func TestFlows(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { _, _ = io.Copy(c, c); _ = c.Close() })
		}
	})
	defer wg.Wait()
	defer ln.Close()
	dial := func(r *mux.Request, h wire.FlowHeader) { _ = tunnel.ServeDial(r, h, &net.Dialer{}) }
	client, _ := newTunnel(t, tunnel.Handlers{TCP: dial, UDP: dial})

	st, err := tunnel.DialTCP(context.Background(), client, netip.AddrPort{}, netip.MustParseAddrPort(ln.Addr().String()))
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = st.Write([]byte(strings.Repeat("x", 1<<20))); _ = st.CloseWrite() }()
	b, err := io.ReadAll(st)
	if len(b) != 1<<20 || err != nil {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	_ = st.Close()

	free, _ := net.Listen("tcp", "127.0.0.1:0")
	addr := netip.MustParseAddrPort(free.Addr().String())
	_ = free.Close()
	if _, err := tunnel.DialTCP(context.Background(), client, netip.AddrPort{}, addr); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial of a closed port: %v", err)
	}

	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	wg.Go(func() {
		buf := make([]byte, 2000)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo(buf[:n], from)
		}
	})
	u, err := tunnel.DialUDP(context.Background(), client, netip.AddrPort{}, netip.MustParseAddrPort(pc.LocalAddr().String()))
	if err != nil {
		t.Fatal(err)
	}
	for _, msg := range []string{"one", "", "three"} {
		if err := u.WritePacket([]byte(msg)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 100)
		n, err := u.ReadPacket(buf)
		if string(buf[:n]) != msg || err != nil {
			t.Errorf("got %q, %v, want %q", buf[:n], err, msg)
		}
	}
	_ = u.Close()

	// A port that refuses is heard of after a datagram was sent; the end must not look like an ordinary one.
	gone, _ := net.ListenPacket("udp", "127.0.0.1:0")
	_ = gone.Close()
	u, err = tunnel.DialUDP(context.Background(), client, netip.AddrPort{}, netip.MustParseAddrPort(gone.LocalAddr().String()))
	if err != nil {
		t.Fatal(err)
	}
	_ = u.WritePacket([]byte("x"))
	if _, err := u.ReadPacket(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a closed UDP port: %v", err)
	}
}

func TestCalls(t *testing.T) {
	client, _ := newTunnel(t, tunnel.Handlers{
		DNS: func(_ context.Context, msg []byte) ([]byte, error) { return append(msg, '!'), nil },
		Control: func(_ context.Context, method string, body []byte) (any, error) {
			switch method {
			case "echo":
				return map[string]string{"body": string(body)}, nil
			case "missing":
				return nil, uerr.New(uerr.NotFound, "", "no such thing")
			}
			return nil, errors.New("boom")
		},
		Watch: func(_ context.Context, method string, _ []byte, send func(any) error) error {
			if method != "count" {
				return &mux.RejectError{Code: wire.CodeNotFound, Msg: "no watch of that name"}
			}
			for i := range 3 {
				if err := send(i); err != nil {
					return err
				}
			}
			return send(strings.Repeat("y", 1<<20))
		},
	})
	ctx := context.Background()
	got, err := tunnel.Query(ctx, client, []byte("0123456789ab"))
	if string(got) != "0123456789ab!" || err != nil {
		t.Errorf("query: %q %v", got, err)
	}
	var out map[string]string
	if err := tunnel.Control(ctx, client, "echo", []int{1, 2}, &out); err != nil || out["body"] != "[1,2]" {
		t.Errorf("control: %v %v", out, err)
	}
	for method, want := range map[string]wire.Code{"missing": wire.CodeNotFound, "other": wire.CodeInternal} {
		var rej *mux.RejectError
		if err := tunnel.Control(ctx, client, method, nil, nil); !errors.As(err, &rej) || rej.Code != want {
			t.Errorf("%s: %v", method, err)
		}
	}
	w, err := tunnel.Watch(ctx, client, "count", nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		n := -1
		if err := w.Next(ctx, &n); err != nil || n != i {
			t.Errorf("watch: %d %v", n, err)
		}
	}
	var long string
	if err := w.Next(ctx, &long); err != nil || len(long) != 1<<20 {
		t.Errorf("watch: %d bytes, %v", len(long), err)
	}
	if err := w.Next(ctx, nil); !errors.Is(err, io.EOF) {
		t.Errorf("end of watch: %v", err)
	}
	var rej *mux.RejectError
	if _, err := tunnel.Watch(ctx, client, "else", nil); !errors.As(err, &rej) || rej.Code != wire.CodeNotFound {
		t.Errorf("watch: %v", err)
	}
	if _, err := tunnel.DialTCP(ctx, client, netip.AddrPort{}, netip.MustParseAddrPort("10.0.0.1:80")); !errors.As(err, &rej) || rej.Code != wire.CodeDenied {
		t.Errorf("without handler: %v", err)
	}
}

// handshake runs both ends and returns both errors.
func handshake(t *testing.T, cc tunnel.ClientConfig, sc tunnel.ServerConfig) (cerr, serr error) {
	t.Helper()
	link := muxtest.NewLink(muxtest.Config{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		var s *mux.Session
		s, _, serr = tunnel.Server(context.Background(), link.B, sc)
		if s != nil {
			<-s.Done()
			_ = s.Close()
		}
	}()
	c, _, cerr := tunnel.Client(context.Background(), link.A, cc)
	if c != nil {
		_ = c.Close()
	}
	<-done
	return cerr, serr
}

func TestHandshake(t *testing.T) {
	server, laptop := newIdentity(t), newIdentity(t)
	authorize := func(_ context.Context, h wire.Hello, fp string) (wire.HelloReply, error) {
		if fp != laptop.Fingerprint() {
			return wire.HelloReply{}, fmt.Errorf("%w: of the laptop", tunnel.ErrPin)
		}
		if h.Session == "gone" {
			return wire.HelloReply{}, &mux.RejectError{Code: wire.CodeGone, Msg: "the session has ended"}
		}
		return wire.HelloReply{}, nil
	}
	for _, tt := range []struct {
		name   string
		client tunnel.ClientConfig
		want   wire.Code
		pin    bool
	}{
		{"right", tunnel.ClientConfig{Identity: laptop, Peer: server.Fingerprint()}, 0, false},
		{"other client key", tunnel.ClientConfig{Identity: server, Peer: server.Fingerprint()}, wire.CodeDenied, false},
		{"no client key", tunnel.ClientConfig{Peer: server.Fingerprint()}, wire.CodeDenied, false},
		{"gone", tunnel.ClientConfig{Identity: laptop, Peer: server.Fingerprint(), Hello: wire.Hello{Session: "gone"}}, wire.CodeGone, false},
		{"version", tunnel.ClientConfig{Identity: laptop, Peer: server.Fingerprint(), Hello: wire.Hello{Version: 99}}, wire.CodeVersion, false},
		{"other server key", tunnel.ClientConfig{Identity: laptop, Peer: laptop.Fingerprint()}, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cerr, serr := handshake(t, tt.client, tunnel.ServerConfig{Identity: server, Authorize: authorize})
			var rej *mux.RejectError
			switch {
			case tt.pin:
				if !errors.Is(cerr, tunnel.ErrPin) || serr == nil {
					t.Errorf("client %v, server %v", cerr, serr)
				}
			case tt.want == 0:
				if cerr != nil || serr != nil {
					t.Errorf("client %v, server %v", cerr, serr)
				}
			default:
				if !errors.As(cerr, &rej) || rej.Code != tt.want || serr == nil {
					t.Errorf("client %v, server %v", cerr, serr)
				}
			}
		})
	}
}

func TestUpgrade(t *testing.T) {
	id := newIdentity(t)
	var wg sync.WaitGroup
	srv := httptest.NewServer(tunnel.UpgradeHandler(func(c net.Conn) {
		wg.Go(func() {
			s, _, err := tunnel.Server(context.Background(), c, tunnel.ServerConfig{Identity: id, Authorize: allow})
			if err != nil {
				t.Error(err)
				return
			}
			_ = tunnel.Serve(context.Background(), s, tunnel.Handlers{
				DNS: func(_ context.Context, m []byte) ([]byte, error) { return m, nil },
			})
		})
	}))
	defer wg.Wait()
	defer srv.Close()
	u, _ := url.Parse(srv.URL)
	proxy := httptest.NewServer(httputil.NewSingleHostReverseProxy(u))
	defer proxy.Close()
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	for _, base := range []string{srv.URL, proxy.URL} {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		raw, err := tunnel.Upgrade(ctx, tr, base+"/attach")
		if err != nil {
			t.Fatal(err)
		}
		s, _, err := tunnel.Client(ctx, raw, tunnel.ClientConfig{Peer: id.Fingerprint()})
		cancel() // must not end the tunnel
		if err != nil {
			t.Fatal(err)
		}
		msg := strings.Repeat("q", 60_000)
		got, err := tunnel.Query(context.Background(), s, []byte(msg))
		if string(got) != msg || err != nil {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		_ = s.Close()
	}
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	_, err := tunnel.Upgrade(context.Background(), tr, plain.URL)
	var ue *tunnel.UpgradeError
	if !errors.As(err, &ue) || ue.Status != 404 || !strings.Contains(ue.Body, "not found") {
		t.Error(err)
	}
	resp, err := http.Get(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusUpgradeRequired {
		t.Error(resp.Status)
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestIdentityPEM(t *testing.T) {
	id := newIdentity(t)
	b, err := id.MarshalPEM()
	if err != nil {
		t.Fatal(err)
	}
	again, err := tunnel.ParseIdentity(b)
	if err != nil || again.Fingerprint() != id.Fingerprint() {
		t.Error(err)
	}
	if _, err := tunnel.ParseIdentity(b[:len(b)/2]); err == nil {
		t.Error("half a file was accepted")
	}
}

// TestDirect looks at the first bytes of a direct connection: TLS, with the name by which an ingress finds the way.
func TestDirect(t *testing.T) {
	id := newIdentity(t)
	for _, tt := range []struct {
		direct bool
		first  byte
	}{{true, 0x16}, {false, 'D'}} {
		link := muxtest.NewLink(muxtest.Config{})
		seen := &firstByte{Conn: link.B}
		ready := make(chan *mux.Session, 1)
		go func() {
			s, _, err := tunnel.Server(context.Background(), seen, tunnel.ServerConfig{Identity: id, Authorize: allow, Direct: tt.direct})
			if err != nil {
				t.Error(err)
			}
			ready <- s
		}()
		c, _, err := tunnel.Client(t.Context(), link.A, tunnel.ClientConfig{
			Peer: id.Fingerprint(), Hello: wire.Hello{Version: wire.Version, Role: wire.RoleLaptop}, Direct: tt.direct, ServerName: "doppel.example.com",
		})
		if err != nil {
			t.Fatal(err)
		}
		s := <-ready
		if seen.b != tt.first {
			t.Errorf("direct %v: the first byte is %#x, want %#x", tt.direct, seen.b, tt.first)
		}
		if _, err := c.Ping(t.Context()); err != nil {
			t.Error(err)
		}
		_, _ = c.Close(), s.Close()
	}
	// A laptop that is led to somebody else's address.
	link := muxtest.NewLink(muxtest.Config{})
	go func() {
		_, _, _ = tunnel.Server(context.Background(), link.B, tunnel.ServerConfig{Identity: newIdentity(t), Authorize: allow, Direct: true})
	}()
	_, _, err := tunnel.Client(t.Context(), link.A, tunnel.ClientConfig{Peer: id.Fingerprint(), Direct: true})
	if !errors.Is(err, tunnel.ErrPin) {
		t.Errorf("another key: %v", err)
	}
}

type firstByte struct {
	net.Conn
	b byte
}

func (c *firstByte) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 && c.b == 0 {
		c.b = p[0]
	}
	return n, err
}

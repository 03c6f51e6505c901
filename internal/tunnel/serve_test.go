package tunnel_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

var somewhere = netip.MustParseAddrPort("10.0.0.1:80")

// TestHandshakeGarbage: whatever is no tunnel is let go, at once or after the timeout.
func TestHandshakeGarbage(t *testing.T) {
	id := newIdentity(t)
	for _, tt := range []struct {
		name, bytes string
		want        error
	}{
		{"HTTP", "GET / HTTP/1.1\r\n\r\n", tunnel.ErrNotTunnel},
		{"later version", "DOPPEL2\n", tunnel.ErrNotTunnel},
		{"nothing", "", nil},
		{"preface only", wire.Preface, nil},
		{"preface and garbage", wire.Preface + "garbage garbage garbage", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				link := muxtest.NewLink(muxtest.Config{})
				_, _ = io.WriteString(link.A, tt.bytes)
				start := time.Now()
				s, _, err := tunnel.Server(context.Background(), link.B, tunnel.ServerConfig{
					Identity: id, Authorize: allow, HandshakeTimeout: time.Second,
				})
				if s != nil || err == nil || tt.want != nil && !errors.Is(err, tt.want) {
					t.Error(s, err)
				}
				if took := time.Since(start); took > time.Second {
					t.Errorf("took %s", took)
				}
				_, err = io.ReadAll(link.A)
				if err != nil {
					t.Errorf("the connection is still there: %v", err)
				}
				_ = link.A.Close()
			})
		})
	}
}

// TestNothingBeforeHello: streams that come instead of Hello, or before it was judged, are not served.
func TestNothingBeforeHello(t *testing.T) {
	id := newIdentity(t)
	var dialled atomic.Bool
	run := func(t *testing.T, authorize func(context.Context, wire.Hello, string) (wire.HelloReply, error), client func(*mux.Session)) {
		link := muxtest.NewLink(muxtest.Config{})
		done := make(chan struct{})
		go func() {
			defer close(done)
			s, _, err := tunnel.Server(context.Background(), link.B, tunnel.ServerConfig{Identity: id, Authorize: authorize})
			if err != nil {
				return
			}
			_ = tunnel.Serve(context.Background(), s, tunnel.Handlers{TCP: func(r *mux.Request, _ wire.FlowHeader) {
				dialled.Store(true)
				_ = r.Reject(wire.CodeRefused, "")
			}})
		}()
		_, _ = io.WriteString(link.A, wire.Preface)
		c := tls.Client(link.A, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"doppel"}})
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		s, err := mux.New(c, mux.Config{Initiator: true, KeepAlive: -1}) // no ping before what the test sends
		if err != nil {
			t.Fatal(err)
		}
		client(s)
		_ = s.Close()
		<-done
	}
	t.Run("no hello", func(t *testing.T) {
		run(t, allow, func(s *mux.Session) {
			var rej *mux.RejectError
			if _, err := tunnel.DialTCP(context.Background(), s, somewhere, somewhere); !errors.As(err, &rej) || rej.Code != wire.CodeProtocol {
				t.Error(err)
			}
		})
	})
	t.Run("not yet", func(t *testing.T) {
		asked, answer := make(chan struct{}), make(chan struct{})
		authorize := func(context.Context, wire.Hello, string) (wire.HelloReply, error) {
			close(asked)
			<-answer
			return wire.HelloReply{}, errors.New("no")
		}
		run(t, authorize, func(s *mux.Session) {
			hdr, _ := wire.AppendHello(nil, wire.Hello{Version: wire.Version})
			hello := make(chan error, 1)
			go func() { _, err := s.Call(context.Background(), hdr); hello <- err }()
			<-asked
			flow := make(chan error, 1)
			go func() {
				_, err := tunnel.DialTCP(context.Background(), s, somewhere, somewhere)
				flow <- err
			}()
			close(answer)
			if err := <-flow; err == nil {
				t.Error("a flow before hello")
			}
			var rej *mux.RejectError
			if err := <-hello; !errors.As(err, &rej) || rej.Code != wire.CodeDenied || rej.Msg != "no" {
				t.Error(err)
			}
		})
	})
	if dialled.Load() {
		t.Error("a handler ran")
	}
}

func TestServeLimits(t *testing.T) {
	block := make(chan struct{})
	client, _ := newTunnel(t, tunnel.Handlers{
		Limit: 2,
		DNS: func(ctx context.Context, m []byte) ([]byte, error) {
			<-block
			return m, nil
		},
		Control: func(context.Context, string, []byte) (any, error) { panic("oh") },
	})
	ctx := context.Background()
	results := make(chan error, 3)
	for range 3 {
		go func() { _, err := tunnel.Query(ctx, client, make([]byte, 12)); results <- err }()
	}
	var rej *mux.RejectError
	if err := <-results; !errors.As(err, &rej) || rej.Code != wire.CodeBusy {
		t.Error(err)
	}
	close(block)
	for range 2 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if err := tunnel.Control(ctx, client, "x", nil, nil); !errors.As(err, &rej) || rej.Code != wire.CodeInternal {
		t.Errorf("a handler that panics: %v", err)
	}
	// Headers that cannot be read.
	for _, hdr := range [][]byte{{byte(wire.KindDNS)}, {byte(wire.KindControl)}, {byte(wire.KindHello)}, {99}} {
		if _, err := client.Call(ctx, hdr); !errors.As(err, &rej) || rej.Code != wire.CodeProtocol && rej.Code != wire.CodeDenied {
			t.Errorf("%v: %v", hdr, err)
		}
	}
}

// TestCancelReaches: the caller's giving up ends the handler's context.
func TestCancelReaches(t *testing.T) {
	started, ended := make(chan struct{}), make(chan struct{})
	client, _ := newTunnel(t, tunnel.Handlers{
		Control: func(ctx context.Context, _ string, _ []byte) (any, error) {
			close(started)
			<-ctx.Done()
			close(ended)
			return nil, ctx.Err()
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	go func() { <-started; cancel() }()
	if err := tunnel.Control(ctx, client, "x", nil, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	<-ended
}

func TestWatchEnds(t *testing.T) {
	sendFailed := make(chan error, 1)
	client, server := newTunnel(t, tunnel.Handlers{
		Watch: func(ctx context.Context, method string, _ []byte, send func(any) error) error {
			_ = send(nil)
			switch method {
			case "fails":
				_ = send(1)
				return &mux.RejectError{Code: wire.CodeGone}
			case "waits":
				_ = send(1)
				<-ctx.Done()
				sendFailed <- send(2)
			}
			return nil
		},
	})
	ctx := context.Background()
	w, err := tunnel.Watch(ctx, client, "fails", nil)
	if err != nil {
		t.Fatal(err)
	}
	var n int
	if err := w.Next(ctx, &n); n != 1 || err != nil {
		t.Error(n, err)
	}
	var rst *mux.ResetError
	if err := w.Next(ctx, &n); !errors.As(err, &rst) || rst.Code != wire.CodeGone {
		t.Error(err)
	}
	w, err = tunnel.Watch(ctx, client, "waits", nil)
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithCancel(ctx)
	cancel()
	_ = w.Next(short, &n) // may or may not have come
	if n == 1 {
		n = 0
		if err := w.Next(short, &n); !errors.Is(err, context.Canceled) && n != 1 {
			t.Error(n, err)
		}
	}
	_ = w.Close()
	if err := <-sendFailed; err == nil {
		t.Error("send to a watcher that is gone")
	}
	w, err = tunnel.Watch(ctx, client, "waits", nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = server.Close()
	for err = nil; err == nil; {
		err = w.Next(ctx, nil)
	}
	if !errors.Is(err, mux.ErrSession) {
		t.Error(err)
	}
	<-sendFailed
}

type failingDialer struct{ err error }

func (d failingDialer) DialContext(ctx context.Context, _, _ string) (net.Conn, error) {
	if d.err == nil {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return nil, d.err
}

type panickyDialer struct{}

func (panickyDialer) DialContext(context.Context, string, string) (net.Conn, error) { panic("oh") }

// A panic of a dialer ends its request, as any other, and nothing of it is told to the other end.
func TestServeDialPanic(t *testing.T) {
	client, _ := newTunnel(t, tunnel.Handlers{TCP: func(r *mux.Request, h wire.FlowHeader) { _ = tunnel.ServeDial(r, h, panickyDialer{}) }})
	for range 2 {
		_, _, err := client.Open(t.Context(), wire.AppendTCP(nil, wire.FlowHeader{Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort("10.0.0.2:2")}))
		r, ok := errors.AsType[*mux.RejectError](err)
		if !ok || r.Code != wire.CodeInternal || r.Msg != "the handler failed" {
			t.Errorf("%v", err)
		}
	}
}

func TestServeDialErrors(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ETIMEDOUT} {
		client, _ := newTunnel(t, tunnel.Handlers{TCP: func(r *mux.Request, h wire.FlowHeader) {
			if err := tunnel.ServeDial(r, h, failingDialer{&net.OpError{Op: "dial", Err: errno}}); !errors.Is(err, errno) {
				t.Error(err)
			}
		}})
		if _, err := tunnel.DialTCP(context.Background(), client, somewhere, somewhere); !errors.Is(err, errno) {
			t.Errorf("%v, want %v", err, errno)
		}
	}
	// The opener gives up: so does the dial.
	done := make(chan error, 1)
	client, _ := newTunnel(t, tunnel.Handlers{TCP: func(r *mux.Request, h wire.FlowHeader) {
		done <- tunnel.ServeDial(r, h, failingDialer{})
	}})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := tunnel.DialTCP(ctx, client, somewhere, somewhere); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestUpgradeCanceled: a server that never answers costs no more than the context.
func TestUpgradeCanceled(t *testing.T) {
	release := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	defer srv.Close()
	defer close(release)
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := tunnel.Upgrade(ctx, tr, srv.URL); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// TestUpgradePlain200: what an API server does over HTTP/2.
func TestUpgradePlain200(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "fine") }))
	defer srv.Close()
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	var ue *tunnel.UpgradeError
	if _, err := tunnel.Upgrade(context.Background(), tr, srv.URL); !errors.As(err, &ue) || ue.Status != 200 || ue.Body != "fine" {
		t.Error(err)
	}
}

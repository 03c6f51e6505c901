package flow_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tcp returns both ends of a loopback connection.
func tcp(t testing.TB) (*net.TCPConn, *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	a, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close(); _ = b.Close() })
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

// streams returns both ends of a mux stream.
func streams(t testing.TB) (*mux.Stream, *mux.Stream) {
	t.Helper()
	a, b, _ := muxtest.Pair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	return muxtest.Stream(t, a, b)
}

type end interface {
	flow.Stream
}

// paths are relays of every pair of sorts; each returns the two far ends and the relay's result.
func paths(t *testing.T) map[string]func(t *testing.T) (client, server end, done chan error) {
	run := func(a, b flow.Stream) chan error {
		done := make(chan error, 1)
		go func() {
			_, _, err := flow.Relay(a, b)
			done <- err
		}()
		return done
	}
	return map[string]func(*testing.T) (end, end, chan error){
		"tcp to tcp": func(t *testing.T) (end, end, chan error) {
			c, a := tcp(t)
			s, b := tcp(t)
			return flow.FromTCP(c), flow.FromTCP(s), run(flow.FromTCP(a), flow.FromTCP(b))
		},
		"tcp to mux": func(t *testing.T) (end, end, chan error) {
			c, a := tcp(t)
			b, s := streams(t)
			return flow.FromTCP(c), s, run(flow.FromTCP(a), b)
		},
		"mux to tcp": func(t *testing.T) (end, end, chan error) {
			c, a := streams(t)
			b, s := tcp(t)
			return c, flow.FromTCP(s), run(a, flow.FromTCP(b))
		},
		"mux to mux": func(t *testing.T) (end, end, chan error) {
			c, a := streams(t)
			b, s := streams(t)
			return c, s, run(a, b)
		},
		"plain": func(t *testing.T) (end, end, chan error) {
			c, a := streams(t)
			b, s := streams(t)
			return c, s, run(plain{a}, plain{b})
		},
	}
}

// plain hides a stream's fast ways.
type plain struct{ flow.Stream }

func TestRelay(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 200_000)
	for name, path := range paths(t) {
		t.Run(name+"/half-close", func(t *testing.T) {
			c, s, done := path(t)
			go func() { _, _ = c.Write(data); _ = c.CloseWrite() }()
			got, err := io.ReadAll(s)
			if !bytes.Equal(got, data) || err != nil {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
			go func() { _, _ = s.Write(data); _ = s.CloseWrite() }()
			got, err = io.ReadAll(c)
			if !bytes.Equal(got, data) || err != nil {
				t.Fatalf("%d bytes, %v", len(got), err)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		t.Run(name+"/server ends first", func(t *testing.T) {
			c, s, done := path(t)
			_, _ = s.Write([]byte("bye"))
			_ = s.CloseWrite()
			got, err := io.ReadAll(c)
			if string(got) != "bye" || err != nil {
				t.Fatalf("%q, %v", got, err)
			}
			_, _ = c.Write([]byte("yes"))
			_ = c.Close()
			if got, err = io.ReadAll(s); string(got) != "yes" || err != nil {
				t.Fatalf("%q, %v", got, err)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		for _, from := range []string{"client", "server"} {
			t.Run(name+"/reset by "+from, func(t *testing.T) {
				c, s, done := path(t)
				if from == "server" {
					c, s = s, c
				}
				_, _ = c.Write([]byte("x"))
				_, _ = s.Read(make([]byte, 1))
				c.Reset()
				if _, err := s.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the other end read %v", err)
				}
				if err := <-done; !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("relay: %v", err)
				}
			})
		}
	}
}

func TestRelayUDP(t *testing.T) {
	server, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	c, err := net.Dial("udp", server.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	a, b := streams(t)
	done := make(chan error, 1)
	go func() { done <- flow.RelayPackets(b, flow.FromUDP(c.(*net.UDPConn)), time.Minute) }()
	buf := make([]byte, 65_535)
	for _, n := range []int{1, 0, 1400, 65_507} { // the last is the most that IPv4 takes
		if err := a.WritePacket(buf[:n]); err != nil {
			t.Fatal(err)
		}
		got, from, err := server.ReadFromUDPAddrPort(buf)
		if got != n || err != nil {
			t.Fatalf("got %d of %d, %v", got, n, err)
		}
		_, _ = server.WriteToUDPAddrPort(buf[:got], from)
		if got, err := a.ReadPacket(buf); got != n || err != nil {
			t.Fatalf("got %d of %d back, %v", got, n, err)
		}
	}
	_ = a.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestRelayUDPRefused: the port's refusal (ICMP) ends the relay with its error.
func TestRelayUDPRefused(t *testing.T) {
	l, _ := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	addr := l.LocalAddr().String()
	_ = l.Close()
	c, err := net.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	a, b := streams(t)
	_ = a.WritePacket([]byte("x"))
	if err := flow.RelayPackets(b, flow.FromUDP(c.(*net.UDPConn)), time.Minute); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Error(err)
	}
}

// chanPackets is a flow's end made of channels.
type chanPackets struct {
	in, out chan []byte
	closed  chan struct{}
	once    sync.Once
	calls   atomic.Int32
}

func newChanPackets() *chanPackets {
	return &chanPackets{in: make(chan []byte), out: make(chan []byte, 100), closed: make(chan struct{})}
}

func (c *chanPackets) ReadPacket(p []byte) (int, error) {
	select {
	case b := <-c.in:
		return copy(p, b), nil
	case <-c.closed:
		return 0, net.ErrClosed
	}
}

func (c *chanPackets) WritePacket(p []byte) error {
	c.out <- bytes.Clone(p)
	return nil
}

func (c *chanPackets) Close() error {
	c.calls.Add(1)
	c.once.Do(func() { close(c.closed) })
	return nil
}

func TestRelayPacketsIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newChanPackets(), newChanPackets()
		start := time.Now()
		go func() {
			for range 5 { // traffic one way only keeps the flow
				time.Sleep(50 * time.Second)
				a.in <- []byte("x")
			}
		}()
		if err := flow.RelayPackets(a, b, time.Minute); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took != 310*time.Second {
			t.Errorf("idled out after %s", took)
		}
		if len(b.out) != 5 || a.calls.Load() != 1 || b.calls.Load() != 1 {
			t.Error(len(b.out), a.calls.Load(), b.calls.Load())
		}
	})
}

// CopyWhile shows what it copies, or that it was much, passes everything on in order, and stops where it is told to.
func TestCopyWhile(t *testing.T) {
	for name, far := range map[string]func(t *testing.T) (dst, reader flow.Stream){
		"tcp": func(t *testing.T) (flow.Stream, flow.Stream) {
			a, b := tcp(t)
			return flow.FromTCP(a), flow.FromTCP(b)
		},
		"tunnel": func(t *testing.T) (flow.Stream, flow.Stream) {
			a, b := streams(t)
			return a, b
		},
	} {
		t.Run(name, func(t *testing.T) {
			client, src := tcp(t)
			dst, reader := far(t)
			want := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
			stopped := make(chan error, 1)
			seen := 0
			go func() {
				_, err := flow.CopyWhile(dst, flow.FromTCP(src), func(p []byte) bool {
					seen += len(p)
					return !bytes.HasSuffix(p, []byte("stop"))
				})
				stopped <- err
			}()
			go func() { _, _ = client.Write(want) }()
			got := make([]byte, len(want))
			if _, err := io.ReadFull(reader, got); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%d bytes differ, %v", len(got), err)
			}
			if _, err := client.Write([]byte("stop")); err != nil {
				t.Fatal(err)
			}
			if err := <-stopped; !errors.Is(err, flow.ErrStopped) {
				t.Errorf("ended with %v", err)
			}
			if seen < 4 || seen > len(want)+4 {
				t.Errorf("%d bytes were shown", seen)
			}
			_ = dst.CloseWrite()
			if rest, err := io.ReadAll(reader); err != nil || len(rest) > 0 {
				t.Errorf("%q was passed on, %v", rest, err)
			}
		})
	}
}

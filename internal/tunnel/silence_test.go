package tunnel_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// silent runs a link whose tunnels can be resumed, as far as it knows, and says when it dialled.
func silent(t *testing.T, id string, onSilent func(*mux.Session)) (l *tunnel.Link, last func() (*muxtest.Link, *mux.Session), dialled func() int64) {
	t.Helper()
	var way atomic.Pointer[muxtest.Link]
	var peer atomic.Pointer[mux.Session]
	var dials atomic.Int64
	l = tunnel.NewLink(tunnel.LinkConfig{
		OnSilent: onSilent,
		Dial: func(_ context.Context, old *mux.Session) (*mux.Session, wire.HelloReply, error) {
			if dials.Add(1) > 1 && id != "" && !errors.Is(old.Why(), mux.ErrKeepAlive) && old.Why() != nil {
				t.Errorf("the old connection was given up before there is another: %v", old.Why())
			}
			m := muxtest.NewLink(muxtest.Config{})
			cfg := mux.Config{Initiator: true, ID: id}
			if id != "" {
				cfg.Resume = time.Minute
			}
			a, err := mux.New(m.A, cfg)
			if err != nil {
				return nil, wire.HelloReply{}, err
			}
			cfg.Initiator = false
			b, err := mux.New(m.B, cfg)
			if old := peer.Swap(b); old != nil {
				_ = old.Close()
			}
			way.Store(m)
			return a, wire.HelloReply{}, err
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		_ = peer.Load().Close()
	})
	if _, err := l.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	return l, func() (*muxtest.Link, *mux.Session) { return way.Load(), peer.Load() }, dials.Load
}

// ask sends something that is not answered before its time is over.
func ask(l *tunnel.Link) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	_, _ = l.Session().Ping(ctx)
}

func TestLinkSilent(t *testing.T) {
	t.Run("asked and silent: another connection", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l, last, dialled := silent(t, "x", nil)
			way, _ := last()
			way.BlackHole()
			ask(l)
			time.Sleep(4 * time.Second)
			if dialled() != 1 {
				t.Error("given up though there was time for an answer")
			}
			time.Sleep(2 * time.Second)
			if dialled() != 2 || l.Session() == nil {
				t.Errorf("dialled %d times, a tunnel: %v", dialled(), l.Session() != nil)
			}
		})
	})
	t.Run("no other connection can be made: given up", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			way := muxtest.NewLink(muxtest.Config{})
			cfg := mux.Config{Initiator: true, ID: "x", Resume: time.Minute}
			s, err := mux.New(way.A, cfg)
			if err != nil {
				t.Fatal(err)
			}
			cfg.Initiator = false
			peer, err := mux.New(way.B, cfg)
			if err != nil {
				t.Fatal(err)
			}
			var why []error // at each attempt after the first
			first := true
			l := tunnel.NewLink(tunnel.LinkConfig{Dial: func(context.Context, *mux.Session) (*mux.Session, wire.HelloReply, error) {
				if first {
					first = false
					return s, wire.HelloReply{}, nil
				}
				why = append(why, s.Why())
				return nil, wire.HelloReply{}, errors.New("no way")
			}})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- l.Run(ctx) }()
			if _, err := l.Wait(ctx); err != nil {
				t.Fatal(err)
			}
			way.BlackHole()
			ask(l)
			time.Sleep(7 * time.Second)
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
			if len(why) < 2 || why[0] != nil || why[1] == nil {
				t.Errorf("at the attempts: %v", why)
			}
			_ = peer.Close()
		})
	})
	t.Run("nothing was sent: not before the keepalive asks", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			_, last, dialled := silent(t, "x", nil)
			time.Sleep(5 * time.Second) // what both say in the beginning is over
			way, _ := last()
			way.BlackHole()
			time.Sleep(14 * time.Second)
			if dialled() != 1 {
				t.Error("a tunnel on which nothing moves was given up")
			}
			time.Sleep(8 * time.Second)
			if dialled() != 2 {
				t.Errorf("dialled %d times", dialled())
			}
		})
	})
	t.Run("slow: kept", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l, last, dialled := silent(t, "x", nil)
			way, _ := last()
			way.Delay(1400 * time.Millisecond)
			for range 30 {
				ask(l)
				time.Sleep(time.Second)
			}
			if dialled() != 1 {
				t.Errorf("dialled %d times", dialled())
			}
		})
	})
	t.Run("much is under way: it arrives first", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l, last, dialled := silent(t, "x", nil)
			way, peer := last()
			a, _ := muxtest.Stream(t, l.Session(), peer)
			way.Delay(4 * time.Second) // as long as 200 KiB take on the slowest way, about
			go func() { _, _ = a.Write(make([]byte, 200<<10)) }()
			time.Sleep(7 * time.Second)
			if dialled() != 1 {
				t.Errorf("dialled %d times", dialled())
			}
			way.Delay(0)
			_ = a.Close()
		})
	})
	t.Run("cannot be resumed: kept until the keepalive gives it up", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l, last, dialled := silent(t, "", nil)
			way, _ := last()
			way.BlackHole()
			ask(l)
			time.Sleep(30 * time.Second)
			if dialled() != 1 {
				t.Errorf("dialled %d times", dialled())
			}
		})
	})
	t.Run("somebody else decides", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var said atomic.Int64
			l, last, dialled := silent(t, "", func(*mux.Session) { said.Add(1) })
			way, _ := last()
			ask(l)
			time.Sleep(5 * time.Second)
			if said.Load() != 0 {
				t.Error("an end that answers is called silent")
			}
			way.BlackHole()
			ask(l)
			time.Sleep(3 * time.Second)
			if said.Load() == 0 || dialled() != 1 {
				t.Errorf("said %d times, dialled %d times", said.Load(), dialled())
			}
		})
	})
}

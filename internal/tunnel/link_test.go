package tunnel_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// far is the other end of a link's tunnels.
type far struct {
	mu    sync.Mutex
	links []*muxtest.Link
	peers []*mux.Session
	fail  error // of Dial
	dials []time.Time
}

func (f *far) dial(context.Context, *mux.Session) (*mux.Session, wire.HelloReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dials = append(f.dials, time.Now())
	if f.fail != nil {
		return nil, wire.HelloReply{}, f.fail
	}
	l := muxtest.NewLink(muxtest.Config{})
	a, err := mux.New(l.A, mux.Config{Initiator: true})
	if err != nil {
		return nil, wire.HelloReply{}, err
	}
	b, err := mux.New(l.B, mux.Config{})
	if err != nil {
		return nil, wire.HelloReply{}, err
	}
	f.links, f.peers = append(f.links, l), append(f.peers, b)
	return a, wire.HelloReply{Manager: "m"}, nil
}

func (f *far) set(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = err
}

func (f *far) last() (*muxtest.Link, *mux.Session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.links[len(f.links)-1], f.peers[len(f.peers)-1]
}

func (f *far) close() {
	for _, p := range f.peers {
		_ = p.Close()
	}
}

func TestLink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &far{}
		var events []string
		var mu sync.Mutex
		note := func(s string) { mu.Lock(); events = append(events, s); mu.Unlock() }
		l := tunnel.NewLink(tunnel.LinkConfig{
			Dial: f.dial,
			OnUp: func(_ *mux.Session, r wire.HelloReply) { note("up " + r.Manager) },
			OnDown: func(err error) {
				if err == nil {
					t.Error("down without a reason")
				}
				note("down")
			},
			OnRetry: func(error, time.Duration) { note("retry") },
			Serve: func(ctx context.Context, s *mux.Session) error {
				return tunnel.Serve(ctx, s, tunnel.Handlers{DNS: func(_ context.Context, m []byte) ([]byte, error) { return m, nil }})
			},
		})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		if l.Session() != nil {
			t.Error("a session before Run")
		}
		go func() { done <- l.Run(ctx) }()
		s1, err := l.Wait(ctx)
		if err != nil || s1 != l.Session() {
			t.Fatal(err)
		}
		_, peer := f.last()
		if b, err := tunnel.Query(ctx, peer, make([]byte, 12)); len(b) != 12 || err != nil {
			t.Error(err)
		}

		// Lost: down for as long as the dial fails, then up again by itself.
		f.set(errors.New("no route"))
		link, _ := f.last()
		link.Cut()
		synctest.Wait()
		if l.Session() != nil {
			t.Error("a session after the cut")
		}
		wctx, wcancel := context.WithTimeout(ctx, time.Second)
		if _, err := l.Wait(wctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		wcancel()
		time.Sleep(time.Minute)
		f.mu.Lock()
		n := len(f.dials)
		for i := 3; i < n; i++ {
			longest := 250 * time.Millisecond                  // for half a minute, as long as the session lives
			if f.dials[i-1].Sub(f.dials[2]) > 29*time.Second { // the loss was a little before
				longest = 2 * time.Second
			}
			if d := f.dials[i].Sub(f.dials[i-1]); d < 25*time.Millisecond || d > longest {
				t.Errorf("pause of %s at %s", d, f.dials[i].Sub(f.dials[2]))
			}
		}
		f.mu.Unlock()
		if n < 30*4+15 || n > 30*8+30 {
			t.Errorf("%d attempts in a minute", n)
		}
		f.set(nil)
		s2, err := l.Wait(ctx)
		if err != nil || s2 == s1 {
			t.Fatal(err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := l.Wait(context.Background()); err == nil {
			t.Error("Wait on a link that has ended")
		}
		<-s2.Done()
		mu.Lock()
		defer mu.Unlock()
		if events[0] != "up m" || events[1] != "down" || events[2] != "retry" || events[len(events)-2] != "up m" || events[len(events)-1] != "down" {
			t.Error(events)
		}
		f.close()
	})
}

func TestLinkPermanent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, code := range []wire.Code{wire.CodeDenied, wire.CodeGone, wire.CodeVersion} {
			f := &far{fail: &mux.RejectError{Code: code, Msg: "no"}}
			l := tunnel.NewLink(tunnel.LinkConfig{Dial: f.dial})
			var rej *mux.RejectError
			if err := l.Run(context.Background()); !errors.As(err, &rej) || rej.Code != code {
				t.Error(err)
			}
			if _, err := l.Wait(context.Background()); !errors.As(err, &rej) {
				t.Error(err)
			}
		}
		// Told while up.
		f := &far{}
		l := tunnel.NewLink(tunnel.LinkConfig{Dial: f.dial})
		done := make(chan error, 1)
		go func() { done <- l.Run(context.Background()) }()
		if _, err := l.Wait(context.Background()); err != nil {
			t.Fatal(err)
		}
		_, peer := f.last()
		_ = peer.CloseWith(wire.CodeGone, "revoked")
		var away *mux.GoAwayError
		if err := <-done; !errors.As(err, &away) || away.Msg != "revoked" {
			t.Error(err)
		}
		if len(f.dials) != 1 {
			t.Errorf("%d dials", len(f.dials))
		}
	})
}

// TestLinkServeFails: an error of Serve ends the tunnel, and the next one is dialled.
func TestLinkServeFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &far{}
		n := 0
		ctx, cancel := context.WithCancel(context.Background())
		l := tunnel.NewLink(tunnel.LinkConfig{Dial: f.dial, Serve: func(ctx context.Context, _ *mux.Session) error {
			if n++; n == 1 {
				return errors.New("boom")
			}
			cancel()
			<-ctx.Done()
			return nil
		}})
		if err := l.Run(ctx); err != nil {
			t.Error(err)
		}
		if len(f.dials) != 2 {
			t.Errorf("%d dials", len(f.dials))
		}
		f.close()
	})
}

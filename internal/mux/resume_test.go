package mux_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/wire"
)

const grace = 30 * time.Second

// resumable are both ends of a session that outlives its links.
func resumable(t testing.TB, link muxtest.Config) (pair, *muxtest.Link) {
	t.Helper()
	a, b, l := muxtest.Pair(t, link, mux.Config{Resume: grace, KeepAlive: -1}, mux.Config{Resume: grace, KeepAlive: -1})
	return pair{a: a, b: b}, l
}

// rejoin gives both ends another link, as Hello and its answer do.
func rejoin(t testing.TB, p pair, link muxtest.Config) *muxtest.Link {
	t.Helper()
	l := muxtest.NewLink(link)
	ha, err := p.a.Detach()
	if err != nil {
		t.Fatal(err)
	}
	hb, err := p.b.Detach()
	if err != nil {
		t.Fatal(err)
	}
	if !hb.Keeps(ha.Received()) || !ha.Keeps(hb.Received()) {
		t.Fatalf("bytes are missing: received %d and %d", ha.Received(), hb.Received())
	}
	if err := hb.Attach(l.B, ha.Received()); err != nil {
		t.Fatal(err)
	}
	if err := ha.Attach(l.A, hb.Received()); err != nil {
		t.Fatal(err)
	}
	return l
}

// TestResume: a stream and a call that are open when the link is cut go on over the next one.
func TestResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, l := resumable(t, muxtest.Config{Delay: time.Millisecond})
		serve(t, p.b, echo)
		st := open(t, p.a)
		if _, err := st.Write([]byte("before")); err != nil {
			t.Fatal(err)
		}
		l.Cut()
		synctest.Wait()
		select {
		case <-p.a.Down():
		default:
			t.Fatal("the loss was not told")
		}
		if !errors.Is(p.a.Why(), muxtest.ErrCut) || p.a.Err() != nil || p.b.Err() != nil {
			t.Fatal(p.a.Why(), p.a.Err(), p.b.Err())
		}
		if _, err := st.Write([]byte(" meanwhile")); err != nil {
			t.Fatal(err)
		}
		opened := make(chan error, 1)
		go func() {
			st, _, err := p.a.Open(context.Background(), []byte{1})
			if err == nil {
				err = st.Close()
			}
			opened <- err
		}()
		time.Sleep(20 * time.Second)
		l = rejoin(t, p, muxtest.Config{})
		if _, err := st.Write([]byte(" after")); err != nil {
			t.Fatal(err)
		}
		_ = st.CloseWrite()
		got, err := io.ReadAll(st)
		if string(got) != "before meanwhile after" || err != nil {
			t.Errorf("%q %v", got, err)
		}
		if err := <-opened; err != nil {
			t.Error(err)
		}
		if p.a.Why() != nil {
			t.Error(p.a.Why())
		}
		_ = p.a.Close() // in order: the other end is told
		<-p.b.Done()
		var away *mux.GoAwayError
		if !errors.As(p.b.Err(), &away) {
			t.Error(p.b.Err())
		}
		_ = l
	})
}

// TestResumeTooLate: without another link the session ends after the time, and its streams with it.
func TestResumeTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, l := resumable(t, muxtest.Config{})
		serve(t, p.b, echo)
		st := open(t, p.a)
		l.Cut()
		start := time.Now()
		if _, err := st.Read(make([]byte, 1)); !errors.Is(err, mux.ErrSession) || !errors.Is(err, muxtest.ErrCut) {
			t.Error(err)
		}
		if took := time.Since(start); took != grace {
			t.Errorf("after %s", took)
		}
		if _, err := p.a.Detach(); !errors.Is(err, mux.ErrNotResumable) {
			t.Error(err)
		}
	})
}

// TestResumeClosedMeanwhile: a session without link ends at once when it is closed.
func TestResumeClosedMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, l := resumable(t, muxtest.Config{})
		l.Cut()
		synctest.Wait()
		start := time.Now()
		_ = p.a.Close()
		_ = p.b.Close()
		if took := time.Since(start); took != 0 {
			t.Errorf("took %s", took)
		}
	})
}

// TestResumeReplaced: a handover is void as soon as another was made: nobody can push himself between.
func TestResumeReplaced(t *testing.T) {
	p, _ := resumable(t, muxtest.Config{})
	first, err := p.a.Detach()
	if err != nil {
		t.Fatal(err)
	}
	rejoin(t, p, muxtest.Config{})
	l := muxtest.NewLink(muxtest.Config{})
	if err := first.Attach(l.A, 0); !errors.Is(err, mux.ErrNotResumable) {
		t.Error(err)
	}
	h, err := p.a.Detach()
	if err != nil {
		t.Fatal(err)
	}
	for _, peer := range []uint64{1 << 40, ^uint64(0)} {
		if h.Keeps(peer) {
			t.Errorf("a peer that has received %d bytes", peer)
		}
		if err := h.Attach(l.A, peer); !errors.Is(err, mux.ErrNotResumable) {
			t.Error(err)
		}
	}
	plain := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	if _, err := plain.a.Detach(); !errors.Is(err, mux.ErrNotResumable) {
		t.Error(err)
	}
}

// TestResumeUnderLoad cuts the link again and again, at random places, under traffic in both directions: every byte arrives
// once and in order.
func TestResumeUnderLoad(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	link := muxtest.Config{Buffer: 100_000, Chunk: 3000}
	p, l := resumable(t, link)
	serve(t, p.b, echo)
	const streams, size = 4, 8 << 20
	var wg sync.WaitGroup
	for i := range streams {
		wg.Go(func() { echoOnce(t, p.a, size, int64(i)) })
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	cuts := 0
	for {
		upTo := int64(rnd.IntN(3 << 20))
		for {
			ab, ba := l.Bytes()
			if ab+ba >= upTo {
				break
			}
			select {
			case <-done:
			case <-time.After(100 * time.Microsecond):
				continue
			}
			break
		}
		select {
		case <-done:
			if cuts < 5 {
				t.Errorf("only %d cuts", cuts)
			}
			t.Logf("%d cuts", cuts)
			return
		default:
		}
		switch rnd.IntN(3) {
		case 0:
			l.Cut()
		case 1:
			l.BlackHole() // one end or both find out by being told (Detach)
		case 2:
			_ = l.A.Close()
		}
		cuts++
		l = rejoin(t, p, link)
	}
}

// TestResumeBound: what a session keeps for a peer that acknowledges nothing is bounded; writers wait.
func TestResumeBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const resend = 1 << 20
		cfg := mux.Config{Resume: grace, Resend: resend, KeepAlive: -1}
		a, b, l := muxtest.Pair(t, muxtest.Config{}, cfg, cfg)
		p := pair{a: a, b: b}
		sa, sb := accepted(t, p)
		l.Cut()
		synctest.Wait()
		data := make([]byte, 3<<20)
		for i := range data {
			data[i] = byte(i >> 3)
		}
		wrote := make(chan error, 1)
		go func() {
			_, err := sa.Write(data)
			_ = sa.CloseWrite()
			wrote <- err
		}()
		synctest.Wait()
		if kept := a.Kept(); kept > resend+2*wire.MaxFrame {
			t.Errorf("%d bytes are kept", kept)
		}
		rejoin(t, p, muxtest.Config{})
		got, err := io.ReadAll(sb)
		if !bytes.Equal(got, data) || err != nil {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if err := <-wrote; err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if kept := a.Kept(); kept > resend/8+wire.MaxFrame {
			t.Errorf("%d bytes are kept though all were read", kept)
		}
	})
}

// TestAckTellsIdle: with the next ping the peer is told of the rest, so that an idle session keeps nothing.
func TestAckTellsIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := mux.Config{Resume: grace}
		a, b, _ := muxtest.Pair(t, muxtest.Config{}, cfg, cfg)
		sa, sb := accepted(t, pair{a: a, b: b})
		go func() { _, _ = sa.Write(make([]byte, 100_000)) }()
		_, _ = io.ReadFull(sb, make([]byte, 100_000))
		time.Sleep(41 * time.Second)
		if kept := a.Kept(); kept > 200 {
			t.Errorf("%d bytes are kept", kept)
		}
	})
}

// TestSilentPeerIsWaitedFor: silence costs a resumable session its connection, not its life.
func TestSilentPeerIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := mux.Config{Resume: grace}
		a, b, l := muxtest.Pair(t, muxtest.Config{}, cfg, cfg)
		l.BlackHole()
		<-a.Down()
		<-b.Down()
		if !errors.Is(a.Why(), mux.ErrKeepAlive) || a.Err() != nil {
			t.Error(a.Why(), a.Err())
		}
		rejoin(t, pair{a: a, b: b}, muxtest.Config{})
		if _, err := a.Ping(t.Context()); err != nil {
			t.Error(err)
		}
		time.Sleep(5 * time.Minute)
		if a.Err() != nil || a.Why() != nil {
			t.Error(a.Err(), a.Why())
		}
	})
}

// TestAckViolations: a peer must not acknowledge what it cannot have received, nor at all what nobody keeps.
func TestAckViolations(t *testing.T) {
	for _, tt := range []struct {
		name string
		cfg  mux.Config
		n    uint64
		bad  bool
	}{
		{"nothing yet", mux.Config{Resume: grace, KeepAlive: -1}, 0, false},
		{"more than was sent", mux.Config{Resume: grace, KeepAlive: -1}, 1, true},
		{"not resumable", mux.Config{KeepAlive: -1}, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newRawPeer(t, tt.cfg)
			p.send(wire.AppendAck(nil, tt.n), frame(wire.TypePing, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1))
			h, _ := p.recv()
			if bad := h.Type == wire.TypeGoAway; bad != tt.bad {
				t.Errorf("answered by %s", h.Type)
			}
		})
	}
}

// TestWaitEnds: whoever waits for his turn while the session has no link is not kept by it when his stream is reset, or closed, or his deadline is set
// and passes.
func TestWaitEnds(t *testing.T) {
	for name, row := range map[string]struct {
		end  func(*mux.Stream)
		want error
	}{
		"reset":    {func(st *mux.Stream) { st.Reset() }, net.ErrClosed},
		"closed":   {func(st *mux.Stream) { _ = st.Close() }, net.ErrClosed},
		"deadline": {func(st *mux.Stream) { _ = st.SetWriteDeadline(time.Now().Add(time.Second)) }, os.ErrDeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cfg := mux.Config{Resume: grace, Resend: 1 << 20, KeepAlive: -1}
				a, b, l := muxtest.Pair(t, muxtest.Config{Delay: time.Millisecond}, cfg, cfg)
				p := pair{a: a, b: b}
				serve(t, p.b, func(r *mux.Request) { _, _ = r.Accept(nil) })
				var sts []*mux.Stream
				for range 40 {
					sts = append(sts, open(t, p.a))
				}
				l.Cut()
				synctest.Wait()
				results := make(chan error, len(sts))
				for _, st := range sts { // more than the queue and what is kept hold
					go func() {
						_, err := st.Write(make([]byte, 60<<10))
						results <- err
					}()
				}
				synctest.Wait()
				written := len(results)
				if written == len(sts) {
					t.Fatal("nobody had to wait")
				}
				for range written {
					<-results
				}
				for _, st := range sts {
					row.end(st)
				}
				time.Sleep(2 * time.Second) // less than the session's grace
				for range len(sts) - written {
					select {
					case err := <-results:
						if !errors.Is(err, row.want) {
							t.Errorf("%v, want %v", err, row.want)
						}
					default:
						t.Fatal("somebody still waits")
					}
				}
				rejoin(t, p, muxtest.Config{Delay: time.Millisecond}) // and the others have lost nothing
				if st := open(t, p.a); st == nil {
					t.Error("no stream after it")
				}
			})
		})
	}
}

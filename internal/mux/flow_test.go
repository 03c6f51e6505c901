package mux_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/wire"
)

// TestSlowReader: a stream that nobody reads blocks neither the others nor the session.
func TestSlowReader(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	stuckA, stuckB := accepted(t, p)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			if _, err := stuckA.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	})
	waitFor(t, func() bool { return usedOf(p.b) >= 256<<10-16*wire.HeaderLen }) // headers cost credit too, and are not stored
	serve(t, p.b, echo)
	echoOnce(t, p.a, 20<<20, 1)
	if _, err := p.a.Ping(context.Background()); err != nil {
		t.Error(err)
	}
	if w := stuckB.Window(); w > 256<<10 {
		t.Errorf("the window of a stream that nobody reads grew to %d", w)
	}
	stuckB.Reset()
	wg.Wait()
}

// TestBudget fills as many streams as there can be, with nobody reading, and measures.
func TestBudget(t *testing.T) {
	if testing.Short() {
		t.Skip("allocates")
	}
	const budget = 4 << 20
	cfg := mux.Config{Budget: budget, MaxStreams: 500}
	p := newPair(t, muxtest.Config{}, mux.Config{MaxStreams: 500}, cfg)
	var mu sync.Mutex
	var held []*mux.Stream
	serve(t, p.b, func(r *mux.Request) {
		st, err := r.Accept(nil)
		if err != nil {
			t.Error(err)
			return
		}
		mu.Lock()
		held = append(held, st)
		mu.Unlock()
	})
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var writers sync.WaitGroup
	frames, zeros := []int{1, 100, 1400, 5000, 65_528}, make([]byte, 65_528)
	each := []int{1_000, 20_000, 50_000, 100_000, 200_000} // each more than its stream's share
	total := int64(0)
	for i := range 500 {
		total += int64(each[i%len(each)])
		st := open(t, p.a)
		writers.Go(func() {
			buf := zeros[:frames[i%len(frames)]]
			for sent := 0; sent < each[i%len(each)]; {
				n, err := st.Write(buf[:min(len(buf), each[i%len(each)]-sent)])
				sent += n
				if err != nil {
					t.Error(err)
					return
				}
			}
			_ = st.CloseWrite()
		})
	}
	// Until nothing moves any more.
	last := uint64(0)
	waitFor(t, func() bool {
		ab, _ := p.link.Bytes()
		still := uint64(ab) == last
		last = uint64(ab)
		time.Sleep(100 * time.Millisecond)
		return still
	})
	windows, used := p.b.Held()
	runtime.GC()
	runtime.ReadMemStats(&after)
	heap := int(after.HeapInuse) - int(before.HeapInuse)
	t.Logf("windows %d KiB, used %d KiB, heap %d KiB for a budget of %d KiB", windows>>10, used>>10, heap>>10, budget>>10)
	if windows > budget || used > windows {
		t.Errorf("windows %d, used %d, budget %d", windows, used, budget)
	}
	// Everything can still be read, and everything is given back.
	var readers sync.WaitGroup
	var read atomic.Int64
	mu.Lock()
	for _, st := range held {
		readers.Go(func() {
			n, err := io.Copy(io.Discard, st)
			read.Add(n)
			if err != nil {
				t.Errorf("read %d bytes, %v", n, err)
			}
			_ = st.Close()
		})
	}
	mu.Unlock()
	readers.Wait()
	writers.Wait()
	if read.Load() != total {
		t.Errorf("read %d bytes of %d", read.Load(), total)
	}
	waitFor(t, func() bool { free, pool := p.b.Free(); return free == pool && p.b.Live() == 0 })
}

// TestBudgetReturns: however streams end, their window is given back at both ends.
func TestBudgetReturns(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	serve(t, p.b, func(r *mux.Request) {
		switch r.Header()[0] {
		case 1:
			echo(r)
		case 2:
			_ = r.Reject(wire.CodeDenied, "")
		case 3:
			_ = r.Reply(make([]byte, 200_000))
		case 4:
			if st, err := r.Accept(nil); err == nil {
				_, _ = st.Write(make([]byte, 100))
				st.Reset()
			}
		case 5:
			<-r.Context().Done()
			_ = r.Reject(wire.CodeCanceled, "")
		case 6:
			if st, err := r.Accept(nil); err == nil {
				_, _ = st.Write(make([]byte, 100_000))
				_ = st.Close()
			}
		}
	})
	var wg sync.WaitGroup
	for i := range 200 {
		for how := byte(1); how <= 6; how++ {
			wg.Go(func() {
				ctx := context.Background()
				if how == 5 {
					c, cancel := context.WithTimeout(ctx, time.Duration(i%5)*time.Millisecond)
					defer cancel()
					ctx = c
				}
				if how == 3 {
					if b, err := p.a.Call(ctx, []byte{how}); len(b) != 200_000 || err != nil {
						t.Errorf("call: %d bytes, %v", len(b), err)
					}
					return
				}
				st, _, err := p.a.Open(ctx, []byte{how})
				if err != nil {
					return
				}
				_, _ = st.Write(make([]byte, 1000))
				switch i % 3 {
				case 0:
					_ = st.Close()
				case 1:
					st.Reset()
				case 2:
					_ = st.CloseWrite()
					_, _ = io.Copy(io.Discard, st)
					_ = st.Close()
				}
			})
		}
	}
	wg.Wait()
	for _, s := range []*mux.Session{p.a, p.b} {
		waitFor(t, func() bool { free, pool := s.Free(); return free == pool && s.Live() == 0 && s.NumStreams() == 0 })
	}
}

// TestWindowGrows: on a long path the window follows the path, and a reader that stops does not get more.
func TestWindowGrows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, muxtest.Config{Delay: 15 * time.Millisecond, Buffer: 8 << 20}, mux.Config{}, mux.Config{})
		a, b := accepted(t, p)
		const size = 100 << 20
		start := time.Now()
		go func() {
			_, _ = a.Write(make([]byte, size))
			_ = a.CloseWrite()
		}()
		n, err := io.Copy(io.Discard, b)
		took := time.Since(start)
		if n != size || err != nil {
			t.Fatal(n, err)
		}
		// 256 KiB a round trip of 30 ms would take 12 s; 4 MiB take 0.8 s.
		t.Logf("100 MiB with 30 ms: %s, window %d KiB", took, b.Window()>>10)
		if took > 1500*time.Millisecond || b.Window() != mux.MinWindow && b.Window() < 2<<20 {
			t.Errorf("took %s with a window of %d", took, b.Window())
		}
		_ = a.Close()
		_ = b.Close()
		_ = p.a.Close()
		_ = p.b.Close()
	})
}

// TestWindowFollowsReader: a stalled sender gets a larger window if the reader drains the buffer faster than the path fills it,
// however late the reader begins; a reader that is slower than the path leaves the window as it is.
func TestWindowFollowsReader(t *testing.T) {
	for _, test := range []struct {
		name  string
		pause time.Duration // before each piece that is read
		grows bool
	}{
		{"late but fast", 0, true},
		{"slow", 10 * time.Millisecond, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPair(t, muxtest.Config{Delay: time.Millisecond, Buffer: 8 << 20}, mux.Config{}, mux.Config{})
				a, b := accepted(t, p)
				go func() {
					_, _ = a.Write(make([]byte, 4<<20))
				}()
				time.Sleep(time.Second) // a whole window and the WANT are here before anything is read
				before, peak := b.Window(), 0
				buf := make([]byte, 32<<10)
				for range 64 {
					time.Sleep(test.pause)
					if _, err := io.ReadFull(b, buf); err != nil {
						t.Fatal(err)
					}
					peak = max(peak, b.Window())
				}
				if grew := peak > before; grew != test.grows {
					t.Errorf("the window went from %d to %d", before, peak)
				}
				_ = a.Close()
				_ = b.Close()
				_ = p.a.Close()
				_ = p.b.Close()
			})
		})
	}
}

// TestCreditMoves: idle streams give back what they hold when others need it.
func TestCreditMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := mux.Config{Budget: 8 << 20, MaxStreams: 1000}
		p := newPair(t, muxtest.Config{Delay: 5 * time.Millisecond, Buffer: 8 << 20}, cfg, cfg)
		var idle []*mux.Stream
		for range 500 { // more than the pool holds at their first windows
			a, b := accepted(t, p)
			idle = append(idle, a, b)
		}
		time.Sleep(time.Second)
		free, pool := p.b.Free()
		t.Logf("500 idle streams leave %d of %d KiB free", free>>10, pool>>10)
		if free < pool/4 {
			t.Errorf("%d of %d free", free, pool)
		}
		a, b := accepted(t, p)
		start := time.Now()
		go func() {
			_, _ = a.Write(make([]byte, 20<<20))
			_ = a.CloseWrite()
		}()
		if n, err := io.Copy(io.Discard, b); n != 20<<20 || err != nil {
			t.Fatal(n, err)
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("20 MiB beside idle streams took %s", took)
		}
		// And they still work.
		for i := 0; i < len(idle); i += 2 {
			go func() {
				_, _ = idle[i].Write(make([]byte, 30_000))
				_ = idle[i].CloseWrite()
			}()
			if n, err := io.Copy(io.Discard, idle[i+1]); n != 30_000 || err != nil {
				t.Fatal(n, err)
			}
			_ = idle[i].Close()
			_ = idle[i+1].Close()
		}
		_ = a.Close()
		_ = b.Close()
		_ = p.a.Close()
		_ = p.b.Close()
	})
}

// TestLargeMessageSmallWindow: a message larger than the window gets through once there is room.
func TestLargeMessageSmallWindow(t *testing.T) {
	for _, size := range []int{4000, 4088, 4089, 5000, 65_528} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{InitialWindow: mux.MinWindow})
			a, b := accepted(t, p)
			go func() {
				for range 3 {
					if err := a.WritePacket(make([]byte, size)); err != nil {
						t.Error(err)
					}
				}
			}()
			buf := make([]byte, mux.MaxPacket)
			for range 3 {
				if n, err := b.ReadPacket(buf); n != size || err != nil {
					t.Errorf("got %d, %v", n, err)
				}
			}
			_ = a.Close()
			_ = b.Close()
		})
	}
}

func TestKeepAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, muxtest.Config{Delay: time.Millisecond}, mux.Config{}, mux.Config{})
		time.Sleep(10 * time.Minute)
		if p.a.Err() != nil || p.b.Err() != nil {
			t.Fatal("an idle session ended", p.a.Err(), p.b.Err())
		}
		ab, _ := p.link.Bytes()
		if ab < 29*32 || ab > 31*32 { // a ping and a pong of 16 bytes every 20 s
			t.Errorf("%d bytes in 10 minutes of keep-alive", ab)
		}
		a, _ := accepted(t, p)
		p.link.BlackHole()
		start := time.Now()
		_, err := a.Read(make([]byte, 1))
		if !errors.Is(err, mux.ErrKeepAlive) || !errors.Is(err, mux.ErrSession) {
			t.Errorf("read: %v", err)
		}
		if took := time.Since(start); took < 40*time.Second || took > 80*time.Second {
			t.Errorf("noticed after %s", took)
		}
		<-p.a.Done()
		<-p.b.Done()
		_ = p.a.Close()
		_ = p.b.Close()
	})
}

func TestDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, muxtest.Config{Buffer: 128 << 10}, mux.Config{}, mux.Config{}) // less than the credit of a stream
		a, b := accepted(t, p)
		other, otherEnd := accepted(t, p)
		start := time.Now()
		_ = a.SetReadDeadline(start.Add(time.Second))
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Second {
			t.Error(err, time.Since(start))
		}
		_ = a.SetReadDeadline(time.Time{})
		_, _ = b.Write([]byte("x"))
		if n, err := a.Read(make([]byte, 1)); n != 1 || err != nil {
			t.Error(n, err)
		}
		// A write that lacks credit.
		_ = a.SetWriteDeadline(time.Now().Add(time.Second))
		n, err := a.Write(make([]byte, 10<<20))
		if !errors.Is(err, os.ErrDeadlineExceeded) || n == 0 {
			t.Error(n, err)
		}
		// The rest of the session does not mind.
		_ = a.SetDeadline(time.Now())
		_, _ = other.Write([]byte("y"))
		if n, err := otherEnd.Read(make([]byte, 1)); n != 1 || err != nil {
			t.Error(n, err)
		}
		// A transport that is stuck: the writer behind gives up, the one that writes does not.
		p.link.Stall(true)
		go func() { _, _ = otherEnd.Write(make([]byte, 1<<20)) }()
		_ = b.SetWriteDeadline(time.Now().Add(time.Second))
		go func() { _, _ = other.Write(make([]byte, 256<<10)) }()
		synctest.Wait()
		_, _ = b.Write(make([]byte, 65_000)) // fills the queue
		_, err = b.Write(make([]byte, 65_000))
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
		p.link.Stall(false)
		p.link.Cut()
		_ = p.a.Close()
		_ = p.b.Close()
	})
}

// TestCloseFlushes: what was written before Close arrives.
func TestCloseFlushes(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	a, b := accepted(t, p)
	got := make(chan int64, 1)
	go func() {
		n, _ := io.Copy(io.Discard, b)
		got <- n
	}()
	_, _ = a.Write(make([]byte, 200_000))
	if err := p.a.CloseWith(wire.CodeGone, "bye"); err != nil {
		t.Error(err)
	}
	if n := <-got; n != 200_000 {
		t.Errorf("%d bytes arrived", n)
	}
	<-p.b.Done()
	var away *mux.GoAwayError
	if !errors.As(p.b.Err(), &away) || away.Code != wire.CodeGone || away.Msg != "bye" {
		t.Error(p.b.Err())
	}
}

// TestCloseStuck: closing a session whose transport is stuck takes a second, no longer.
func TestCloseStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
		a, _ := accepted(t, p)
		p.link.Stall(true)
		failed := make(chan error, 1)
		go func() { _, err := a.Write(make([]byte, 1<<20)); failed <- err }()
		synctest.Wait()
		start := time.Now()
		_ = a.Close() // does not block behind the Write
		_ = p.a.Close()
		if took := time.Since(start); took > time.Second {
			t.Errorf("close took %s", took)
		}
		if err := <-failed; err == nil {
			t.Error("a write to nowhere succeeded")
		}
		p.link.Cut()
		_ = p.b.Close()
	})
}

func TestConfig(t *testing.T) {
	link := muxtest.NewLink(muxtest.Config{})
	for _, cfg := range []mux.Config{
		{Window: 1}, {Budget: 1}, {MaxStreams: 1 << 20}, {MaxStreams: -1}, {InitialWindow: 5 << 20}, {Backlog: -1}, {KeepAliveMisses: -1}, {Linger: -1}, {Window: 1 << 30},
	} {
		if _, err := mux.New(link.A, cfg); err == nil {
			t.Errorf("%+v was accepted", cfg)
		}
	}
}

// trickle takes n bytes at a time, then nothing until the blocking Write.
type trickle struct {
	mu   sync.Mutex
	room int
	got  []byte
	fail error
	slow int // bytes that came by Write
}

func (d *trickle) TryWrite(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fail != nil {
		return 0, d.fail
	}
	n := min(len(p), d.room)
	d.room -= n
	d.got = append(d.got, p[:n]...)
	return n, nil
}

func (d *trickle) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.got = append(d.got, p...)
	d.slow += len(p)
	d.room += 100
	return len(p), d.fail
}

// pour is WriteTo by WriteSome: on goroutines that are there while there is something to do.
func pour(st *mux.Stream, w io.Writer, done chan<- error) {
	if more, err := st.WriteSome(w, func() { go pour(st, w, done) }); !more {
		done <- err
	}
}

// TestDirect: what goes past the buffer keeps its order with what goes through it.
func TestDirect(t *testing.T) {
	for name, copyAll := range map[string]func(*mux.Stream, io.Writer, chan<- error){
		"WriteTo":   func(st *mux.Stream, w io.Writer, done chan<- error) { _, err := st.WriteTo(w); done <- err },
		"WriteSome": pour,
	} {
		t.Run(name, func(t *testing.T) { testDirect(t, copyAll) })
	}
}

func testDirect(t *testing.T, copyAll func(*mux.Stream, io.Writer, chan<- error)) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	a, b := accepted(t, p)
	d := &trickle{}
	done := make(chan error, 1)
	go copyAll(b, d, done)
	var want []byte
	for i := range 20_000 {
		msg := fmt.Appendf(nil, "message %d;", i)
		if i%1000 == 999 {
			msg = append(msg, make([]byte, 20_000)...)
		}
		want = append(want, msg...)
		if _, err := a.Write(msg); err != nil {
			t.Fatal(err)
		}
	}
	_ = a.CloseWrite()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if string(d.got) != string(want) {
		t.Error("the order changed")
	}
	if d.slow == 0 || d.slow == len(want) {
		t.Errorf("%d of %d bytes by Write: only one way was used", d.slow, len(want))
	}
	_ = b.Close()

	a, b = accepted(t, p)
	d = &trickle{fail: errors.New("broken")}
	go copyAll(b, d, done)
	_, _ = a.Write([]byte("x"))
	if err := <-done; !errors.Is(err, d.fail) {
		t.Error(err)
	}
	b.Reset()

	for name, end := range map[string]struct { // each is told to whoever waits
		end  func()
		want error
	}{
		"reset by the peer": {func() { a.Reset() }, syscall.ECONNRESET},
		"closed here":       {func() { _ = b.Close() }, net.ErrClosed},
	} {
		a, b = accepted(t, p)
		go copyAll(b, &trickle{}, done)
		end.end()
		if err := <-done; !errors.Is(err, end.want) {
			t.Errorf("%s: %v", name, err)
		}
		b.Reset()
	}
	_, b = accepted(t, p)
	go copyAll(b, &trickle{}, done)
	_ = p.a.Close()
	if err := <-done; err == nil {
		t.Error("nothing was said of the session's end")
	}
}

// TestTightBudget: with next to no memory everything still gets through, bytes and messages, both ways at once.
func TestTightBudget(t *testing.T) {
	cfg := mux.Config{Budget: 1 << 20, MaxStreams: 128, Window: 128 << 10, InitialWindow: 8 << 10}
	p := newPair(t, muxtest.Config{Chunk: 3000, Delay: time.Millisecond}, cfg, cfg)
	packets := func(r *mux.Request) {
		st, err := r.Accept(nil)
		if err != nil {
			t.Error(err)
			return
		}
		buf := make([]byte, mux.MaxPacket)
		for {
			n, err := st.ReadPacket(buf)
			if err != nil {
				break
			}
			if err := st.WritePacket(buf[:n]); err != nil {
				t.Error(err)
			}
		}
		_ = st.Close()
	}
	handler := func(r *mux.Request) {
		if r.Header()[0] == 'p' {
			packets(r)
		} else {
			echo(r)
		}
	}
	serve(t, p.a, handler)
	serve(t, p.b, handler)
	var wg sync.WaitGroup
	for i := range 100 {
		s := p.a
		if i%2 == 1 {
			s = p.b
		}
		if i%5 != 0 {
			wg.Go(func() { echoOnce(t, s, 30_000+1000*i, int64(i)) })
			continue
		}
		wg.Go(func() {
			st, _, err := s.Open(context.Background(), []byte{'p'})
			if err != nil {
				t.Error(err)
				return
			}
			buf := make([]byte, mux.MaxPacket)
			for _, n := range []int{0, 100, 10_000, 65_528, 1} {
				if err := st.WritePacket(buf[:n]); err != nil {
					t.Error(err)
				}
				if got, err := st.ReadPacket(buf); got != n || err != nil {
					t.Errorf("got %d, %v, want %d", got, err, n)
				}
			}
			_ = st.Close()
		})
	}
	wg.Wait()
	for _, s := range []*mux.Session{p.a, p.b} {
		waitFor(t, func() bool { free, pool := s.Free(); return free == pool && s.Live() == 0 })
	}
}

// TestOpenOnSilentTransport: when a peer goes silent every Open still ends with its context, however full the transport's buffers are.
func TestOpenOnSilentTransport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPair(t, muxtest.Config{}, mux.Config{KeepAlive: -1}, mux.Config{KeepAlive: -1})
		if _, err := p.a.Ping(context.Background()); err != nil {
			t.Fatal(err)
		}
		p.link.Stall(true)
		for round := range 10 { // 1 MB; the link holds 256 KiB
			var wg sync.WaitGroup
			for range 100 {
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(context.Background(), time.Second)
					defer cancel()
					start := time.Now()
					_, _, err := p.a.Open(ctx, make([]byte, 1000))
					if took := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || took > time.Second {
						t.Errorf("round %d: %v after %s", round, err, took)
					}
				})
			}
			wg.Wait()
		}
		p.link.Cut()
		_ = p.a.Close()
		_ = p.b.Close()
	})
}

// TestTenThousandStreams: as many idle flows as one laptop may have leave the session its budget, and a later one its speed.
func TestTenThousandStreams(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{KeepAlive: -1}, mux.Config{KeepAlive: -1})
	for range 10_000 {
		a, b := accepted(t, p)
		if _, err := a.Write(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(b, make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
	}
	windows, used := p.b.Held()
	if n := p.b.NumStreams(); n != 10_000 || windows > 32<<20 || used > windows {
		t.Errorf("%d streams hold %d bytes, %d of them credited or stored", n, windows, used)
	}
	a, b := accepted(t, p)
	p.link.Delay(5 * time.Millisecond) // the window, and not a busy reader, is what holds it up
	const size = 64 << 20
	go func() {
		_, _ = a.Write(make([]byte, size))
		_ = a.CloseWrite()
	}()
	window, got := 0, 0
	buf := make([]byte, 64<<10)
	for {
		n, err := b.Read(buf)
		got, window = got+n, max(window, b.Window())
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if got != size || window < 256<<10 {
		t.Errorf("%d bytes came, with a window of at most %d beside the idle streams", got, window)
	}
}

// narrow is a connection whose reader gets so many bytes a second: what is more waits before it, as in the sockets of a path.
type narrow struct {
	net.Conn
	rate atomic.Int64
}

func (c *narrow) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p[:min(len(p), 16<<10)]) // a record of TLS
	time.Sleep(time.Duration(n) * time.Second / time.Duration(c.rate.Load()))
	return n, err
}

// newNarrow joins two sessions by a path with a delay one way, that carries so many bytes a second from the first to the second.
func newNarrow(t *testing.T, delay time.Duration, rate int64) (pair, *narrow) {
	t.Helper()
	link := muxtest.NewLink(muxtest.Config{Delay: delay, Buffer: 64 << 20})
	sa, err := mux.New(link.A, mux.Config{Initiator: true})
	if err != nil {
		t.Fatal(err)
	}
	conn := &narrow{Conn: link.B}
	conn.rate.Store(rate)
	sb, err := mux.New(conn, mux.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return pair{sa, sb, link}, conn
}

// stream writes without end, a piece at a time with pauses, and returns what is read of it.
func stream(a, b *mux.Stream, piece int, pause time.Duration) *atomic.Int64 {
	go func() {
		for {
			if _, err := a.Write(make([]byte, piece)); err != nil {
				return
			}
			time.Sleep(pause)
		}
	}()
	var got atomic.Int64
	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, err := b.Read(buf)
			got.Add(int64(n))
			if err != nil {
				return
			}
		}
	}()
	return &got
}

// TestWindowFollowsPath: a flow fills the path, and no more of it than that waits before everybody's small frames.
func TestWindowFollowsPath(t *testing.T) {
	type path struct {
		delay time.Duration // one way
		rate  int64         // bytes a second
	}
	for _, test := range []struct {
		name        string
		first, then path          // when the flow begins, and two seconds later
		beside      time.Duration // between small frames of others; 0: there are none
		wait        time.Duration // the most that a ping takes beyond two delays, at the median
	}{
		{"short", path{500 * time.Microsecond, 60e6}, path{500 * time.Microsecond, 60e6}, 0, 10 * time.Millisecond}, // 4 MiB would take 70 ms
		{"long", path{40 * time.Millisecond, 25e6}, path{40 * time.Millisecond, 25e6}, 0, 90 * time.Millisecond},    // 2 MB fill it
		{"becomes long", path{500 * time.Microsecond, 25e6}, path{40 * time.Millisecond, 25e6}, 0, 90 * time.Millisecond},
		{"becomes longer", path{10 * time.Millisecond, 25e6}, path{40 * time.Millisecond, 25e6}, 0, 90 * time.Millisecond},
		{"becomes longer beside others", path{10 * time.Millisecond, 25e6}, path{40 * time.Millisecond, 25e6}, 5 * time.Millisecond, 90 * time.Millisecond},
		{"becomes slow", path{10 * time.Millisecond, 60e6}, path{10 * time.Millisecond, 6e6}, 0, 50 * time.Millisecond}, // 2 MiB would take 350 ms
		{"slow", path{10 * time.Millisecond, 1.25e6}, path{10 * time.Millisecond, 1.25e6}, 0, 200 * time.Millisecond},   // 256 KiB take 210 ms
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, conn := newNarrow(t, test.first.delay, test.first.rate)
				if test.beside > 0 {
					a, b := accepted(t, p)
					stream(a, b, 100, test.beside)
				}
				a, b := accepted(t, p)
				got := stream(a, b, 64<<10, 0)
				time.Sleep(2 * time.Second)
				p.link.Delay(test.then.delay)
				conn.rate.Store(test.then.rate)
				time.Sleep(2 * time.Second)
				from := got.Load()
				var trips []time.Duration
				for range 30 {
					d, err := p.a.Ping(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					trips = append(trips, d)
					time.Sleep(100 * time.Millisecond)
				}
				slices.Sort(trips)
				sum := 100 * time.Millisecond * 30
				for _, d := range trips {
					sum += d
				}
				rate := float64(got.Load()-from) / sum.Seconds() / float64(test.then.rate)
				wait := trips[len(trips)/2] - 2*test.then.delay
				t.Logf("%.0f %% of the path, window %d KiB, a ping waits %s", 100*rate, b.Window()>>10, wait)
				if rate < .85 || wait > test.wait {
					t.Errorf("%.0f %% of the path, a ping waits %s, want at most %s", 100*rate, wait, test.wait)
				}
				_, _ = p.a.Close(), p.b.Close()
			})
		})
	}
}

// TestWindowOutlivesPauses: a flow that says nothing for a while goes on with the window that it had.
func TestWindowOutlivesPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, _ := newNarrow(t, 40*time.Millisecond, 25e6)
		a, b := accepted(t, p)
		const pause = 3 * time.Second
		stream(a, b, 4<<20, pause)
		time.Sleep(10 * time.Second)
		before := b.Window()
		time.Sleep(time.Minute)
		if after := b.Window(); before < 1<<20 || after < before {
			t.Errorf("the window went from %d to %d", before, after)
		}
		_, _ = p.a.Close(), p.b.Close()
		time.Sleep(pause) // of the writer
	})
}

// TestWindowMakesWay: on a short path a flow has less of it under way while small messages of others come.
func TestWindowMakesWay(t *testing.T) {
	for _, test := range []struct {
		name  string
		delay time.Duration // one way
		way   bool
	}{
		{"short", 500 * time.Microsecond, true},
		{"long", 10 * time.Millisecond, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p, _ := newNarrow(t, test.delay, 250e6)
				a, b := accepted(t, p)
				got := stream(a, b, 64<<10, 0)
				time.Sleep(2 * time.Second)
				const narrow = 128 << 10
				alone := b.Window()
				c, d := accepted(t, p)
				said := stream(c, d, 100, 5*time.Millisecond)
				time.Sleep(time.Second)
				from := got.Load()
				time.Sleep(time.Second)
				rate := got.Load() - from
				beside := b.Window()
				c.Reset()
				time.Sleep(2 * time.Second)
				after := b.Window()
				t.Logf("window %d KiB alone, %d KiB and %d MB/s beside %d bytes of others, %d KiB afterwards", alone>>10, beside>>10, rate/1e6, said.Load(), after>>10)
				if alone <= narrow || after <= narrow || (beside == narrow) != test.way {
					t.Errorf("window %d alone, %d beside others, %d afterwards", alone, beside, after)
				}
				_, _ = p.a.Close(), p.b.Close()
			})
		})
	}
}

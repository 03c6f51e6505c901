package mux_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type pair struct {
	a, b *mux.Session
	link *muxtest.Link
}

func newPair(t testing.TB, lc muxtest.Config, a, b mux.Config) pair {
	t.Helper()
	sa, sb, link := muxtest.Pair(t, lc, a, b)
	return pair{sa, sb, link}
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

// accepted opens a stream from p.a to p.b and returns both ends.
func accepted(t testing.TB, p pair) (a, b *mux.Stream) {
	t.Helper()
	return muxtest.Stream(t, p.a, p.b)
}

func TestEchoBothWays(t *testing.T) {
	for _, chunk := range []int{0, 1, 7, 1000} {
		t.Run(fmt.Sprint(chunk), func(t *testing.T) {
			p := newPair(t, muxtest.Config{Chunk: chunk}, mux.Config{}, mux.Config{})
			serve(t, p.a, echo)
			serve(t, p.b, echo)
			size := 3 << 20
			if chunk > 0 && chunk < 10 {
				size = chunk * 100_000
			}
			for _, s := range []*mux.Session{p.a, p.b} {
				echoOnce(t, s, size, 1)
			}
		})
	}
}

func echoOnce(t testing.TB, s *mux.Session, size int, seed int64) {
	st := open(t, s)
	data := make([]byte, size)
	rand.New(rand.NewSource(seed)).Read(data)
	go func() {
		rest := data
		rnd := rand.New(rand.NewSource(seed))
		for len(rest) > 0 {
			n := min(len(rest), 1+rnd.Intn(100_000))
			if _, err := st.Write(rest[:n]); err != nil {
				t.Error(err)
				return
			}
			rest = rest[n:]
		}
		if err := st.CloseWrite(); err != nil {
			t.Error(err)
		}
	}()
	h := sha256.New()
	n, err := io.Copy(h, st)
	if err != nil || n != int64(size) {
		t.Errorf("got %d bytes, %v", n, err)
	}
	want := sha256.Sum256(data)
	if !bytes.Equal(h.Sum(nil), want[:]) {
		t.Error("the data changed on its way")
	}
	if err := st.Close(); err != nil {
		t.Error(err)
	}
}

func TestManyStreams(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{Backlog: 2000})
	serve(t, p.b, echo)
	var wg sync.WaitGroup
	for i := range 1000 {
		wg.Go(func() { echoOnce(t, p.a, 20_000+i, int64(i)) })
	}
	wg.Wait()
	waitFor(t, func() bool { return p.a.NumStreams() == 0 && p.b.NumStreams() == 0 })
}

// waitFor waits for a state that another goroutine is about to reach.
func waitFor(t testing.TB, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited for 10 s")
		}
	}
}

func TestCall(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	serve(t, p.b, func(r *mux.Request) {
		n := int(r.Header()[1])<<16 | int(r.Header()[2])<<8 | int(r.Header()[3])
		if err := r.Reply(bytes.Repeat([]byte{'x'}, n)); err != nil && n <= mux.MaxReply {
			t.Error(err)
		}
	})
	for _, n := range []int{0, 1, 65_528, 65_529, 1 << 20, mux.MaxReply} {
		reply, err := p.a.Call(context.Background(), []byte{1, byte(n >> 16), byte(n >> 8), byte(n)})
		if err != nil || len(reply) != n {
			t.Errorf("call for %d bytes: got %d, %v", n, len(reply), err)
		}
	}
	n := mux.MaxReply + 1
	_, err := p.a.Call(context.Background(), []byte{1, byte(n >> 16), byte(n >> 8), byte(n)})
	var rej *mux.RejectError
	if !errors.As(err, &rej) || rej.Code != wire.CodeInternal {
		t.Errorf("too large an answer: %v", err)
	}
	waitFor(t, func() bool { return p.a.NumStreams() == 0 && p.b.NumStreams() == 0 })
}

func TestReject(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	serve(t, p.b, func(r *mux.Request) { _ = r.Reject(wire.Code(r.Header()[0]), "no") })
	for code, errno := range map[wire.Code]error{
		wire.CodeRefused: syscall.ECONNREFUSED, wire.CodeUnreachable: syscall.EHOSTUNREACH,
		wire.CodeTimeout: syscall.ETIMEDOUT, wire.CodeReset: syscall.ECONNRESET,
	} {
		_, _, err := p.a.Open(context.Background(), []byte{byte(code)})
		var rej *mux.RejectError
		if !errors.As(err, &rej) || rej.Code != code || rej.Msg != "no" || !errors.Is(err, errno) {
			t.Errorf("%s: got %v", code, err)
		}
	}
	if n := p.a.NumStreams(); n != 0 {
		t.Errorf("%d streams left", n)
	}
}

func TestReset(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	for _, opener := range []bool{true, false} {
		a, b := accepted(t, p)
		if !opener {
			a, b = b, a
		}
		a.Reset()
		_, err := b.Read(make([]byte, 10))
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read after RST: %v", err)
		}
		if _, err = b.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("write after RST: %v", err)
		}
		_ = b.Close()
	}
	waitFor(t, func() bool { return p.a.NumStreams() == 0 && p.b.NumStreams() == 0 })
}

func TestHalfClose(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	a, b := accepted(t, p)
	_, _ = a.Write([]byte("question"))
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(b)
	if string(got) != "question" || err != nil {
		t.Fatalf("%q %v", got, err)
	}
	_, _ = b.Write([]byte("answer"))
	_ = b.Close()
	got, err = io.ReadAll(a)
	if string(got) != "answer" || err != nil {
		t.Fatalf("%q %v", got, err)
	}
	_ = a.Close()
	waitFor(t, func() bool { return p.a.NumStreams() == 0 && p.b.NumStreams() == 0 })
}

func TestPackets(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	a, b := accepted(t, p)
	sizes := []int{0, 1, 100, 5000, 65_528, 0, 40_000}
	go func() {
		for _, n := range sizes {
			if err := a.WritePacket(bytes.Repeat([]byte{byte(n)}, n)); err != nil {
				t.Error(err)
			}
		}
		_ = a.Close()
	}()
	buf := make([]byte, mux.MaxPacket)
	for _, want := range sizes {
		n, err := b.ReadPacket(buf)
		if n != want || err != nil {
			t.Fatalf("got %d bytes, %v, want %d", n, err, want)
		}
	}
	if _, err := b.ReadPacket(buf); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if err := b.WritePacket(make([]byte, mux.MaxPacket+1)); !errors.Is(err, mux.ErrTooLarge) {
		t.Fatal(err)
	}
	_ = b.Close()
}

func TestSessionLost(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	a, b := accepted(t, p)
	p.link.Cut()
	for _, st := range []*mux.Stream{a, b} {
		if _, err := io.Copy(io.Discard, st); !errors.Is(err, mux.ErrSession) {
			t.Errorf("read: %v", err)
		}
		if _, err := st.Write([]byte("x")); !errors.Is(err, mux.ErrSession) {
			t.Errorf("write: %v", err)
		}
		_ = st.Close()
	}
	if _, _, err := p.a.Open(context.Background(), []byte{1}); !errors.Is(err, mux.ErrSession) {
		t.Errorf("open: %v", err)
	}
	if _, err := p.b.Accept(context.Background()); !errors.Is(err, mux.ErrSession) {
		t.Errorf("accept: %v", err)
	}
	<-p.a.Done()
	<-p.b.Done()
}

func TestOpenGivenUp(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	ctx, cancel := context.WithCancel(context.Background())
	got := make(chan error, 1)
	go func() {
		_, _, err := p.a.Open(ctx, []byte{1})
		got <- err
	}()
	r, err := p.b.Accept(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	rctx := r.Context()
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	<-rctx.Done()
	if _, err := r.Accept(nil); err == nil {
		t.Error("accepted what nobody wants")
	}
	waitFor(t, func() bool { return p.a.NumStreams() == 0 && p.b.NumStreams() == 0 })
}

func TestPing(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	for range 10 {
		if _, err := p.a.Ping(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCutMidTransfer: a connection that breaks ends every transfer with an error that says so.
func TestCutMidTransfer(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	serve(t, p.b, echo)
	var wg sync.WaitGroup
	for range 20 {
		st := open(t, p.a)
		wg.Go(func() {
			var err error
			for err == nil {
				_, err = st.Write(make([]byte, 50_000))
			}
			if !errors.Is(err, mux.ErrSession) {
				t.Errorf("write: %v", err)
			}
		})
		wg.Go(func() {
			if _, err := io.Copy(io.Discard, st); !errors.Is(err, mux.ErrSession) {
				t.Errorf("read: %v", err)
			}
			_ = st.Close()
		})
	}
	waitFor(t, func() bool { ab, _ := p.link.Bytes(); return ab > 10<<20 })
	p.link.Cut()
	wg.Wait()
	for _, s := range []*mux.Session{p.a, p.b} {
		<-s.Done()
		waitFor(t, func() bool { free, pool := s.Free(); return free == pool && s.Live() == 0 })
	}
}

// Whoever learns by the request's context that the stream has ended can no longer write to it, and is told why.
func TestContextEndsWithStream(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	type end struct{ write, cause error }
	ends := make(chan end, 1)
	serve(t, p.b, func(r *mux.Request) {
		st, err := r.Accept(nil)
		if err != nil {
			t.Error(err)
			return
		}
		<-r.Context().Done()
		_, err = st.Write([]byte("x"))
		ends <- end{err, context.Cause(r.Context())}
	})
	for range 100 {
		st, _, err := p.a.Open(t.Context(), []byte("h"))
		if err != nil {
			t.Fatal(err)
		}
		st.ResetCode(wire.CodeCanceled)
		var reset *mux.ResetError
		if e := <-ends; e.write == nil || !errors.As(e.cause, &reset) || reset.Code != wire.CodeCanceled {
			t.Fatalf("write %v, cause %v", e.write, e.cause)
		}
	}
}

// TestSilent: a peer is silent when it says nothing to what wants an answer, and not any more as soon as a piece of a frame comes.
func TestSilent(t *testing.T) {
	t.Run("it has the answer that it wanted", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newPair(t, muxtest.Config{Delay: time.Millisecond}, mux.Config{KeepAlive: -1}, mux.Config{KeepAlive: -1})
			if _, err := p.b.Ping(context.Background()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
			if d := p.a.Silent(); d != 0 {
				t.Errorf("%v after a PONG was sent", d)
			}
		})
	})
	t.Run("a frame comes slowly", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			p := newRawPeer(t, mux.Config{})
			p.send(frame(wire.TypeOpen, 16, 1, 'x'))
			st := p.acceptOne()
			p.send(wire.Header{Type: wire.TypeData, Len: 100, Stream: 1}.Append(nil))
			synctest.Wait()
			if _, err := st.Write([]byte("question")); err != nil {
				t.Fatal(err)
			}
			time.Sleep(5 * time.Second)
			if d := p.s.Silent(); d != 5*time.Second {
				t.Errorf("%v when nothing has come", d)
			}
			p.send([]byte{1})
			synctest.Wait()
			if d := p.s.Silent(); d != 0 {
				t.Errorf("%v when a byte has come", d)
			}
		})
	})
}

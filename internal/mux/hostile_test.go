package mux_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/wire"
)

// rawPeer speaks frames by hand to a session.
type rawPeer struct {
	t  testing.TB
	c  net.Conn
	br *bufio.Reader
	s  *mux.Session
}

// newRawPeer returns a peer that is the initiator: its streams have odd numbers.
func newRawPeer(t testing.TB, cfg mux.Config) *rawPeer {
	t.Helper()
	link := muxtest.NewLink(muxtest.Config{Buffer: 1 << 20})
	cfg.KeepAlive = -1 // its pings would come between the answers
	s, err := mux.New(link.B, cfg)
	if err != nil {
		t.Fatal(err)
	}
	p := &rawPeer{t: t, c: link.A, br: bufio.NewReader(link.A), s: s}
	t.Cleanup(func() { _ = link.A.Close(); _ = s.Close() })
	_ = link.A.SetReadDeadline(time.Now().Add(10 * time.Second))
	return p
}

func (p *rawPeer) send(frames ...[]byte) {
	p.t.Helper()
	if _, err := p.c.Write(bytes.Join(frames, nil)); err != nil {
		p.t.Fatal(err)
	}
}

func (p *rawPeer) recv() (wire.Header, []byte) {
	p.t.Helper()
	var hdr [wire.HeaderLen]byte
	if _, err := io.ReadFull(p.br, hdr[:]); err != nil {
		p.t.Fatal(err)
	}
	h, err := wire.ParseHeader(hdr[:])
	if err != nil {
		p.t.Fatal(err)
	}
	body := make([]byte, h.Len)
	if _, err := io.ReadFull(p.br, body); err != nil {
		p.t.Fatal(err)
	}
	return h, body
}

func (p *rawPeer) expect(typ wire.Type, stream uint32) (wire.Header, []byte) {
	p.t.Helper()
	h, body := p.recv()
	if h.Type != typ || h.Stream != stream {
		p.t.Fatalf("got %s on stream %d (%q), want %s on %d", h.Type, h.Stream, body, typ, stream)
	}
	return h, body
}

func frame(typ wire.Type, flags uint8, stream uint32, payload ...byte) []byte {
	return append(wire.Header{Type: typ, Flags: flags, Len: len(payload), Stream: stream}.Append(nil), payload...)
}

func number(typ wire.Type, stream, n uint32) []byte { return wire.AppendUint32(nil, typ, stream, n) }

// acceptOne has the session accept the peer's next stream and returns the session's end.
func (p *rawPeer) acceptOne() *mux.Stream {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	r, err := p.s.Accept(ctx)
	if err != nil {
		p.t.Fatal(err)
	}
	st, err := r.Accept(nil)
	if err != nil {
		p.t.Fatal(err)
	}
	return st
}

// TestWantBeforeReturn: a stream that was just asked for its credit, and begins to send before it has said what it gives back, gets credit again.
func TestWantBeforeReturn(t *testing.T) {
	const most = 400
	p := newRawPeer(t, mux.Config{Budget: 1 << 20, MaxStreams: most})
	credit, asked := map[uint32]uint32{}, map[uint32]bool{}
	for id := uint32(1); len(credit) < 300 || !asked[1]; { // until a stream may not have twice what the first one has
		if _, open := credit[id]; !open && len(credit) < most { // else the housekeeper is late
			credit[id] = 0
			p.send(frame(wire.TypeOpen, 12, id, 'x'))
			p.acceptOne()
		}
		switch h, _ := p.recv(); h.Type {
		case wire.TypeOK:
			credit[id], id = uint32(h.Window()), id+2
		case wire.TypeReclaim:
			asked[h.Stream] = true
		default:
			t.Fatalf("got %s", h.Type)
		}
	}
	p.send(number(wire.TypeWant, 1, 5000), number(wire.TypeReturn, 1, credit[1]-1024))
	delete(asked, 1)
	for id := range asked {
		p.send(number(wire.TypeReturn, id, credit[id]-1024))
	}
	for {
		switch h, _ := p.recv(); {
		case h.Type == wire.TypeWindow && h.Stream == 1:
			return
		case h.Type == wire.TypeReclaim && h.Stream != 1:
			p.send(number(wire.TypeReturn, h.Stream, credit[h.Stream]-1024))
		}
	}
}

func TestViolations(t *testing.T) {
	open1 := frame(wire.TypeOpen, 12, 1, 'x')
	big := make([]byte, 60_000)
	for _, tt := range []struct {
		name   string
		open   bool // stream 1 was opened by the peer and accepted, stream 2 opened by the session
		frames [][]byte
	}{
		{"type 0", false, [][]byte{frame(0, 0, 1)}},
		{"type 14", false, [][]byte{frame(14, 0, 1)}},
		{"flags", false, [][]byte{frame(wire.TypeFin, 1, 1)}},
		{"DATA flags", false, [][]byte{frame(wire.TypeData, 2, 1)}},
		{"OPEN without kind", false, [][]byte{frame(wire.TypeOpen, 0, 1)}},
		{"OPEN with 2^27 of credit", false, [][]byte{frame(wire.TypeOpen, 27, 1, 'x')}},
		{"OPEN on stream 0", false, [][]byte{frame(wire.TypeOpen, 0, 0, 'x')}},
		{"OPEN with our number", false, [][]byte{frame(wire.TypeOpen, 0, 2, 'x')}},
		{"OPEN twice", false, [][]byte{open1, open1}},
		{"OPEN of an open stream", true, [][]byte{open1}},
		{"OK for its own stream", true, [][]byte{frame(wire.TypeOK, 0, 1)}},
		{"second OK", true, [][]byte{frame(wire.TypeOK, 0, 2)}},
		{"ERR after OK", true, [][]byte{wire.AppendError(nil, wire.TypeErr, 2, wire.CodeRefused, "")}},
		{"ERR of one byte", true, [][]byte{frame(wire.TypeErr, 0, 2, 1)}},
		{"DATA before OK", false, [][]byte{open1, frame(wire.TypeData, 0, 1, 'x')}},
		{"DATA before our OPEN is answered", true, [][]byte{frame(wire.TypeData, 0, 4, 'x')}},
		{"FIN before our OPEN is answered", true, [][]byte{frame(wire.TypeFin, 0, 4)}},
		{"DATA beyond credit", true, [][]byte{
			frame(wire.TypeData, 0, 2, big...), frame(wire.TypeData, 0, 2, big...), frame(wire.TypeData, 0, 2, big...),
			frame(wire.TypeData, 0, 2, big...), frame(wire.TypeData, 0, 2, big...),
		}},
		{"DATA after FIN", true, [][]byte{frame(wire.TypeFin, 0, 1), frame(wire.TypeData, 0, 1, 'x')}},
		{"messages among bytes", true, [][]byte{frame(wire.TypeData, 0, 1, 'x'), frame(wire.TypeData, wire.FlagMessage, 1, 'x')}},
		{"bytes among messages", true, [][]byte{frame(wire.TypeData, wire.FlagMessage, 1), frame(wire.TypeData, 0, 1, 'x')}},
		{"FIN twice", true, [][]byte{frame(wire.TypeFin, 0, 1), frame(wire.TypeFin, 0, 1)}},
		{"RST of one byte", true, [][]byte{frame(wire.TypeRst, 0, 1, 1)}},
		{"WINDOW overflow", true, [][]byte{number(wire.TypeWindow, 1, 1<<31-1)}},
		{"WINDOW of 3 bytes", true, [][]byte{frame(wire.TypeWindow, 0, 1, 1, 2, 3)}},
		{"WANT more than a frame", true, [][]byte{number(wire.TypeWant, 1, 65_537)}},
		{"RETURN unasked", true, [][]byte{number(wire.TypeReturn, 1, 1)}},
		{"PING of 7 bytes", false, [][]byte{frame(wire.TypePing, 0, 0, 1, 2, 3, 4, 5, 6, 7)}},
		{"PING on a stream", false, [][]byte{frame(wire.TypePing, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8)}},
		{"GOAWAY of one byte", false, [][]byte{frame(wire.TypeGoAway, 0, 0, 1)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newRawPeer(t, mux.Config{})
			if tt.open {
				p.send(open1)
				p.acceptOne()
				p.expect(wire.TypeOK, 1)
				go func() { _, _, _ = p.s.Open(context.Background(), []byte{'y'}) }()
				p.expect(wire.TypeOpen, 2)
				p.send(frame(wire.TypeOK, 12, 2))
				go func() { _, _, _ = p.s.Open(context.Background(), []byte{'z'}) }()
				p.expect(wire.TypeOpen, 4)
			}
			p.send(tt.frames...)
			h, body := p.recv()
			code, msg, _ := wire.ParseError(body)
			if h.Type != wire.TypeGoAway || code != wire.CodeProtocol || msg == "" {
				t.Errorf("got %s %s %q, want GOAWAY protocol", h.Type, code, msg)
			}
			<-p.s.Done()
			if !errors.Is(p.s.Err(), wire.ErrProtocol) {
				t.Errorf("session ended by %v", p.s.Err())
			}
		})
	}
}

// TestDribble: what a peer sends byte by byte takes about as much memory as it is long.
func TestDribble(t *testing.T) {
	const size, came = 60_000, 400
	p := newRawPeer(t, mux.Config{})
	p.send(frame(wire.TypeOpen, 12, 1, 'x'))
	st := p.acceptOne()
	p.expect(wire.TypeOK, 1)
	before := heap()
	want := make([]byte, size)
	for i := range want {
		want[i] = byte(i)
	}
	p.send(wire.Header{Type: wire.TypeData, Stream: 1, Len: size}.Append(nil))
	for i := range came {
		p.send(want[i : i+1])
		time.Sleep(time.Millisecond) // each is a read of its own, and a slow one
	}
	if grown := heap() - before; grown > 1<<20 {
		t.Errorf("%d KiB are held of %d bytes", grown>>10, came)
	}
	p.send(want[came:])
	got := make([]byte, size)
	if _, err := io.ReadFull(st, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("other bytes came, %v", err)
	}
}

// TestAnsweredHeaders: a call that was answered is not kept with what was asked, though its opener goes on.
func TestAnsweredHeaders(t *testing.T) {
	const calls = 500
	p := newRawPeer(t, mux.Config{})
	serve(t, p.s, func(r *mux.Request) { _ = r.Reply([]byte("x")) })
	header := bytes.Repeat([]byte("x"), 60_000)
	before := heap()
	for i := range uint32(calls) {
		p.send(frame(wire.TypeOpen, 12, 2*i+1, header...))
		p.expect(wire.TypeOK, 2*i+1)
	}
	if n := p.s.NumStreams(); n != calls {
		t.Errorf("%d streams", n)
	}
	if grown := heap() - before; grown > 8<<20 {
		t.Errorf("%d KiB are held for %d calls", grown>>10, calls)
	}
}

// TestLateFrames: frames for a stream that has ended here while they were under way are no violations.
func TestLateFrames(t *testing.T) {
	p := newRawPeer(t, mux.Config{})
	for _, id := range []uint32{1, 2, 77} {
		p.send(frame(wire.TypeData, 0, id, 'x'), frame(wire.TypeData, 1, id), frame(wire.TypeFin, 0, id), wire.AppendRst(nil, id, 4),
			number(wire.TypeWindow, id, 1), number(wire.TypeWant, id, 1), number(wire.TypeReclaim, id, 1), number(wire.TypeReturn, id, 1))
	}
	p.send(frame(wire.TypeOK, 0, 2), wire.AppendError(nil, wire.TypeErr, 4, 1, ""), frame(wire.TypePong, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8))
	p.send(frame(wire.TypePing, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1))
	if _, body := p.expect(wire.TypePong, 0); !bytes.Equal(body, []byte{8, 7, 6, 5, 4, 3, 2, 1}) {
		t.Errorf("pong %v", body)
	}
}

func TestBacklog(t *testing.T) {
	p := newRawPeer(t, mux.Config{Backlog: 10})
	for i := range uint32(30) {
		p.send(frame(wire.TypeOpen, 12, 2*i+1, 'x'))
	}
	for i := uint32(10); i < 30; i++ {
		_, body := p.expect(wire.TypeErr, 2*i+1)
		if code, _, _ := wire.ParseError(body); code != wire.CodeBusy {
			t.Errorf("rejected with %s", code)
		}
	}
	if n := p.s.NumStreams(); n != 10 {
		t.Errorf("%d streams", n)
	}
	// Given up while they waited: they are forgotten, and the next can come.
	for i := range uint32(10) {
		p.send(wire.AppendRst(nil, 2*i+1, wire.CodeCanceled))
	}
	waitFor(t, func() bool { return p.s.NumStreams() == 0 && p.s.Live() == 0 })
	p.send(frame(wire.TypeOpen, 12, 1001, 'x'))
	p.expect(wire.TypeErr, 1001) // the dead ones are still queued
	go func() {
		if r, err := p.s.Accept(context.Background()); err == nil {
			_ = r.Reject(wire.CodeDenied, "")
		}
	}()
	waitFor(t, func() bool {
		p.send(frame(wire.TypeOpen, 12, 1003, 'x'))
		_, body := p.expect(wire.TypeErr, 1003)
		code, _, _ := wire.ParseError(body)
		return code == wire.CodeDenied
	})
}

func TestMaxStreams(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{MaxStreams: 5}, mux.Config{MaxStreams: 8})
	serve(t, p.b, func(r *mux.Request) { _, _ = r.Accept(nil) })
	var last *mux.Stream
	for range 5 {
		last = open(t, p.a)
	}
	if _, _, err := p.a.Open(context.Background(), []byte{1}); !errors.Is(err, mux.ErrTooManyStreams) {
		t.Errorf("sixth stream: %v", err)
	}
	last.Reset()
	open(t, p.a)

	q := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{MaxStreams: 5})
	serve(t, q.b, func(r *mux.Request) { _, _ = r.Accept(nil) })
	for range 5 {
		open(t, q.a)
	}
	var rej *mux.RejectError
	if _, _, err := q.a.Open(context.Background(), []byte{1}); !errors.As(err, &rej) || rej.Code != wire.CodeBusy {
		t.Errorf("sixth stream: %v", err)
	}
}

// TestOpenFlood: headers of streams that nobody has answered are bounded.
func TestOpenFlood(t *testing.T) {
	p := newRawPeer(t, mux.Config{Backlog: 1000})
	hdr := make([]byte, wire.MaxPayload)
	rejected := make(chan int)
	go func() {
		n := 0
		for range 200 {
			h, _ := p.recv()
			if h.Type != wire.TypeErr {
				break
			}
			n++
			if n == 136 {
				break
			}
		}
		rejected <- n
	}()
	for i := range uint32(200) {
		p.send(frame(wire.TypeOpen, 0, 2*i+1, hdr...))
	}
	if n := <-rejected; n != 136 { // 64 of 64 KiB are 4 MiB
		t.Errorf("%d rejected", n)
	}
}

// TestNotReading: a peer that asks and never reads the answers does not grow the queue of answers.
func TestNotReading(t *testing.T) {
	p := newRawPeer(t, mux.Config{})
	ping := bytes.Repeat(frame(wire.TypePing, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8), 1000)
	for range 200 { // 3.2 MB; the link holds 1 MiB each way
		if _, err := p.c.Write(ping); err != nil {
			break
		}
	}
	<-p.s.Done()
	t.Log(p.s.Err())
}

func TestCloseRefusesWhatComes(t *testing.T) {
	t.Run("unread data", func(t *testing.T) {
		p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
		a, b := accepted(t, p)
		go func() {
			for {
				if _, err := a.Write(make([]byte, 100_000)); err != nil {
					return
				}
			}
		}()
		waitFor(t, func() bool { return b.Window() > 0 && usedOf(p.b) > 0 })
		_, _ = b.Write([]byte("too much"))
		_ = b.Close()
		got, err := io.ReadAll(a)
		if string(got) != "too much" || err != nil {
			t.Errorf("read %q, %v", got, err)
		}
		waitFor(t, func() bool { _, err := a.Write([]byte("x")); return err != nil })
		_ = a.Close()
		waitFor(t, func() bool { return p.a.NumStreams() == 0 && p.b.NumStreams() == 0 })
	})
	t.Run("data after", func(t *testing.T) {
		p := newRawPeer(t, mux.Config{})
		p.send(frame(wire.TypeOpen, 16, 1, 'x'))
		st := p.acceptOne()
		p.expect(wire.TypeOK, 1)
		_ = st.Close()
		p.expect(wire.TypeFin, 1)
		p.send(frame(wire.TypeData, 0, 1, 'y'))
		p.expect(wire.TypeRst, 1)
		waitFor(t, func() bool { return p.s.NumStreams() == 0 && p.s.Live() == 0 })
	})
	t.Run("want after", func(t *testing.T) {
		p := newRawPeer(t, mux.Config{})
		p.send(frame(wire.TypeOpen, 16, 1, 'x'))
		st := p.acceptOne()
		p.expect(wire.TypeOK, 1)
		_ = st.Close()
		p.expect(wire.TypeFin, 1)
		p.send(number(wire.TypeWant, 1, 100))
		p.expect(wire.TypeRst, 1)
	})
}

func usedOf(s *mux.Session) int {
	_, used := s.Held()
	return used
}

func TestNumbersWrap(t *testing.T) {
	p := newPair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	serve(t, p.b, echo)
	p.a.SetNextID(1<<32 - 3)
	held := open(t, p.a)
	for range 5 {
		st := open(t, p.a)
		if st.ID()%2 != 1 {
			t.Errorf("stream %d", st.ID())
		}
		_ = st.Close()
	}
	p.a.SetNextID(held.ID())
	if st := open(t, p.a); st.ID() == held.ID() {
		t.Error("number in use was used again")
	}
}

package mux_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"runtime"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/wire"
)

// TestMillionOpens: a peer that opens streams without end has as many as there may be, in bounded memory, and another of its streams is served afterwards.
func TestMillionOpens(t *testing.T) {
	const batch = 1000
	for _, tt := range []struct {
		name   string
		opens  int
		max    int                // streams
		answer func(*mux.Request) // nil: nobody takes them
		reset  bool               // the peer gives each up at once
	}{
		{"nobody answers", 1_000_000, 16_384, nil, false},
		{"refused", 100_000, 1000, func(r *mux.Request) { _ = r.Reject(wire.CodeDenied, "no") }, false},
		{"accepted", 100_000, 1000, func(r *mux.Request) { _, _ = r.Accept(nil) }, false},
		{"reset", 100_000, 1000, nil, true},
		{"accepted and reset", 100_000, 1000, func(r *mux.Request) { _, _ = r.Accept(nil) }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newRawPeer(t, mux.Config{MaxStreams: tt.max})
			_ = p.c.SetReadDeadline(time.Now().Add(5 * time.Minute))
			begin := func() {
				serve(t, p.s, func(r *mux.Request) {
					switch {
					case r.Header()[0] == 'e':
						echo(r)
					case tt.answer != nil:
						tt.answer(r)
					default:
						t.Error("there is a request that was given up")
					}
				})
			}
			if tt.answer != nil {
				begin()
			}
			refused := make([]bool, tt.opens)
			pong, ended := make(chan uint64, 1), make(chan error, 1)
			before := heap()
			go func() { ended <- p.drain(refused, pong, uint64(tt.opens)) }()
			var frames bytes.Buffer
			for i := 0; i < tt.opens; {
				frames.Reset()
				for range batch {
					id := uint32(2*i + 1)
					frames.Write(frame(wire.TypeOpen, 12, id, 'x'))
					if tt.reset {
						frames.Write(wire.AppendRst(nil, id, wire.CodeCanceled))
					}
					i++
				}
				p.send(frames.Bytes(), frame(wire.TypePing, 0, 0, binary.BigEndian.AppendUint64(nil, uint64(i))...))
				select {
				case <-pong: // all that was sent has been seen
				case err := <-ended:
					t.Fatalf("after %d: %v, %v", i, err, p.s.Err())
				}
				if n, live := p.s.NumStreams(), p.s.Live(); n > tt.max || live > tt.max {
					t.Fatalf("after %d: %d streams, %d live", i, n, live)
				}
			}
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			grown := heap() - before
			t.Logf("%d streams, %d live, %d KiB", p.s.NumStreams(), p.s.Live(), grown>>10)
			if grown > 16<<20+int64(tt.max)<<10 {
				t.Errorf("%d KiB are held, for at most %d streams", grown>>10, tt.max)
			}

			for i, no := range refused {
				if !no && !tt.reset {
					p.send(wire.AppendRst(nil, uint32(2*i+1), wire.CodeCanceled))
				}
			}
			waitFor(t, func() bool { return p.s.NumStreams() == 0 && p.s.Live() == 0 })
			if tt.answer == nil {
				begin()
			}
			p.echoes(uint32(2*tt.opens + 1))
			_ = p.c.Close() // the session need not wait for that
		})
	}
}

// echoes opens a stream, which is served, if not at once: those that were given up may still be in the queue. What comes for others is left aside.
func (p *rawPeer) echoes(id uint32) {
	p.t.Helper()
	open := func() { p.send(frame(wire.TypeOpen, 16, id, 'e')) }
	open()
	var got []byte
	for fin := false; !fin; {
		h, body := p.recv()
		if h.Stream != id {
			continue
		}
		switch h.Type {
		case wire.TypeErr:
			if code, _, _ := wire.ParseError(body); code != wire.CodeBusy {
				p.t.Fatalf("refused: %s", code)
			}
			id += 2
			open()
		case wire.TypeOK:
			p.send(frame(wire.TypeData, 0, id, 'h', 'i'), frame(wire.TypeFin, 0, id))
		case wire.TypeData:
			got = append(got, body...)
		case wire.TypeFin:
			fin = true
		default:
			p.t.Fatalf("got %s %q", h.Type, body)
		}
	}
	if string(got) != "hi" {
		p.t.Errorf("echoed %q", got)
	}
}

// drain reads the answers, and notes what was refused, until a PONG with the last number.
func (p *rawPeer) drain(refused []bool, pong chan<- uint64, last uint64) error {
	var hdr [wire.HeaderLen]byte
	body := make([]byte, wire.MaxPayload)
	for {
		if _, err := io.ReadFull(p.br, hdr[:]); err != nil {
			return err
		}
		h, err := wire.ParseHeader(hdr[:])
		if err != nil {
			return err
		}
		if _, err := io.ReadFull(p.br, body[:h.Len]); err != nil {
			return err
		}
		switch h.Type {
		case wire.TypeErr:
			refused[h.Stream/2] = true
		case wire.TypePong:
			n := binary.BigEndian.Uint64(body)
			pong <- n
			if n == last {
				return nil
			}
		default: // OK: it is open until it is reset
		}
	}
}

// heap is what is in use after a collection, in bytes.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

package mux_test

import (
	"context"
	"encoding/binary"
	"io"
	"sync"
	"testing"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/wire"
)

// feed gives a session with two streams of its own and a busy acceptor what a peer sent, and waits for its end.
func feed(t *testing.T, data []byte) {
	link := muxtest.NewLink(muxtest.Config{Buffer: 1 << 20})
	s, err := mux.New(link.B, mux.Config{Budget: 1 << 20, MaxStreams: 50, Backlog: 5})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = io.Copy(io.Discard, link.A) })
	wg.Go(func() {
		for i := 0; ; i++ {
			r, err := s.Accept(context.Background())
			if err != nil {
				return
			}
			wg.Go(func() {
				switch i % 4 {
				case 0:
					echo(r)
				case 1:
					_ = r.Reply(make([]byte, 100_000))
				case 2:
					_ = r.Reject(wire.CodeDenied, "no")
				case 3:
					if st, err := r.Accept(nil); err == nil {
						buf := make([]byte, 100)
						for err == nil {
							_, err = st.ReadPacket(buf)
						}
						_ = st.Close()
					}
				}
			})
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	for range 2 {
		wg.Go(func() {
			if st, _, err := s.Open(ctx, []byte{1}); err == nil {
				wg.Go(func() { _, _ = st.Write(make([]byte, 100_000)) })
				_, _ = io.Copy(io.Discard, st)
				_ = st.Close()
			}
		})
	}
	_, _ = link.A.Write(data)
	_ = link.A.(interface{ CloseWrite() error }).CloseWrite()
	<-s.Done()
	cancel()
	_ = s.Close()
	_ = link.A.Close()
	wg.Wait()
	if windows, used := s.Held(); used > windows {
		t.Errorf("windows %d, used %d", windows, used)
	}
	if n := s.NumStreams(); n != 0 {
		t.Errorf("%d streams left", n)
	}
}

// FuzzSession feeds bytes as they are.
func FuzzSession(f *testing.F) {
	f.Add([]byte{})
	f.Add(frame(wire.TypeOpen, 12, 1, 'x'))
	f.Add(append(frame(wire.TypeOpen, 16, 1, 'x'), frame(wire.TypeData, 0, 1, 'y')...))
	f.Fuzz(feed)
}

// FuzzFrames feeds well-formed frames in any order: bytes become type, flags, stream and payload, so that more than the first
// check is reached.
func FuzzFrames(f *testing.F) {
	f.Add([]byte{1, 12, 1, 1, 4, 0, 1, 5, 5, 0, 1, 0})
	f.Add([]byte{1, 12, 1, 1, 1, 0x8c, 3, 1, 2, 12, 2, 0, 2, 12, 4, 0, 4, 1, 2, 9, 7, 0, 2, 1, 8, 0, 2, 1, 9, 0, 2, 1, 6, 0, 4, 0})
	f.Fuzz(func(t *testing.T, ops []byte) {
		var data []byte
		for ; len(ops) >= 4 && len(data) < 1<<20; ops = ops[4:] {
			typ := wire.Type(ops[0] % 14)
			h := wire.Header{Type: typ, Flags: ops[1], Stream: uint32(ops[2] % 12)}
			n := int(ops[3])
			var payload []byte
			switch typ {
			case wire.TypeWindow, wire.TypeWant, wire.TypeReclaim, wire.TypeReturn:
				h.Flags = 0
				payload = binary.BigEndian.AppendUint32(nil, uint32(n)<<(ops[1]%24))
			case wire.TypePing, wire.TypePong:
				h.Flags, h.Stream = 0, 0
				payload = make([]byte, 8)
			case wire.TypeRst:
				h.Flags = 0
				payload = []byte{0, ops[3]}
			case wire.TypeFin:
				h.Flags = 0
			case wire.TypeData:
				h.Flags &= 1
				payload = make([]byte, n*n)
			default:
				payload = make([]byte, n)
			}
			h.Len = len(payload)
			data = append(h.Append(data), payload...)
		}
		feed(t, data)
	})
}

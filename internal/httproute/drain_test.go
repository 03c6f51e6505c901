package httproute

import (
	"bytes"
	"io"
	"testing"

	"golang.org/x/net/http2"

	"github.com/doppel-dev/doppel/internal/flow"
)

// sink is a client that only listens.
type sink struct {
	flow.Stream
	w io.Writer
}

func (s sink) Write(p []byte) (int, error) { return s.w.Write(p) }

// FuzzDrain cuts what a server says anywhere, and asks for the end anywhere: the client gets all of it, and one frame more, where one may be.
func FuzzDrain(f *testing.F) {
	var b bytes.Buffer
	w := http2.NewFramer(&b, nil)
	_ = w.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 100})
	_ = w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x88}})
	_ = w.WriteContinuation(1, true, []byte{0x88})
	_ = w.WriteData(1, true, make([]byte, 300))
	_ = w.WriteSettingsAck()
	said := b.Bytes()
	for i := range len(said) + 1 {
		f.Add(uint16(i), uint8(i))
	}
	f.Fuzz(func(t *testing.T, at uint16, step uint8) {
		var got bytes.Buffer
		d := NewDrainer(sink{w: &got}, nil)
		defer d.Stop()
		ask := int(at) % (len(said) + 1)
		for n := 0; n <= len(said); {
			if n >= ask {
				if err := d.Drain(); err != nil {
					t.Fatal(err)
				}
			}
			k := min(max(int(step), 1), len(said)-n)
			if n < ask {
				k = min(k, ask-n)
			}
			if m, err := d.Client().Write(said[n : n+k]); m != k || err != nil {
				t.Fatal(m, err)
			}
			if n += k; n == len(said) && k == 0 {
				break
			}
		}
		r := http2.NewFramer(nil, &got)
		var all bytes.Buffer
		back := http2.NewFramer(&all, nil)
		away, first := 0, true
		for {
			f, err := r.ReadFrame()
			if err != nil {
				break
			}
			if g, ok := f.(*http2.GoAwayFrame); ok {
				if away++; first || g.LastStreamID != 1<<31-1 || g.ErrCode != http2.ErrCodeNo {
					t.Errorf("%v, first %v", g, first)
				}
				continue
			}
			first = false
			switch f := f.(type) {
			case *http2.SettingsFrame:
				if f.IsAck() {
					_ = back.WriteSettingsAck()
					break
				}
				_ = back.WriteSettings(f.Setting(0))
			case *http2.HeadersFrame:
				_ = back.WriteHeaders(http2.HeadersFrameParam{StreamID: f.StreamID, BlockFragment: f.HeaderBlockFragment()})
			case *http2.ContinuationFrame:
				_ = back.WriteContinuation(f.StreamID, true, f.HeaderBlockFragment())
			case *http2.DataFrame:
				_ = back.WriteData(f.StreamID, f.StreamEnded(), f.Data())
			}
		}
		if away != 1 || !bytes.Equal(all.Bytes(), said) {
			t.Errorf("%d times, and\n%x, said was\n%x", away, all.Bytes(), said)
		}
	})
}

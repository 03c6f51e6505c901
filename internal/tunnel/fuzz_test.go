package tunnel

import (
	"bytes"
	"io"
	"testing"

	"github.com/doppel-dev/doppel/internal/wire"
)

// FuzzHandshake: the first frame of either end is Hello, or its answer, or an error, and not a byte more is read.
func FuzzHandshake(f *testing.F) {
	add := func(h wire.Header, p []byte) {
		var b bytes.Buffer
		if err := writeFrame(&b, h, p); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	hello, err := wire.AppendHello(nil, wire.Hello{Version: wire.Version, Role: wire.RoleAgent, Token: "t", Resume: &wire.Resume{Mux: "m", Received: 5}})
	if err != nil {
		f.Fatal(err)
	}
	reply, err := wire.MarshalHelloReply(wire.HelloReply{Version: wire.Version, Resume: &wire.Resume{Mux: "m", Seconds: 30}})
	if err != nil {
		f.Fatal(err)
	}
	add(wire.Header{Type: wire.TypeOpen, Flags: wire.FlagFin, Stream: 1}, hello)
	add(wire.Header{Type: wire.TypeOpen, Stream: 1}, hello)
	add(wire.Header{Type: wire.TypeOpen, Flags: wire.FlagFin, Stream: 2}, hello)
	add(wire.Header{Type: wire.TypeOK, Flags: wire.FlagFin, Stream: 1}, reply)
	add(wire.Header{Type: wire.TypeOK, Flags: wire.FlagFin, Stream: 3}, reply)
	f.Add(wire.AppendError(nil, wire.TypeErr, 1, wire.CodeDenied, "no"))
	f.Add(wire.AppendError(nil, wire.TypeGoAway, 0, wire.CodeBusy, "later"))
	f.Fuzz(func(t *testing.T, in []byte) {
		frame := len(in)
		if h, err := wire.ParseHeader(in); err == nil {
			frame = min(frame, wire.HeaderLen+h.Len)
		}
		r := bytes.NewReader(in)
		if stream, _, err := readHello(r); err == nil && (stream%2 == 0 || wire.Type(in[0]) != wire.TypeOpen) {
			t.Errorf("%x is a hello on stream %d", in, stream)
		}
		if n := len(in) - r.Len(); n > frame {
			t.Errorf("%d bytes of %x are read", n, in)
		}
		if reply, err := sendHello(readWriter{bytes.NewReader(in), io.Discard}, wire.Hello{}); err == nil && (reply.Version != wire.Version || reply.Resume != nil && reply.Resume.Seconds < 0) {
			t.Errorf("%x answers %+v", in, reply)
		}
	})
}

type readWriter struct {
	io.Reader
	io.Writer
}

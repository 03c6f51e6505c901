package tunnel

import (
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/wire"
)

// Hello is exchanged before there is a session, one frame each way: what follows on the connection belongs to a new session or
// to one that goes on.

// helloStream is the number of Hello's stream.
const helloStream = 1

// writeFrame writes a frame in one piece: under TLS one record.
func writeFrame(w io.Writer, h wire.Header, payload []byte) error {
	if len(payload) > wire.MaxPayload {
		return mux.ErrTooLarge
	}
	h.Len = len(payload)
	_, err := w.Write(append(h.Append(nil), payload...))
	return err
}

// readFrame reads a frame and not a byte more.
func readFrame(r io.Reader) (wire.Header, []byte, error) {
	var b [wire.HeaderLen]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return wire.Header{}, nil, err
	}
	h, err := wire.ParseHeader(b[:])
	if err != nil {
		return h, nil, err
	}
	p := make([]byte, h.Len)
	_, err = io.ReadFull(r, p)
	return h, p, err
}

// sendHello says hello and returns the answer.
func sendHello(c io.ReadWriter, h wire.Hello) (wire.HelloReply, error) {
	if h.Version == 0 {
		h.Version = wire.Version
	}
	if h.Product == "" {
		h.Product = "doppel/" + buildinfo.Version
	}
	p, err := wire.AppendHello(nil, h)
	if err != nil {
		return wire.HelloReply{}, err
	}
	if err := writeFrame(c, wire.Header{Type: wire.TypeOpen, Flags: wire.FlagFin, Stream: helloStream}, p); err != nil {
		return wire.HelloReply{}, fmt.Errorf("send hello: %w", err)
	}
	hdr, p, err := readFrame(c)
	if err != nil {
		return wire.HelloReply{}, fmt.Errorf("read the answer to hello: %w", err)
	}
	switch {
	case hdr.Type == wire.TypeGoAway:
		code, msg, err := wire.ParseError(p)
		if err != nil {
			return wire.HelloReply{}, err
		}
		return wire.HelloReply{}, &mux.GoAwayError{Code: code, Msg: msg}
	case hdr.Type == wire.TypeErr && hdr.Stream == helloStream:
		code, msg, err := wire.ParseError(p)
		if err != nil {
			return wire.HelloReply{}, err
		}
		return wire.HelloReply{}, &mux.RejectError{Code: code, Msg: msg}
	case hdr.Type != wire.TypeOK || hdr.Flags != wire.FlagFin || hdr.Stream != helloStream:
		return wire.HelloReply{}, fmt.Errorf("%w: %s in answer to hello", wire.ErrProtocol, hdr.Type)
	}
	reply, err := wire.ParseHelloReply(p)
	if err != nil {
		return reply, err
	}
	if reply.Version != h.Version {
		return reply, &mux.RejectError{Code: wire.CodeVersion, Msg: fmt.Sprintf("the server speaks protocol %d, this end %d", reply.Version, h.Version)}
	}
	if r := reply.Resume; r != nil && (r.Seconds < 0 || r.Seconds > math.MaxInt32) {
		return reply, fmt.Errorf("%w: resume for %d seconds", wire.ErrProtocol, r.Seconds)
	}
	return reply, nil
}

// readHello reads the client's Hello and the number of its stream.
func readHello(r io.Reader) (stream uint32, h wire.Hello, err error) {
	hdr, p, err := readFrame(r)
	if err != nil {
		return 0, h, fmt.Errorf("read hello: %w", err)
	}
	notHello := &mux.RejectError{Code: wire.CodeProtocol, Msg: "the first stream must be Hello"}
	if hdr.Type != wire.TypeOpen || hdr.Stream%2 == 0 {
		return 0, h, fmt.Errorf("%w: %s before hello", wire.ErrProtocol, hdr.Type)
	}
	if hdr.Flags&wire.FlagFin == 0 {
		return hdr.Stream, h, notHello
	}
	if h, err = wire.ParseHello(p); err != nil {
		return hdr.Stream, h, errors.Join(notHello, err)
	}
	return hdr.Stream, h, nil
}

// refuse answers no, if there was a question, and waits, for a second, until the client has hung up: what is sent last is lost
// with a connection that is closed too early.
func refuse(c io.ReadWriteCloser, stream uint32, err error) {
	if stream == 0 {
		return
	}
	t := time.AfterFunc(time.Second, func() { _ = c.Close() })
	defer t.Stop()
	code, msg := rejection(err, wire.CodeDenied)
	if _, err := c.Write(wire.AppendError(nil, wire.TypeErr, stream, code, msg)); err == nil {
		_, _ = io.Copy(io.Discard, io.LimitReader(c, wire.MaxFrame))
	}
}

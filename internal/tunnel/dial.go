package tunnel

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/wire"
)

var (
	_ flow.Stream  = (*mux.Stream)(nil)
	_ flow.Packets = (*mux.Stream)(nil)
)

// maxWatchValue bounds one value of a watch, in bytes.
const maxWatchValue = 8 << 20

// DialTCP asks the other end to connect to dst on behalf of src (which may be zero). It returns when the connection stands; a
// refusal is (errors.Is) the errno that a connect(2) on the other end's network gave.
func DialTCP(ctx context.Context, s *mux.Session, src, dst netip.AddrPort) (*mux.Stream, error) {
	st, _, err := s.Open(ctx, wire.AppendTCP(nil, wire.FlowHeader{Src: src, Dst: dst}))
	return st, err
}

// DialUDP is DialTCP for a UDP flow; use ReadPacket and WritePacket of the stream.
func DialUDP(ctx context.Context, s *mux.Session, src, dst netip.AddrPort) (*mux.Stream, error) {
	st, _, err := s.Open(ctx, wire.AppendUDP(nil, wire.FlowHeader{Src: src, Dst: dst}))
	return st, err
}

// DialEcho opens a conversation of ICMP echo requests to dst on behalf of src; the stream's messages are those of wire.KindEcho.
func DialEcho(ctx context.Context, s *mux.Session, src, dst netip.Addr) (*mux.Stream, error) {
	st, _, err := s.Open(ctx, wire.AppendEcho(nil, src, dst))
	return st, err
}

// DialIntercept hands an intercepted flow on towards the laptop.
func DialIntercept(ctx context.Context, s *mux.Session, h wire.InterceptHeader) (*mux.Stream, error) {
	st, _, err := s.Open(ctx, wire.AppendIntercept(nil, h))
	return st, err
}

// Query asks the other end's resolver.
func Query(ctx context.Context, s *mux.Session, dnsMsg []byte) ([]byte, error) {
	return s.Call(ctx, wire.AppendDNS(nil, dnsMsg))
}

// Control calls a method of the other end: in and out are its JSON argument and result; nil for none.
func Control(ctx context.Context, s *mux.Session, method string, in, out any) error {
	h, err := control(method, in)
	if err != nil {
		return err
	}
	reply, err := s.Call(ctx, wire.AppendControl(nil, h))
	if err != nil {
		return fmt.Errorf("%s: %w", method, err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(reply, out); err != nil {
		return fmt.Errorf("%s: decode answer: %w", method, err)
	}
	return nil
}

func control(method string, in any) (wire.ControlHeader, error) {
	h := wire.ControlHeader{Method: method}
	if in == nil {
		return h, nil
	}
	var err error
	if h.Body, err = json.Marshal(in); err != nil {
		return h, fmt.Errorf("%s: encode argument: %w", method, err)
	}
	return h, nil
}

// Watch calls a method that answers with values until one end stops. It returns when the other end has accepted.
func Watch(ctx context.Context, s *mux.Session, method string, in any) (*Watcher, error) {
	h, err := control(method, in)
	if err != nil {
		return nil, err
	}
	st, _, err := s.Open(ctx, wire.AppendWatch(nil, h))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", method, err)
	}
	return &Watcher{method: method, st: st}, nil
}

// Watcher receives the values of a watch. It is for one goroutine; Close may be called by another.
type Watcher struct {
	method string
	st     *mux.Stream
	buf    []byte
}

// Next waits for the next value and decodes it into out. io.EOF means that the other end has no more. When ctx ends Next
// can be called again: no value is lost.
func (w *Watcher) Next(ctx context.Context, out any) error {
	_ = w.st.SetReadDeadline(time.Time{})
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = w.st.SetReadDeadline(time.Unix(1, 0))
		close(fired)
	})
	line, err := w.line()
	if !stop() {
		<-fired // so that it cannot hit the next call
	}
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if errors.Is(err, io.EOF) {
			return err
		}
		return fmt.Errorf("%s: %w", w.method, err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(line, out); err != nil {
		return fmt.Errorf("%s: decode value: %w", w.method, err)
	}
	return nil
}

// line returns the next line; it is valid until the next call.
func (w *Watcher) line() ([]byte, error) {
	for seen := 0; ; {
		if i := bytes.IndexByte(w.buf[seen:], '\n'); i >= 0 {
			line := bytes.Clone(w.buf[:seen+i])
			w.buf = append(w.buf[:0], w.buf[seen+i+1:]...)
			return line, nil
		}
		seen = len(w.buf)
		if seen > maxWatchValue {
			w.st.ResetCode(wire.CodeProtocol)
			return nil, mux.ErrTooLarge
		}
		if cap(w.buf)-seen < 4<<10 {
			w.buf = append(w.buf, make([]byte, max(4<<10, seen))...)[:seen]
		}
		n, err := w.st.Read(w.buf[seen:cap(w.buf)])
		w.buf = w.buf[:seen+n]
		if errors.Is(err, io.EOF) && seen > 0 {
			return nil, io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, err
		}
	}
}

// Close ends the watch; the other end's send fails.
func (w *Watcher) Close() error {
	w.st.ResetCode(wire.CodeCanceled)
	return nil
}

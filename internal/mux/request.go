package mux

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/internal/wire"
)

var errFinished = errors.New("request finished")

// Request is a stream that the peer wants to open. It must be answered once: Accept, Reply or Reject.
type Request struct {
	st     *Stream
	header []byte

	mu sync.Mutex
	// guarded by mu:
	answered bool
	ctx      context.Context
	stop     context.CancelCauseFunc
	ended    error // why ctx is cancelled
}

// Header returns the OPEN's payload until the request is answered; its first byte is the kind.
func (r *Request) Header() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.header
}

// Context is cancelled, with the cause, when the opener gives up, the stream ends, or the session does.
func (r *Request) Context() context.Context {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ctx == nil {
		r.ctx, r.stop = context.WithCancelCause(context.Background())
		if r.ended != nil {
			r.stop(r.ended)
		}
	}
	return r.ctx
}

func (r *Request) cancel(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended != nil {
		return
	}
	r.ended = err
	if r.stop != nil {
		r.stop(err)
	}
}

func (r *Request) answer() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.answered {
		return ErrAnswered
	}
	r.answered = true
	r.st.s.answered(len(r.header))
	r.header = nil // its stream may live long
	return nil
}

// Accept answers yes, with a payload for the opener of at most MaxHeader bytes, and returns the stream.
func (r *Request) Accept(reply []byte) (*Stream, error) {
	if len(reply) > wire.MaxPayload {
		return nil, ErrTooLarge
	}
	if err := r.answer(); err != nil {
		return nil, err
	}
	if err := r.st.accept(reply, false); err != nil {
		return nil, err
	}
	return r.st, nil
}

// replyTimeout is how long the opener has to take 64 KiB of an answer: whoever takes none would have it kept for as long as the session lasts.
// It is longer than a session may be without a connection.
const replyTimeout = time.Minute

// Reply answers a call with at most MaxReply bytes and ends the stream.
func (r *Request) Reply(payload []byte) error {
	if len(payload) > MaxReply {
		return errors.Join(ErrTooLarge, r.Reject(wire.CodeInternal, "the answer is too large"))
	}
	if err := r.answer(); err != nil {
		return err
	}
	defer r.cancel(errFinished)
	first := payload[:min(len(payload), wire.MaxPayload)]
	rest := payload[len(first):]
	if err := r.st.accept(first, len(rest) == 0); err != nil {
		return err
	}
	for len(rest) > 0 {
		_ = r.st.SetWriteDeadline(time.Now().Add(replyTimeout)) // fails only for a stream that has ended
		n, err := r.st.Write(rest[:min(len(rest), wire.MaxPayload)])
		if err != nil {
			r.st.Reset()
			return err
		}
		rest = rest[n:]
	}
	_ = r.st.SetWriteDeadline(time.Time{})
	return r.st.Close()
}

// Reject answers no; the opener gets a *RejectError.
func (r *Request) Reject(code wire.Code, msg string) error {
	if err := r.answer(); err != nil {
		return err
	}
	st := r.st
	st.mu.Lock()
	err := st.err
	st.pending = false
	gone := st.gone
	st.mu.Unlock()
	if !gone {
		err = st.s.w.control(true, func(b []byte) []byte { return wire.AppendError(b, wire.TypeErr, st.id, code, msg) })
	}
	st.end(errFinished, true)
	return err
}

// accept sends OK. fin says that it is the whole answer.
func (st *Stream) accept(reply []byte, fin bool) error {
	st.mu.Lock()
	if st.err != nil {
		err := st.err
		st.mu.Unlock()
		return err
	}
	st.pending = false
	hdr := wire.Header{Type: wire.TypeOK, Stream: st.id}
	if !st.rx.fin && !fin {
		window := st.s.budget.initial(st.s.cfg.InitialWindow)
		st.rx.window, st.rx.credit = window, window
		hdr.Flags = windowLog(window)
	}
	if fin {
		st.tx.fin = true
		hdr.Flags |= wire.FlagFin
	}
	both := fin && st.rx.fin
	st.mu.Unlock()

	st.writeMu.Lock()
	err := st.s.w.put(st, hdr, reply, nil)
	st.unlockWrite()
	switch {
	case err == nil:
	case errors.Is(err, errGivenUp):
		return st.Err()
	default:
		return st.transportError(err)
	}
	if both {
		st.s.remove(st)
	}
	return nil
}

// readAll reads the rest of a call's answer.
func (st *Stream) readAll(first []byte) ([]byte, error) {
	out := first
	buf := getChunk(wire.MaxPayload)
	defer buf.recycle()
	for {
		n, err := st.Read(buf.b)
		if len(out)+n > MaxReply {
			st.ResetCode(wire.CodeInternal)
			return nil, ErrTooLarge
		}
		out = append(out, buf.b[:n]...)
		if err == io.EOF { //nolint:errorlint // Read returns io.EOF itself
			return out, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

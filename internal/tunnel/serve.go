package tunnel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/wire"
)

// defaultLimit is how many requests of one session are handled at once.
const defaultLimit = 16384

// Handlers say what this end of a tunnel does for the other. A kind without handler is rejected with wire.CodeDenied. An
// error of DNS, Control or Watch goes to the other end: the code and text of a *mux.RejectError, else a code by
// its kind (uerr) or errno and the error's text. Contexts end when the other end gives up or the session ends.
type Handlers struct {
	TCP       func(*mux.Request, wire.FlowHeader)
	UDP       func(*mux.Request, wire.FlowHeader)
	Echo      func(*mux.Request, wire.FlowHeader)
	Intercept func(*mux.Request, wire.InterceptHeader)
	Files     func(r *mux.Request, intercept string)
	Preview   func(*mux.Request, wire.PreviewHeader)
	DNS       func(ctx context.Context, msg []byte) ([]byte, error)
	// Control returns what is sent back as JSON; a json.RawMessage goes as it is.
	Control func(ctx context.Context, method string, body []byte) (any, error)
	// Watch sends values until it returns. The watch is accepted by the first send (send(nil) accepts without a value), so an
	// error before that is a rejection. send fails when the other end is gone.
	Watch func(ctx context.Context, method string, body []byte, send func(any) error) error

	Limit int          // requests handled at once; 0: 16,384. More are rejected with wire.CodeBusy.
	Log   *slog.Logger // nil: nothing is logged
}

// Serve answers the other end's requests, each in its own goroutine, until the session ends or ctx does; then it closes the
// session, waits for the handlers and returns why.
func Serve(ctx context.Context, s *mux.Session, h Handlers) error {
	if h.Limit == 0 {
		h.Limit = defaultLimit
	}
	if h.Log == nil {
		h.Log = slog.New(slog.DiscardHandler)
	}
	slots := make(chan struct{}, h.Limit)
	var wg sync.WaitGroup
	for {
		req, err := s.Accept(ctx)
		if err != nil {
			_ = s.Close()
			wg.Wait()
			return err
		}
		select {
		case slots <- struct{}{}:
		default:
			_ = req.Reject(wire.CodeBusy, "too many requests")
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			h.handle(req)
		})
	}
}

// handle answers one request. A panic ends the request, not the process: the headers are the other end's.
func (h *Handlers) handle(req *mux.Request) {
	defer func() {
		if r := recover(); r != nil {
			h.Log.Error("request handler failed", "err", fmt.Sprint("panic: ", r), "stack", string(debug.Stack()))
			_ = req.Reject(wire.CodeInternal, "the handler failed")
		}
	}()
	if err := h.dispatch(req); err != nil {
		code, msg := rejection(err, wire.CodeInternal)
		if rerr := req.Reject(code, msg); rerr != nil && !errors.Is(rerr, mux.ErrAnswered) {
			h.Log.Debug("rejection not sent", "err", rerr)
		}
	}
}

func (h *Handlers) dispatch(req *mux.Request) error {
	hdr := req.Header()
	kind, err := wire.KindOf(hdr)
	if err != nil {
		return protocolError(err)
	}
	denied := &mux.RejectError{Code: wire.CodeDenied, Msg: fmt.Sprintf("%s is not served here", kind)}
	switch kind {
	case wire.KindTCP, wire.KindUDP, wire.KindEcho:
		serve := h.flow(kind)
		if serve == nil {
			return denied
		}
		f, err := wire.ParseFlow(hdr)
		if err != nil {
			return protocolError(err)
		}
		serve(req, f)
		return nil
	case wire.KindIntercept:
		if h.Intercept == nil {
			return denied
		}
		i, err := wire.ParseIntercept(hdr)
		if err != nil {
			return protocolError(err)
		}
		h.Intercept(req, i)
		return nil
	case wire.KindFiles:
		if h.Files == nil {
			return denied
		}
		uid, err := wire.ParseFiles(hdr)
		if err != nil {
			return protocolError(err)
		}
		h.Files(req, uid)
		return nil
	case wire.KindPreview:
		if h.Preview == nil {
			return denied
		}
		p, err := wire.ParsePreview(hdr)
		if err != nil {
			return protocolError(err)
		}
		h.Preview(req, p)
		return nil
	case wire.KindDNS:
		if h.DNS == nil {
			return denied
		}
		return h.dns(req)
	case wire.KindControl:
		if h.Control == nil {
			return denied
		}
		return h.control(req)
	case wire.KindWatch:
		if h.Watch == nil {
			return denied
		}
		return h.watch(req)
	case wire.KindHello:
	}
	return denied
}

// flow returns the handler of a kind of flow.
func (h *Handlers) flow(k wire.Kind) func(*mux.Request, wire.FlowHeader) {
	switch k {
	case wire.KindTCP:
		return h.TCP
	case wire.KindUDP:
		return h.UDP
	default:
		return h.Echo
	}
}

func protocolError(err error) error {
	return &mux.RejectError{Code: wire.CodeProtocol, Msg: err.Error()}
}

func (h *Handlers) dns(req *mux.Request) error {
	msg, err := wire.ParseDNS(req.Header())
	if err != nil {
		return protocolError(err)
	}
	reply, err := h.DNS(req.Context(), msg)
	if err != nil {
		return err
	}
	return req.Reply(reply)
}

func (h *Handlers) control(req *mux.Request) error {
	c, err := wire.ParseControl(req.Header())
	if err != nil {
		return protocolError(err)
	}
	out, err := h.Control(req.Context(), c.Method, c.Body)
	if err != nil {
		return err
	}
	b, err := json.Marshal(out)
	if err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	return req.Reply(b)
}

func (h *Handlers) watch(req *mux.Request) error {
	c, err := wire.ParseControl(req.Header())
	if err != nil {
		return protocolError(err)
	}
	var st *mux.Stream
	send := func(v any) error {
		if st == nil {
			var err error
			if st, err = req.Accept(nil); err != nil {
				return err
			}
		}
		if v == nil {
			return nil
		}
		b, err := json.Marshal(v)
		if err != nil {
			return fmt.Errorf("encode value: %w", err)
		}
		_, err = st.Write(append(b, '\n'))
		return err
	}
	err = h.Watch(req.Context(), c.Method, c.Body, send)
	switch {
	case st == nil && err == nil:
		return req.Reply(nil)
	case st == nil:
		return err
	case err != nil:
		code, _ := rejection(err, wire.CodeInternal)
		st.ResetCode(code)
		return nil
	}
	return st.Close()
}

package httproute

import (
	"bufio"
	"errors"
	"io"
	"slices"
	"time"

	"golang.org/x/net/http2"

	"github.com/doppel-dev/doppel/internal/flow"
)

// serveOrigin connects to an origin and takes its frames until it ends.
func (h *splitter) serveOrigin(o *origin) {
	s, err := h.cfg.Open(h.ctx, o.to)
	if err != nil {
		h.lostOrigin(o, err)
		return
	}
	br := bufio.NewReaderSize(s, readAhead)
	h.mu.Lock()
	o.side = newSide(s, br, &h.batch, &h.account, func() { h.drained(o.side) })
	if h.ctx.Err() != nil || o.gone {
		h.mu.Unlock()
		s.Reset()
		return
	}
	h.mu.Unlock()
	if _, err := s.Write([]byte(http2.ClientPreface)); err != nil {
		s.Reset()
		h.lostOrigin(o, err)
		return
	}
	h.mu.Lock()
	_ = o.w.WriteSettings(http2.Setting{ID: http2.SettingEnablePush}, http2.Setting{ID: http2.SettingInitialWindowSize, Val: streamWindow},
		http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: maxFields})
	o.grant(0, ownWindow-defaultWindow)
	h.mu.Unlock()
	stop := h.ctx.Done()
	ended := make(chan struct{})
	h.wg.Go(func() {
		o.run(func(error) {
			if !flow.Over(s) { // what it has said before is read first
				s.Reset()
			}
		})
	})
	h.wg.Go(func() {
		select {
		case <-stop:
			s.Reset()
			h.mu.Lock()
			o.closeLocked(true)
			h.mu.Unlock()
		case <-ended:
		}
	})
	err = h.readOrigin(o, br, s)
	close(ended)
	h.lostOrigin(o, err)
}

// readOrigin takes an origin's frames.
func (h *splitter) readOrigin(o *origin, br *bufio.Reader, s flow.Stream) error {
	hello := time.AfterFunc(helloTimeout, func() {
		if o.to != App {
			s.Reset()
		}
	})
	b, err := br.Peek(9)
	hello.Stop()
	if len(b) < 9 || b[3] != byte(http2.FrameSettings) {
		if o.to == App && len(b) > 0 {
			return h.passApp(br)
		}
		return errors.Join(errNotHTTP2(b), err)
	}
	for {
		f, err := o.readFrame()
		h.mu.Lock()
		h.begin()
		if err == nil {
			err = h.fromOrigin(o, f)
		} else if se, ok := streamError(err); ok {
			if st := o.streams[se.StreamID]; st != nil {
				h.resetLocked(st, st.id, http2.ErrCodeInternal)
			}
			err = nil
		}
		h.end(o.side, err)
		if err != nil {
			return err
		}
	}
}

// passApp gives the client what an app says that does not speak HTTP/2, as it would have had it without us.
func (h *splitter) passApp(br *bufio.Reader) error {
	h.mu.Lock()
	greeted := h.greeted
	h.greeted = true
	h.mu.Unlock()
	if greeted {
		return errNotHTTP2(nil)
	}
	_, err := io.Copy(h.client.s, br)
	h.mu.Lock()
	h.client.closeLocked(false)
	h.mu.Unlock()
	return err
}

// fromOrigin takes one frame of an origin.
func (h *splitter) fromOrigin(o *origin, f *frame) error {
	st := o.streams[f.StreamID]
	switch f.Type {
	case http2.FrameHeaders:
		if st == nil {
			return nil
		}
		return h.answerLocked(st, f)
	case http2.FrameData:
		if err := o.arrived(int(f.Length)); err != nil {
			return err
		}
		if st == nil {
			o.passed(int(f.Length))
			return nil
		}
		if !st.down.begun {
			o.passed(int(f.Length))
			h.malformed(st)
			return nil
		}
		return h.takeLocked(st, &st.down, o.side, f)
	default:
	}
	switch f := f.other.(type) {
	case *http2.WindowUpdateFrame:
		if f.StreamID == 0 {
			return h.widen(o.side, f.Increment)
		}
		if st != nil {
			st.up.window += int64(f.Increment)
			h.flushUp(st)
		}
	case *http2.RSTStreamFrame:
		if st != nil {
			h.originResets(st, f.ErrCode)
		}
	case *http2.SettingsFrame:
		return h.originSettings(o, f)
	case *http2.PingFrame:
		o.pong(f)
	case *http2.GoAwayFrame:
		h.goAway(o, f)
	case *http2.PushPromiseFrame:
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	return nil
}

// originResets ends a stream for the client. If the answer is complete the client gets all of it first (RFC 9113, section 8.1).
func (h *splitter) originResets(st *stream, code http2.ErrCode) {
	if h.keepsAnswer(st, code) {
		return
	}
	h.forget(st)
	_ = h.client.w.WriteRSTStream(st.id, code)
	h.client.kick()
}

// keepsAnswer keeps a stream that its origin has ended until the client has the rest of a complete answer, and reports whether it does. code is
// what a client is told then that has not ended its request.
func (h *splitter) keepsAnswer(st *stream, code http2.ErrCode) bool {
	if !st.answered() {
		return false
	}
	if !st.up.over {
		st.reset = &code
	}
	h.client.passed(len(st.up.pending))
	st.up = half{over: true, sent: true}
	return true
}

// answered says whether the answer is complete, and the client has yet to get the end of it.
func (st *stream) answered() bool { return st.down.over && !st.down.sent }

// answerLocked takes an answer's head, provisional or final, or its trailers.
func (h *splitter) answerLocked(st *stream, f *frame) error {
	d := &st.down
	if f.truncated {
		h.resetLocked(st, st.id, http2.ErrCodeInternal)
		return nil
	}
	if d.begun {
		if d.over {
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
		if !f.ended() || len(f.fields) > 0 && f.fields[0].IsPseudo() {
			h.malformed(st)
			return nil
		}
		d.trailers, d.over = slices.Clone(f.fields), true
		h.flushDown(st)
		return nil
	}
	final, ok := f.fields.answers()
	if !ok || f.ended() && !final {
		h.malformed(st)
		return nil
	}
	d.begun = final
	d.over, d.sent = f.ended(), f.ended()
	h.client.writeFields(st.id, f.fields, f.ended())
	h.ended(st)
	return nil
}

// malformed ends a stream whose answer is none: a client would end its whole connection for what it is to take for ours (RFC 9113, section 8.1.1).
func (h *splitter) malformed(st *stream) { h.resetLocked(st, st.id, http2.ErrCodeProtocol) }

func (h *splitter) originSettings(o *origin, f *http2.SettingsFrame) error {
	err := h.settings(o.side, f, func(d int64) {
		for _, st := range o.streams {
			st.up.window += d
		}
	})
	if err != nil || f.IsAck() {
		return err
	}
	var all []http2.Setting
	_ = f.ForeachSetting(func(s http2.Setting) error {
		all = append(all, s)
		return nil
	})
	if v, ok := f.Value(http2.SettingMaxConcurrentStreams); ok {
		o.limit = v
	}
	o.ready = true
	h.greet(all...)
	h.sendWaiting(o)
	return nil
}

// goAway has new streams go to another connection, and those that the origin will not serve be sent again by the client.
func (h *splitter) goAway(o *origin, f *http2.GoAwayFrame) {
	if h.ups[o.to] == o {
		delete(h.ups, o.to)
	}
	waiting := o.waiting
	o.waiting = nil // before streams end and make room for them
	for id, st := range o.streams {
		if id > f.LastStreamID {
			h.forget(st)
			_ = h.client.w.WriteRSTStream(st.id, http2.ErrCodeRefusedStream)
		}
	}
	for _, st := range waiting {
		h.place(st, o.to)
	}
	if o.to == App {
		h.tellGoAway(f.ErrCode)
	}
	h.client.kick()
	if len(o.streams) == 0 {
		o.closeLocked(false)
	}
}

// tellGoAway asks the client to open no more streams; those that are under way are still served.
func (h *splitter) tellGoAway(code http2.ErrCode) {
	h.greet()
	if !h.closing {
		_ = h.client.w.WriteGoAway(1<<31-1, code, nil)
		h.leaving = time.AfterFunc(drainPause, h.close)
	}
	h.closing = true
	h.client.kick()
}

// lostOrigin ends an origin. What a laptop has not taken is the app's.
func (h *splitter) lostOrigin(o *origin, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	o.gone = true
	if h.ups[o.to] == o {
		delete(h.ups, o.to)
	}
	o.closeLocked(!errors.Is(err, io.EOF))
	if o.side != nil {
		defer o.s.Close()
	}
	if h.ctx.Err() != nil {
		return
	}
	waiting := o.waiting
	o.waiting = nil
	for _, st := range waiting {
		if o.to != App && !o.ready {
			h.place(st, App)
			continue
		}
		if o.ready { // it was there, and a new connection may be too
			h.place(st, o.to)
			continue
		}
		h.forget(st)
		h.greet()
		_ = h.client.w.WriteRSTStream(st.id, http2.ErrCodeRefusedStream)
	}
	failed := func(st *stream) {
		h.forget(st)
		_ = h.client.w.WriteRSTStream(st.id, http2.ErrCodeInternal) // it may have acted on them
	}
	for _, st := range o.streams {
		if !st.answered() {
			failed(st)
		}
	}
	keeps := o.side != nil && o.store.lose()
	for _, st := range o.streams {
		if !keeps || !h.keepsAnswer(st, http2.ErrCodeNo) {
			failed(st)
		}
	}
	h.client.kick()
	switch {
	case o.to == App:
		h.tellGoAway(http2.ErrCodeNo)
	case !h.greeted:
		h.use(App)
	}
}

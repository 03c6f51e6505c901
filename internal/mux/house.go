package mux

import (
	"fmt"
	"time"

	"github.com/doppel-dev/doppel/internal/wire"
)

// houseInterval is how often, at most, idle streams are asked for their credit.
const houseInterval = 100 * time.Millisecond

// keepHouse is the housekeeper goroutine: it pings, declares a silent peer dead, and moves credit from idle streams to those that wait.
func (s *Session) keepHouse() {
	var tick <-chan time.Time
	if s.cfg.KeepAlive > 0 {
		t := time.NewTicker(s.cfg.KeepAlive)
		defer t.Stop()
		tick = t.C
		s.probe()
	}
	var pause <-chan time.Time
	kick := s.kick
	seen, missed := uint64(0), 0
	for {
		select {
		case <-s.done:
			return
		case <-tick:
			select {
			case <-s.Down(): // no connection: nothing can be expected of the peer
				missed = 0
				continue
			default:
			}
			if n := s.frames.Load(); n != seen {
				seen, missed = n, 0
			} else if missed++; missed >= s.cfg.KeepAliveMisses {
				s.Drop(fmt.Errorf("%w for %s", ErrKeepAlive, time.Duration(missed)*s.cfg.KeepAlive))
				missed = 0
				continue
			}
			if s.c.untold() {
				s.w.acknowledge() // the peer need not keep it any longer
			}
			s.probe()
		case <-s.probes:
			s.probe()
		case <-kick:
			kick, pause = nil, time.After(houseInterval)
			s.moveCredit()
		case <-pause:
			kick, pause = s.kick, nil
			if s.moveCredit() {
				kick, pause = nil, time.After(houseInterval)
			}
		}
	}
}

// moveCredit asks idle streams for their credit if little is free, and grants to streams that wait. It reports whether some still wait.
func (s *Session) moveCredit() (waiting bool) {
	s.mu.Lock()
	streams := make([]*Stream, 0, len(s.streams))
	for _, st := range s.streams {
		streams = append(streams, st)
	}
	s.mu.Unlock()
	low := s.budget.low()
	for _, st := range streams {
		st.mu.Lock()
		ask := low && !st.rx.touched && !st.rx.asked && !st.pending && st.rx.credit > minWindow && !st.rx.fin
		st.rx.touched = false
		st.rx.asked = st.rx.asked || ask
		g := 0
		if st.rx.wanted > 0 {
			g = st.grantLocked()
			waiting = waiting || st.rx.wanted > 0
		}
		st.mu.Unlock()
		if ask {
			_ = s.w.control(false, func(b []byte) []byte { return wire.AppendUint32(b, wire.TypeReclaim, st.id, minWindow) })
		}
		if g > 0 {
			_ = s.w.control(false, func(b []byte) []byte { return wire.AppendUint32(b, wire.TypeWindow, st.id, uint32(g)) })
		}
	}
	return waiting
}

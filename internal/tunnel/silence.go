package tunnel

import (
	"context"
	"errors"
	"time"

	"github.com/doppel-dev/doppel/internal/mux"
)

const (
	// silentFor is how long the other end may say nothing after it was sent something until it is asked.
	silentFor = time.Second
	// answerTimeout is how long it may take to answer then until its tunnel gets another connection, and maxAnswerTimeout how long it has when other
	// connections did not help: each time twice as long as before.
	answerTimeout    = 3 * time.Second
	maxAnswerTimeout = 30 * time.Second
	// slowest is what a way carries at least, in bytes a second: what it was sent before arrives first.
	slowest = 64 << 10
)

// errSilent is why a tunnel gets another connection.
var errSilent = errors.New("the other end is silent")

// watch notices, while a tunnel has a connection, that the other end is silent: the mux's keepalive takes a minute, and a node that is cut off or
// a router that forgets says nothing at all. It returns errSilent when it is to get another connection.
func (l *Link) watch(ctx context.Context, cur *life) error {
	s := cur.s
	if l.cfg.OnSilent == nil && s.ID() == "" { // to be wrong would cost all that is open
		return nil
	}
	tick := time.NewTicker(silentFor)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		sent, _ := s.Traffic()
		if s.Silent() < silentFor {
			cur.heard = sent
			continue
		}
		wait := silentFor
		if l.cfg.OnSilent == nil {
			wait = l.patience + time.Duration(sent-cur.heard)*time.Second/slowest
		}
		if !saysNothing(ctx, s, wait) {
			continue
		}
		if l.cfg.OnSilent != nil {
			l.cfg.OnSilent(s)
			continue
		}
		l.patience = min(2*l.patience, maxAnswerTimeout)
		return errSilent
	}
}

// saysNothing is true if nothing comes for so long, not even the answer to a ping.
func saysNothing(ctx context.Context, s *mux.Session, wait time.Duration) bool {
	pctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	_, err := s.Ping(pctx)
	return err != nil && ctx.Err() == nil && s.Err() == nil && s.Silent() >= wait
}

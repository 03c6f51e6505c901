package httproute

import (
	"slices"
	"sync"

	"golang.org/x/net/http2"
)

// Budget bounds what all the HTTP/2 connections of a process store beyond what is each one's own (ownWindow, ownWaiting).
type Budget struct {
	mu sync.Mutex
	// guarded by mu:
	left   int
	queued []*account // who would have taken ownWindow
}

// NewBudget returns a budget of n bytes.
func NewBudget(n int) *Budget { return &Budget{left: n} }

// account is what one client's connection has of a budget. It is guarded by splitter.mu. Without a budget there is no end of it.
type account struct {
	budget *Budget
	taken  int
	wake   func() // called on a goroutine of its own when there may be ownWindow again
	ended  bool   // a wake may still be under way
}

// take takes n bytes if the budget has as many.
func (a *account) take(n int) bool {
	if a.ended {
		return false
	}
	if b := a.budget; b != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.left < n {
			return false
		}
		b.left -= n
	}
	a.taken += n
	return true
}

// queue has wake called once.
func (a *account) queue() {
	if a.ended {
		return
	}
	b := a.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	if !slices.Contains(b.queued, a) {
		b.queued = append(b.queued, a)
	}
}

// put gives n bytes back.
func (a *account) put(n int) {
	a.taken -= n
	if b := a.budget; b != nil && n > 0 {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.left += n
		for room := b.left; room >= ownWindow && len(b.queued) > 0; room -= ownWindow {
			go b.queued[0].wake()
			b.queued = b.queued[1:]
		}
	}
}

// end gives all back.
func (a *account) end() {
	a.ended = true
	if b := a.budget; b != nil {
		b.mu.Lock()
		b.queued = slices.DeleteFunc(b.queued, func(q *account) bool { return q == a })
		b.mu.Unlock()
	}
	a.put(a.taken)
}

// store is the memory that one connection's DATA has until it is passed on, which is the window that its peer is granted (RFC 9113, section 6.9).
// It is small as long as what comes is passed on at once. It grows with what stays, so that streams that are stuck do not hold up the others as
// long as the budget has room. It is guarded by splitter.mu.
type store struct {
	*account
	stored   int // bytes
	room     int // for these, what the peer may still send, and what it has not been told yet
	untold   int // that
	reserved int // of the budget
	lost     bool
}

// arrived counts n bytes, which it is an error to send without having been granted them. grant is what the peer may send besides.
func (s *store) arrived(n int) (grant int, err error) {
	if s.stored += n; s.stored+s.untold > s.room {
		return 0, http2.ConnectionError(http2.ErrCodeFlowControl)
	}
	return s.more(), nil
}

// more makes room if half of it is taken.
func (s *store) more() int {
	if s.lost || s.stored <= s.room/2 || s.room >= connWindow {
		return 0
	}
	if !s.take(ownWindow) {
		s.queue()
		return 0
	}
	s.room += ownWindow
	s.reserved += ownWindow
	return ownWindow
}

// passed counts n bytes that are stored no more. grant is what the peer may send again, if that is enough to be told.
func (s *store) passed(n int) (grant int) {
	s.stored -= n
	if s.reserved > 0 && (s.lost || s.stored < s.room/8) {
		back := min(s.reserved, n)
		s.put(back)
		s.reserved -= back
		s.room -= back
		n -= back
	}
	if s.untold += n; s.untold < ownWindow/4 || s.lost {
		return 0
	}
	n, s.untold = s.untold, 0
	return n
}

// lose says whether what is stored may stay though its connection has ended. The next one to the same place will have memory of its own, so all of
// this is the budget's.
func (s *store) lose() bool {
	s.lost = true
	if s.reserved >= s.stored {
		s.put(s.reserved - s.stored)
	} else if !s.take(s.stored - s.reserved) {
		return false
	}
	s.reserved = s.stored
	return true
}

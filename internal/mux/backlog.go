package mux

import (
	"slices"
	"sync"
)

// backlog are the requests that Accept has not returned yet, at most so many. It takes memory for those that wait: a channel would take it for all that may,
// in each session, and a manager has thousands of sessions in which nothing waits.
type backlog struct {
	max  int
	more chan struct{} // one waits

	mu sync.Mutex
	// guarded by mu
	waiting []*Request
	first   int // of waiting that was not taken
}

func newBacklog(n int) *backlog { return &backlog{max: n, more: make(chan struct{}, 1)} }

// put says whether there was room.
func (b *backlog) put(r *Request) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.waiting)-b.first >= b.max {
		return false
	}
	if len(b.waiting) == cap(b.waiting) && b.first > len(b.waiting)/2 { // one that is never empty would grow for ever
		b.waiting, b.first = slices.Delete(b.waiting, 0, b.first), 0
	}
	b.waiting = append(b.waiting, r)
	b.wakeLocked()
	return true
}

// take returns the oldest, or nil.
func (b *backlog) take() *Request {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.first == len(b.waiting) {
		return nil
	}
	r := b.waiting[b.first]
	b.waiting[b.first] = nil
	if b.first++; b.first < len(b.waiting) {
		b.wakeLocked() // another who waits may have it
		return r
	}
	b.waiting, b.first = b.waiting[:0], 0
	if cap(b.waiting) > keptBacklog {
		b.waiting = nil
	}
	return r
}

// keptBacklog is for how many a backlog that is empty keeps room.
const keptBacklog = 64

func (b *backlog) wakeLocked() {
	select {
	case b.more <- struct{}{}:
	default: // it is awake
	}
}

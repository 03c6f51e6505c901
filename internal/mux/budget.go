package mux

import "sync"

// minWindow is what every stream is granted at least, in bytes: it is set aside for Config.MaxStreams, so that no stream
// is ever without credit because of others.
const minWindow = 1 << 10

// budget shares the session's memory among its streams. Each stream holds a window: credit the peer may still use, bytes in
// the buffer, and bytes read but not yet granted again. minWindow of it is set aside; the rest comes from the pool here.
//
// A stream's share is limited by what is free, not by a fixed quota (dynamic thresholds: Choudhury and Hahne, IEEE/ACM
// Transactions on Networking 6(2), 1998): one stream may take much of an empty pool, many streams take little each, and a
// part always stays free for those who come later.
type budget struct {
	pool     int
	pressure func() // called, unlocked, when little is free: idle streams should give credit back

	mu sync.Mutex
	// guarded by mu:
	free int
}

func newBudget(total, maxStreams int, pressure func()) *budget {
	pool := total - maxStreams*minWindow
	return &budget{pool: pool, free: pool, pressure: pressure}
}

// initial takes the window of a new stream: a power of two of at most limit bytes.
func (b *budget) initial(limit int) int {
	b.mu.Lock()
	// A new stream may never use its window: a sixteenth of what is free.
	window := 1 << windowLog(min(limit, minWindow+b.free/16))
	b.free -= window - minWindow
	low := b.free < b.pool/4
	b.mu.Unlock()
	if low {
		b.pressure()
	}
	return window
}

// grow raises a window from cur towards want and returns how much was added. need says that the stream cannot go on with
// less than want (a message larger than the window): then all that is free may be taken.
func (b *budget) grow(cur, want int, need bool) int {
	b.mu.Lock()
	n := want - cur
	limit := b.free
	if !need {
		limit = (b.free - (cur - minWindow)) / 2 // leaves as much free as the stream will hold
	}
	n = max(0, min(n, limit))
	b.free -= n
	low := b.free < b.pool/4
	b.mu.Unlock()
	if low {
		b.pressure()
	}
	return n
}

// excess returns how much of a window of cur bytes is more than the stream's share by now.
func (b *budget) excess(cur int) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return max(0, cur-minWindow-b.free)
}

// release gives n bytes of a window back.
func (b *budget) release(n int) {
	b.mu.Lock()
	b.free += n
	b.mu.Unlock()
}

func (b *budget) low() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.free < b.pool/4
}

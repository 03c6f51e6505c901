package mux

import (
	"sync"
	"time"
)

const (
	// quietPath is how many bytes may move while a ping is on its way for its time to be the path's own, without what waits before it.
	quietPath = 64 << 10
	// probePause is the least time between pings that a flow asks for which the window holds up.
	probePause = 100 * time.Millisecond
	// With longerTrips pings of a busy path in a row that all take longerBy times as long as was believed, the path has become a longer one. What our own
	// windows let wait on it takes less: they are less than four times the product of bandwidth and delay (outgrows).
	longerTrips = 8
	longerBy    = 5
)

// path is what is known of the round trip over the connection of the moment. Paths change below a connection: a laptop roams, a tunnel below is moved.
type path struct {
	mu sync.Mutex
	// guarded by mu
	rtt    time.Duration // without what waits on the way; 0: not known
	busy   int           // pings in a row that say nothing but that the path may have become longer
	least  time.Duration // of these
	probed time.Time
}

// sample takes what a ping took, beside so many bytes.
func (p *path) sample(took time.Duration, beside uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	took = max(took, 1)
	if p.rtt == 0 || took < p.rtt || beside <= quietPath {
		p.rtt, p.busy = took, 0
		return
	}
	if p.busy++; p.busy == 1 || took < p.least {
		p.least = took
	}
	if p.busy < longerTrips {
		return
	}
	if p.busy = 0; p.least > longerBy*p.rtt {
		p.rtt = p.least
	}
}

// trip is the round trip, or 0 while none was measured.
func (p *path) trip() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rtt
}

// due says, at most once in probePause, that the path is worth another ping.
func (p *path) due() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.probed) < probePause {
		return false
	}
	p.probed = time.Now()
	return true
}

// reset forgets: there is another connection.
func (p *path) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rtt, p.busy = 0, 0
}

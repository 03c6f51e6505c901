package mux

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	// quietPath is how many bytes may move while a ping is on its way for its time to be the path's own, without what waits before it.
	quietPath = 64 << 10
	// probePause is the least time between pings that a flow asks for which the window holds up.
	probePause = 50 * time.Millisecond
	// After so many pings of a busy path in a row, during most of whose time nothing came, the path has become a longer one.
	longerTrips = 4
)

// path is what is known of the round trip over the connection of the moment. Paths change below a connection: a laptop roams, a tunnel below is moved.
type path struct {
	watched atomic.Bool // while a ping is on its way

	mu sync.Mutex
	// guarded by mu
	rtt     time.Duration // without what waits on the way; 0: not known
	heard   time.Time     // while watched: when something came last, or the ping was sent
	silence time.Duration // the longest without anything since the ping was sent
	longer  int           // pings in a row that nothing can have held up but a longer path
	least   time.Duration // of these
	probed  time.Time
}

// watch watches the path until a ping that is about to be sent is answered, unless it is being watched already.
func (p *path) watch() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.watched.Load() {
		return false
	}
	p.heard, p.silence = time.Now(), 0
	p.watched.Store(true)
	return true
}

// arrived notes that something came.
func (p *path) arrived() {
	if !p.watched.Load() {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.heard, p.silence = now, max(p.silence, now.Sub(p.heard))
}

// sample takes what a ping took, beside so many bytes. A ping that had to wait behind data came amid it. Where the window is too small for a path that has
// become longer, nothing comes for most of a round trip, and what then comes at once did not hold the ping up.
func (p *path) sample(took time.Duration, beside uint64, watched bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if watched {
		p.watched.Store(false)
	}
	took = max(took, 1)
	switch {
	case p.rtt == 0 || took < p.rtt || beside <= quietPath:
		p.rtt, p.longer = took, 0
	case !watched:
	case 2*p.silence < took:
		p.longer = 0
	default:
		if p.longer++; p.longer == 1 || took < p.least {
			p.least = took
		}
		if p.longer == longerTrips {
			p.rtt, p.longer = p.least, 0
		}
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
	if p.watched.Load() || time.Since(p.probed) < probePause {
		return false
	}
	p.probed = time.Now()
	return true
}

// reset forgets: there is another connection.
func (p *path) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rtt, p.longer = 0, 0
	p.watched.Store(false)
}

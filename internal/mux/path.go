package mux

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	// quietPath is how many bytes may move while a ping is on its way for its time to be the path's own, without what waits before it.
	quietPath = 64 << 10
	// trickle is how many bytes may come in a silence: small frames of others, which fill no path.
	trickle = 8 << 10
	// probePause is the least time between pings that a flow asks for which the window holds up.
	probePause = 50 * time.Millisecond
	// After silentTrips pings of a busy path in a row, half of whose time or more was its three longest silences, the path has become a longer one; after
	// longerTrips in a row, too, that all took longerBy times as long as was believed: what our own windows let wait takes less. A path of less than
	// longAtLeast is short: the initial window carries 200 Mbit/s over it, and busy processes at its ends look the same.
	silentTrips = 4
	longerTrips = 8
	longerBy    = 5
	longAtLeast = 10 * time.Millisecond
)

// path is what is known of the round trip over the connection of the moment. Paths change below a connection: a laptop roams, a tunnel below is moved.
type path struct {
	watched atomic.Bool // while a ping is on its way

	mu sync.Mutex
	// guarded by mu
	began   time.Time        // when the connection did
	rtt     time.Duration    // without what waits on the way; 0: not known
	heard   time.Time        // while watched: when the silence of the moment began
	came    int              // in it, in bytes
	silence [3]time.Duration // the longest ones since the ping was sent, the longest first
	silent  streak           // pings amid silence
	busy    streak           // pings that say nothing but that the path may have become longer
	queue   bool             // the last ping that was watched waited behind data
	probed  time.Time
}

// streak is the pings of a kind in a row.
type streak struct {
	n     int
	least time.Duration
}

// add returns how many there are with this one.
func (s *streak) add(took time.Duration) int {
	if s.n++; s.n == 1 || took < s.least {
		s.least = took
	}
	return s.n
}

// watch watches the path until a ping that is about to be sent is answered, unless it is being watched already.
func (p *path) watch() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.watched.Load() {
		return false
	}
	p.heard, p.came, p.silence = time.Now(), 0, [3]time.Duration{}
	p.watched.Store(true)
	return true
}

// arrived notes that n bytes came.
func (p *path) arrived(n int) {
	if !p.watched.Load() {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.came += n; p.came > trickle {
		p.endSilenceLocked()
	}
}

func (p *path) endSilenceLocked() {
	now := time.Now()
	d := now.Sub(p.heard)
	for i, longest := range p.silence {
		p.silence[i] = max(d, longest)
		d = min(d, longest)
	}
	p.heard, p.came = now, 0
}

// sample takes what a ping that was sent at a time took, beside so many bytes. A ping that has to wait behind data comes amid it. Where windows are too small for a
// path that has become longer, nothing comes for a large part of the round trip, and what then comes at once did not hold the ping up.
func (p *path) sample(sent time.Time, beside uint64, watched bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if sent.Before(p.began) {
		return // over another connection, in part
	}
	took, silent := max(time.Since(sent), 1), false
	if watched {
		p.endSilenceLocked()
		p.watched.Store(false)
		silent = 2*(p.silence[0]+p.silence[1]+p.silence[2]) >= took
		p.queue = p.rtt > 0 && took >= 2*p.rtt && !silent
	}
	if p.rtt == 0 || took < p.rtt || beside <= quietPath {
		p.believeLocked(took)
		return
	}
	if watched && !silent {
		p.silent = streak{}
	} else if silent && p.silent.add(took) == silentTrips {
		p.longerLocked(&p.silent, p.rtt)
	}
	if p.busy.add(took) == longerTrips {
		p.longerLocked(&p.busy, longerBy*p.rtt)
	}
}

// longerLocked ends a streak, and believes it if it is longer than so much.
func (p *path) longerLocked(s *streak, than time.Duration) {
	least := s.least
	*s = streak{}
	if least > than && least >= longAtLeast {
		p.believeLocked(least)
	}
}

func (p *path) believeLocked(rtt time.Duration) {
	p.rtt, p.silent, p.busy = rtt, streak{}, streak{}
}

// trip is the round trip, or 0 while none was measured.
func (p *path) trip() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rtt
}

// queues says whether the last ping that was watched waited behind data.
func (p *path) queues() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.queue
}

// due says, at most once in probePause and while no ping is watched, that the path is worth another ping.
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
	p.began, p.queue = time.Now(), false
	p.believeLocked(0)
	p.watched.Store(false)
}

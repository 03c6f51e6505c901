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
	// The path has become a longer one after silentTrips pings of a busy path in a row, of each of which its three longest silences were half or more; or
	// after longerTrips, of each of which they were a third, that all took longerBy times as long as was believed. Where there is no silence the path is full,
	// whatever pings take. A path of less than longAtLeast is short: the initial window carries 200 Mbit/s over it, and busy processes at its ends look the same.
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
	began   time.Time     // when the connection did
	rtt     time.Duration // without what waits on the way; 0: not known
	heard   time.Time     // while watched: when the silence of the moment began
	came    int           // in it, in bytes
	longest [3]silence    // since the ping was sent, the longest first
	silent  streak        // pings of which silence was half
	sparse  streak        // pings of which it was a third
	queued  bool          // the last ping that was watched waited behind data
	probed  time.Time
}

// silence is a time in which nothing came, and the bytes that ended it.
type silence struct {
	took time.Duration
	came int
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

// watch watches the path until a ping that is to be sent now is answered, unless it is being watched already.
func (p *path) watch() (now time.Time, watched bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now = time.Now()
	if p.watched.Load() {
		return now, false
	}
	p.heard, p.came, p.longest = now, 0, [3]silence{}
	p.watched.Store(true)
	return now, true
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
	this := silence{now.Sub(p.heard), p.came}
	for i, s := range p.longest {
		if this.took > s.took {
			p.longest[i], this = this, s
		}
	}
	p.heard, p.came = now, 0
}

// silentLocked is how long nothing came in the longest silences of a ping that took so long beside so many bytes. What ended a silence has come in it, where a
// path is slow, and not at its end.
func (p *path) silentLocked(took time.Duration, beside uint64) (sum time.Duration) {
	for _, s := range p.longest {
		sum += max(0, s.took-time.Duration(float64(took)*float64(s.came)/float64(max(beside, 1))))
	}
	return sum
}

// sample takes what a ping that was sent at a time took, beside so many bytes. A ping that has to wait behind the peer's data comes amid it. Where windows
// are too small for a path that has become longer, nothing comes for a large part of the round trip, and what then comes at once did not hold the ping
// up. Behind our own data credit has to wait as well.
func (p *path) sample(sent time.Time, beside uint64, watched bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if sent.Before(p.began) {
		return // over another connection, in part
	}
	took, silent := max(time.Since(sent), 1), time.Duration(0)
	if watched {
		p.endSilenceLocked()
		p.watched.Store(false)
		silent = p.silentLocked(took, beside)
		p.queued = p.rtt > 0 && took >= 2*p.rtt && 3*silent < took
	}
	switch {
	case p.rtt == 0 || took < p.rtt || beside <= quietPath:
		p.believeLocked(took)
		return
	case !watched:
		return
	}
	if 2*silent < took {
		p.silent = streak{}
	} else if p.silent.add(took) == silentTrips {
		p.longerLocked(&p.silent, p.rtt)
	}
	if 3*silent < took {
		p.sparse = streak{}
	} else if p.sparse.add(took) == longerTrips {
		p.longerLocked(&p.sparse, longerBy*p.rtt)
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
	p.rtt, p.silent, p.sparse = rtt, streak{}, streak{}
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
	return p.queued
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
	p.began, p.queued = time.Now(), false
	p.believeLocked(0)
	p.watched.Store(false)
}
